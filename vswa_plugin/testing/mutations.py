"""Events that are almost well-formed, and JSON that is none, as Hypothesis strategies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from vswa_plugin.testing.adapter_checks import Path, part_at, paths_of

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "the suite for event adapters needs hypothesis: pip install 'vswa-plugin[test]'"
    ) from error

__all__ = [
    "Mutated",
    "any_json",
    "mutated",
    "resequenced",
    "try_all",
]

T = TypeVar("T")
#: What numbers are made of: the edges of what a field may hold.
EDGES = [
    -(1 << 64),
    -(1 << 63),
    -2,
    -1,
    0,
    1,
    2,
    3,
    7,
    (1 << 31),
    (1 << 32) - 1,
    1 << 32,
    (1 << 63),
    (1 << 64),
]


class Mutated(NamedTuple):
    """Events of which one is changed.

    :ivar at: index of that one; of events that were moved, the first place that differs.
    """

    events: list[Any]
    at: int


def try_all(strategy: st.SearchStrategy[T], check: Callable[[T], object], examples: int) -> None:
    """Call ``check`` with so many examples; the smallest that fails is shown."""

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(value: T) -> None:
        check(value)

    run()


def any_json() -> st.SearchStrategy[Any]:
    """Any JSON value."""
    scalars = (
        st.none() | st.booleans() | st.sampled_from(EDGES) | st.integers() | st.floats() | st.text(max_size=8)
    )
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )


def mutated(samples: Sequence[Any], keep_order: bool = False) -> st.SearchStrategy[Mutated]:
    """The samples with one change: of a field, or an event that is left out, doubled or moved.

    A new value is none that the samples have anywhere, so that no block becomes its own parent.

    :param keep_order: only a field is changed.
    """
    changed = st.integers(0, len(samples) - 1).flatmap(lambda index: _with_changed(samples, index))
    return changed if keep_order else changed | _reordered(samples)


def resequenced(samples: Sequence[Any], names: Container[Any]) -> st.SearchStrategy[list[Any]]:
    """Sequences of the samples in any order and number, in which blocks may bear one another's names.

    So blocks become their own parents, chains close on themselves, and blocks get other parents.

    :param names: of blocks, as an adapter announces them; numbers as 64 bits.
    """
    places = [
        [(path, part_at(sample, path)) for path in paths_of(sample) if _bears(part_at(sample, path), names)]
        for sample in samples
    ]
    values = [value for listed in places for _, value in listed]

    def renamed(index: int) -> st.SearchStrategy[Any]:
        if not places[index]:
            return st.just(samples[index])
        change = st.tuples(st.sampled_from([path for path, _ in places[index]]), st.sampled_from(values))
        return st.lists(change, max_size=2).map(lambda changes: _renamed(samples[index], changes))

    return st.lists(st.integers(0, len(samples) - 1).flatmap(renamed), min_size=1, max_size=12)


def _bears(value: Any, names: Container[Any]) -> bool:
    return not isinstance(value, dict | list) and any(name in names for name in _names(value))


def _renamed(sample: Any, changes: Sequence[tuple[Path, Any]]) -> Any:
    for path, value in changes:
        sample = _changed(sample, path, "replace", value)
    return sample


def _with_changed(samples: Sequence[Any], index: int) -> st.SearchStrategy[Mutated]:
    known = {name for sample in samples for name in _names(sample)}
    new = any_json().filter(lambda value: known.isdisjoint(_names(value)))
    # By kind of field first: a prompt has many tokens, and each other field is as likely as all of them.
    kinds: dict[Path, list[Path]] = {}
    for path in paths_of(samples[index]):
        kinds.setdefault(tuple("*" if isinstance(key, int) else key for key in path), []).append(path)
    paths = st.sampled_from(list(kinds.values())).flatmap(st.sampled_from)

    def change(path: Path, action: str, value: Any) -> Mutated:
        events = list(samples)
        events[index] = _changed(samples[index], path, action, value)
        return Mutated(events, index)

    return st.builds(change, paths, st.sampled_from(["replace", "remove", "add"]), new)


def _reordered(samples: Sequence[Any]) -> st.SearchStrategy[Mutated]:
    def reorder(index: int, to: int, action: str) -> Mutated:
        events = list(samples)
        event = events.pop(index)
        if action == "double":
            events[index:index] = [event, copy.deepcopy(event)]
        elif action == "move":
            events.insert(to, event)
        return Mutated(events, min(index, to) if action == "move" else index)

    places = st.integers(0, len(samples) - 1)
    return st.builds(reorder, places, places, st.sampled_from(["leave out", "double", "move"]))


def _changed(sample: Any, path: Path, action: str, value: Any) -> Any:
    if not path:
        return value
    whole = copy.deepcopy(sample)
    owner = part_at(whole, path[:-1])
    if action == "replace":
        owner[path[-1]] = value
    elif action == "remove":
        del owner[path[-1]]
    elif isinstance(owner, list):
        owner.insert(path[-1], value)
    else:
        owner["unknown field"] = value
    return whole


def _names(value: Any) -> Iterator[Any]:
    """What may name a block in a JSON value: texts, and numbers as 64 bits, as signed ones are read."""
    if isinstance(value, dict):
        for part in value.values():
            yield from _names(part)
    elif isinstance(value, list):
        for part in value:
            yield from _names(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value % (1 << 64)
    elif isinstance(value, float) and value.is_integer():
        yield int(value) % (1 << 64)
