"""What the host refuses: plugins that break the hook contract, and answers of the wrong shape. Pure.

A plugin is checked whole before the plugin manager sees it, so a refused plugin leaves no trace.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping, Set
from difflib import get_close_matches
from typing import Any

import pluggy

from vswa_plugin import hookspecs
from vswa_plugin.blocks.reuse import ReuseRule
from vswa_plugin.engine.contract import Engine, EventAdapter
from vswa_plugin.engine.predicted import Scorer, SimulatedRank
from vswa_plugin.engine.sources import EventSource
from vswa_plugin.errors import PluginError
from vswa_plugin.selection import Chooser
from vswa_plugin.wire.events import Rank

#: Hook name -> names of its arguments, in order.
Specs = Mapping[str, tuple[str, ...]]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_IMPL = hookspecs.NAME + "_impl"
_SPEC = hookspecs.NAME + "_spec"
_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_name(name: str) -> None:
    """Refuse what could not be given to ``--no-plugin`` or a comma-separated list.

    :raises PluginError: the name is not made of letters, digits, ``_``, ``-`` and ``.``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(
            f"expected a plugin name of letters, digits, '_', '-' and '.', got {name!r}; "
            f"rename the entry point or file"
        )


def check_plugin(manager: pluggy.PluginManager, plugin: object, name: str, specs: Specs) -> tuple[str, ...]:
    """The hooks that ``plugin`` implements, sorted.

    :raises PluginError: a misspelt hook, a function that is no plain one, wrong arguments, a forgotten
        ``@hookimpl``, or no hook at all. Names the plugin, the hook and what to do.
    """
    found: set[str] = set()
    for attribute in dir(plugin):
        static = inspect.getattr_static(plugin, attribute, None)
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            _refuse_unmarked(name, attribute, static, specs)
            continue
        hook = options.get("specname") or attribute
        if hook not in specs:
            if options.get("optionalhook"):
                continue
            raise PluginError(_unknown_hook(name, hook, specs))
        if options.get("wrapper") or options.get("hookwrapper"):
            raise PluginError(f"{_at(name, hook)}: wrappers are not supported; implement the hook itself")
        _check_function(name, hook, getattr(plugin, attribute), specs[hook])
        found.add(hook)
    if not found:
        raise PluginError(
            f"plugin {name!r} implements no hook; mark at least one function with @hookimpl (docs/hooks.md)"
        )
    return tuple(sorted(found))


def _at(name: str, hook: str) -> str:
    return f"plugin {name!r}, hook {hook!r}"


def _unknown_hook(name: str, hook: str, specs: Specs) -> str:
    near = get_close_matches(hook, specs, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"plugin {name!r} implements {hook!r}, which is no hook: {hint}Known: {', '.join(sorted(specs))}"


def _refuse_unmarked(name: str, attribute: str, static: object, specs: Specs) -> None:
    """A hook that would silently never be called."""
    # A mark is a dict of options; objects that invent attributes, such as mocks, do not count.
    if isinstance(getattr(static, _IMPL, None), dict):
        raise PluginError(f"{_at(name, attribute)}: expected a plain function, got {type(static).__name__}")
    if attribute in specs and callable(static) and not hasattr(static, _SPEC):
        raise PluginError(
            f"{_at(name, attribute)}: the function is not marked; write @hookimpl above it "
            f"(from vswa_plugin.hookspecs import hookimpl)"
        )


def _check_function(name: str, hook: str, function: Any, known: tuple[str, ...]) -> None:
    at = _at(name, hook)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginError(f"{at}: expected a plain function, got an async one; hooks are synchronous")
    if inspect.isgeneratorfunction(function):
        raise PluginError(f"{at}: expected a plain function, got a generator; return the answer instead")
    wanted = f"expected arguments out of ({', '.join(known)}), passed by name"
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in _BY_NAME:
            # Keyword-only ones with a default are harmless: nothing is ever passed for them.
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty:
                continue
            raise PluginError(f"{at}: {wanted}, got {parameter}; write the argument's name plainly")
        has_default = parameter.default is not parameter.empty
        if has_default and parameter.name in known:
            raise PluginError(f"{at}: {parameter.name!r} has a default and would never be passed; remove it")
        if not has_default and parameter.name not in known:
            near = get_close_matches(parameter.name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PluginError(f"{at}: {wanted}, got {parameter.name!r}{hint}")


# -- answers ---------------------------------------------------------------------------------------


def check_answer(answer: object) -> None:
    """Refuse an awaitable: nobody awaits it, so the plugin's work would silently not be done."""
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(f"expected a plain answer, got {type(answer).__name__}; hooks are synchronous")


def check_unused(answer: object, hooks: Collection[str]) -> None:
    """Refuse what is no collection of names out of ``hooks``."""
    check_answer(answer)
    if not isinstance(answer, list | tuple | Set):
        raise TypeError(f"expected names of hooks, got {type(answer).__name__}")
    if unknown := [name for name in answer if name not in hooks]:
        raise ValueError(f"expected hooks of this plugin ({', '.join(hooks)}), got {unknown[0]!r}")


def check_engine(answer: object) -> None:
    """Refuse what lacks a part of ``vswa_plugin.engine.Engine``."""
    _check_parts(answer, Engine)


def check_adapter(answer: object) -> None:
    """Refuse what lacks a part of ``vswa_plugin.engine.EventAdapter``."""
    _check_parts(answer, EventAdapter)


def check_source(answer: object) -> None:
    """Refuse what lacks a part of ``vswa_plugin.engine.EventSource``."""
    _check_parts(answer, EventSource)


def check_simulated_rank(answer: object) -> None:
    """Refuse what lacks a part of ``vswa_plugin.engine.predicted.SimulatedRank``."""
    _check_parts(answer, SimulatedRank)


def _check_parts(answer: object, shape: type) -> None:
    check_answer(answer)
    parts = [*shape.__annotations__, *(name for name in vars(shape) if not name.startswith("_"))]
    missing = [part for part in parts if not hasattr(answer, part)]
    if missing:
        raise TypeError(
            f"expected an object with the shape of {shape.__module__}.{shape.__name__}, "
            f"got {type(answer).__name__} without {', '.join(missing)}"
        )


def check_names(answer: object) -> None:
    """Refuse what is no list of strings."""
    check_answer(answer)
    if not isinstance(answer, list | tuple) or not all(isinstance(name, str) for name in answer):
        raise TypeError(f"expected a list of names, got {answer!r}")


def check_rules(answer: object, owners: Mapping[str, str]) -> None:
    """Refuse what does not map names to objects with the shape of ``vswa_plugin.blocks.reuse.ReuseRule``.

    :param owners: rule -> who has it already.
    :raises PluginError: a name of ``owners``.
    """
    check_answer(answer)
    if not isinstance(answer, Mapping):
        raise TypeError(f"expected a mapping from names to reuse rules, got {type(answer).__name__}")
    for name, rule in answer.items():
        _check_parts(rule, ReuseRule)
        if name != rule.name:
            raise ValueError(f"expected a reuse rule under its own name {rule.name!r}, got it under {name!r}")
        if name in owners:
            raise PluginError(
                f"reuse rule {name!r} is there already, from {owners[name]}; choose another name"
            )


def check_scores(answer: object, ranks: Set[Rank]) -> None:
    """Refuse what does not map ranks of candidates to finite numbers."""
    check_answer(answer)
    if not isinstance(answer, Mapping):
        raise TypeError(f"expected a mapping from ranks to blocks, got {type(answer).__name__}")
    for rank, blocks in answer.items():
        check_rank(rank, ranks)
        if not isinstance(blocks, int | float) or not math.isfinite(blocks):
            raise ValueError(f"expected a finite number of blocks for rank {rank}, got {blocks!r}")


def check_rank(answer: object, ranks: Set[Rank]) -> None:
    """Refuse what is no rank of the candidates."""
    check_answer(answer)
    if answer not in ranks:
        raise ValueError(f"expected the rank of a candidate, got {answer!r}")


def check_scorers(answer: object, taken: Collection[str]) -> None:
    """Refuse what is no list of objects with the shape of ``vswa_plugin.engine.predicted.Scorer``.

    :param taken: names that other scorers have.
    """
    check_answer(answer)
    if not isinstance(answer, list | tuple):
        raise TypeError(f"expected a list of scorers, got {type(answer).__name__}")
    names = list(taken)
    for scorer in answer:
        _check_parts(scorer, Scorer)
        if scorer.name in names:
            raise PluginError(f"scorer {scorer.name!r} is there already; choose another name")
        names.append(scorer.name)


def check_choosers(answer: object, taken: Collection[str]) -> None:
    """Refuse what does not map names to objects with the shape of ``vswa_plugin.selection.Chooser``.

    :param taken: names that other policies have.
    """
    check_answer(answer)
    if not isinstance(answer, Mapping):
        raise TypeError(f"expected a mapping from names to policies, got {type(answer).__name__}")
    for name, chooser in answer.items():
        _check_parts(chooser, Chooser)
        if name in taken:
            raise PluginError(f"policy {name!r} is there already; choose another name")


def check_terms(answer: object, ranks: Set[Rank]) -> None:
    """Refuse what does not map ranks of candidates to names and finite numbers."""
    check_answer(answer)
    if not isinstance(answer, Mapping):
        raise TypeError(f"expected a mapping from ranks to terms, got {type(answer).__name__}")
    for rank, terms in answer.items():
        check_rank(rank, ranks)
        if not isinstance(terms, Mapping):
            raise TypeError(f"expected a mapping from names to numbers, got {type(terms).__name__}")
        for name, number in terms.items():
            if not (isinstance(name, str) and isinstance(number, int | float) and math.isfinite(number)):
                raise ValueError(f"expected names with finite numbers, got {name!r}: {number!r}")


#: Of one plugin; a page of metrics is read whole every few seconds.
MAX_METRICS_TEXT = 1 << 20
#: Names of samples by the type of their family.
_SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("_count", "_sum"),
}


def metric_families(text: str, taken: set[str]) -> set[str]:
    """Names of the metrics in a Prometheus text, and of their samples.

    :raises ValueError: the text does not parse, is too long, or repeats a name of ``taken`` or a sample:
        Prometheus would then refuse the whole page, with everybody else's metrics.
    """
    from prometheus_client.parser import text_string_to_metric_families

    if len(text) > MAX_METRICS_TEXT:
        raise ValueError(f"expected at most {MAX_METRICS_TEXT} characters of metrics, got {len(text)}")
    names: set[str] = set()
    untyped: set[str] = set()
    series: set[tuple[object, ...]] = set()
    for family in text_string_to_metric_families(text):
        own = {family.name, *(family.name + suffix for suffix in _SUFFIXES.get(family.type, ()))}
        own |= {sample.name for sample in family.samples}
        # Each sample without a TYPE line is read as a family of its own.
        mine = names - untyped if family.type == "unknown" else names
        if repeated := own & (taken | mine):
            raise ValueError(f"these metrics are on the page already: {', '.join(sorted(repeated))}")
        names |= own
        untyped |= own if family.type == "unknown" else set()
        for sample in family.samples:
            key = (sample.name, *sorted(sample.labels.items()))
            if key in series:
                raise ValueError(f"{sample.name}: expected each series once, got one again")
            series.add(key)
    return names


def declared_families(page: str) -> set[str]:
    """Names of the metrics in a Prometheus text of our own, by its TYPE lines.

    The samples of a large fleet's page take tens of milliseconds to parse, its TYPE lines below one.
    """
    declarations = [line for line in page.splitlines() if line.startswith("# TYPE ")]
    return metric_families("\n".join(declarations), set())
