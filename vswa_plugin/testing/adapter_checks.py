"""What the suites do with an event adapter: feed it as a publisher does, and bound how long that may take."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar, get_args

from vswa_plugin.blocks.hashing import block_hash
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import (
    BlocksStored,
    EngineEvent,
    EngineHash,
    EventAdapter,
    with_prompts,
)
from vswa_plugin.errors import ProtocolError, VswaError
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency, Restart

T = TypeVar("T")
#: Where a part of a JSON value lies: keys and indices.
Path = tuple[Any, ...]
EVENTS = get_args(EngineEvent)
#: Lines of Python for one event, unless said otherwise.
MOST_LINES = 200_000


class _TooManyLines(BaseException):
    """No Exception, so that an adapter's own ``except Exception`` does not swallow it."""


class Rank:
    """An adapter and the residency that a worker would keep with it.

    :ivar refused: reasons of events that the adapter refused with ProtocolError, or that do not fit the
        layout: a worker counts both and goes on.
    :ivar restarts: reasons for which the worker would begin a new epoch.
    """

    def __init__(self, adapter: EventAdapter, layout: CacheLayout, most_lines: int = MOST_LINES) -> None:
        self.residency = Residency(layout, NodeTable(_hasher))
        self.refused: list[str] = []
        self.restarts: list[str] = []
        self._adapter = with_prompts(adapter)
        self._block_size = layout.block_size if layout.plain else None
        self._unit = layout.hash_block_size
        self._most_lines = most_lines

    def takes(self, raw: Any) -> int:
        """Feed one event; how many blocks it stored.

        :raises AssertionError: anything but engine events that the residency takes, or ProtocolError.
        """
        return len(self.announced([raw]))

    def announced(self, events: Iterable[Any]) -> set[tuple[int, EngineHash]]:
        """Feed events; (group id, hash) of the blocks that they stored."""
        return {
            (event.group_id, block.hash)
            for raw in events
            for event in self._fed(raw)
            if isinstance(event, BlocksStored)
            for block in event.blocks
        }

    def _check_lengths(self, lengths: Sequence[int], raw: Any) -> None:
        if self._block_size is not None:
            assert max(lengths, default=0) <= self._block_size, (
                f"expected blocks of at most {self._block_size} tokens, got one of {max(lengths)} for {raw!r}"
            )
        else:
            odd = next((length for length in lengths if length % self._unit), None)
            assert odd is None, (
                f"expected blocks of whole units of {self._unit} tokens, got one of {odd} for {raw!r}"
            )

    def _fed(self, raw: Any) -> Sequence[EngineEvent]:
        """What the adapter makes of an event that comes alone."""
        try:
            events = bounded(lambda: self._adapter.feed(raw), self._most_lines)
            if isinstance(events, list):
                events = events + bounded(self._adapter.settle, self._most_lines)
        except ProtocolError as error:
            self.residency.clear()
            self.refused.append(str(error))
            return []
        except Exception as error:
            raise AssertionError(
                f"expected ProtocolError, got {type(error).__name__}: {error} for {raw!r}"
            ) from error
        assert isinstance(events, list), f"expected a list of engine events, got {events!r} for {raw!r}"
        for event in events:
            self._apply(event, raw)
        return events

    def _apply(self, event: EngineEvent, raw: Any) -> None:
        assert isinstance(event, EVENTS), f"expected engine events, got {type(event).__name__} for {raw!r}"
        if isinstance(event, BlocksStored):
            self._check_lengths([len(block.token_ids) for block in event.blocks], raw)
        try:
            self.residency.apply(event)
        except Restart as reason:
            self.restarts.append(str(reason))
        except VswaError as error:
            self.refused.append(str(error))
        except Exception as error:
            raise AssertionError(
                f"a worker cannot take {event!r}: {type(error).__name__}: {error}; it came of {raw!r}"
            ) from error


def grown(sample: Any) -> Iterator[Any]:
    """The sample with the last element of one of its lists twice, for each list of values without lists.

    So a block gets a token more; but no event gets a block twice, which would be its own parent.
    """
    for path in paths_of(sample):
        part = part_at(sample, path)
        if isinstance(part, list) and part and not _has_list(part[-1]):
            whole = copy.deepcopy(sample)
            longer = part_at(whole, path)
            longer.append(copy.deepcopy(longer[-1]))
            yield whole


def paths_of(value: Any, path: Path = ()) -> Iterator[Path]:
    """Where each part of a JSON value lies; the value itself is at ``()``."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from paths_of(part, (*path, key))


def part_at(value: Any, path: Path) -> Any:
    """The part of a JSON value that lies there."""
    for key in path:
        value = value[key]
    return value


def _has_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and any(map(_has_list, value.values())))


def bounded(call: Callable[[], T], most_lines: int) -> T:
    """The result of ``call``, which may run so many lines of Python; each call and each return counts as one.

    :raises AssertionError: it runs more.
    """
    left = most_lines

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooManyLines
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return call()
    except _TooManyLines:
        raise AssertionError(f"feed() had not ended after {most_lines} lines of Python: it hangs") from None
    finally:
        sys.settrace(before)


def _hasher(token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> int:
    """Block hashes with salts and LoRA names kept apart; Dynamo's own function is not needed here."""
    plain = block_hash(token_ids)
    return plain if cache_salt is lora_name is None else hash((plain, cache_salt, lora_name)) % (1 << 64)
