"""The plugin host: load, check, call each implementation on its own, list.

Hooks are called through the typed methods of :class:`PluginHost`, never through pluggy's own relay: there,
one exception would discard the answers of all plugins and name none.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, cast

import pluggy

from vswa_plugin import hookspecs, plugin_checks, plugin_sources
from vswa_plugin.commands import Command, Commands
from vswa_plugin.errors import ConfigError, PluginError, unknown_choice
from vswa_plugin.plugin_calls import FAILURES_METRIC, Implementation, Isolation, Lost
from vswa_plugin.reuse import RULES, ReuseRule

if TYPE_CHECKING:
    from typing import Self

    from vswa_plugin.accuracy.ranks import RankSetup, SimulatedRank
    from vswa_plugin.accuracy.scorers import Scorer
    from vswa_plugin.engine import BlocksStored, Engine, EngineSettings, EventAdapter, RawEvent, RequestDict
    from vswa_plugin.events import Batch, Rank, Source
    from vswa_plugin.hookspecs import WorkerContext
    from vswa_plugin.layout import CacheLayout
    from vswa_plugin.nodes import Node
    from vswa_plugin.records import RequestRecord
    from vswa_plugin.selection import RoutedRequest, Scored

logger = logging.getLogger(__name__)

ENGINE_BUDGET_S = 2.0


@dataclass(frozen=True)
class PluginStatus:
    """One line of ``vswa plugins``. ``state`` is ``loaded``, ``disabled`` or ``failed``."""

    name: str
    version: str
    hooks: tuple[str, ...]
    source: str
    state: str
    reason: str = ""


class PluginHost:
    """All plugins of one process.

    Load first, from one thread; after that the hook methods may be called from any thread.

    :param disabled: names that are not loaded, wherever they come from.
    :param trace: log every call of every implementation with its duration.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        disabled: Collection[str] = (),
        trace: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = pluggy.PluginManager(hookspecs.NAME)
        self._manager.add_hookspecs(hookspecs)
        self._specs = _specs()
        self._calls: dict[str, tuple[Implementation, ...]] = dict.fromkeys(self._specs, ())
        self._statuses: list[PluginStatus] = []
        self._disabled = frozenset(disabled)
        self._clock = clock
        self._isolation = Isolation(trace=trace, clock=clock)

    # -- loading -----------------------------------------------------------------------------------

    def register(self, plugin: object, name: str, *, version: str = "", source: str = "code") -> None:
        """Add one plugin, a module or an object. A refused one leaves no trace; a disabled one is listed.

        :raises PluginError: it breaks the contract of a hook, or its name is taken.
        """
        plugin_checks.check_name(name)
        if name in self._disabled:
            self._statuses.append(PluginStatus(name, version, (), source, "disabled", "switched off by name"))
            return
        self._refuse_twice(plugin, name, source)
        try:
            hooks = plugin_checks.check_plugin(self._manager, plugin, name, self._specs)
        except PluginError:
            raise
        except Exception as error:
            reason = plugin_sources.reason_of(error)
            raise PluginError(f"plugin {name!r} cannot be examined: {reason}") from error
        self._manager.register(plugin, name)
        self._statuses.append(PluginStatus(name, version, hooks, source, "loaded"))
        self._plan(hooks)

    def load_entry_points(self, *, only: Collection[str] | None = None) -> None:
        """Load the plugins of installed packages (entry point group ``vswa_plugin``).

        One that cannot be loaded is logged and listed as failed, and costs no other.

        :param only: load these and no others; None for all.
        """
        for entry in plugin_sources.installed():
            if entry.name in self._disabled:
                self._list(entry, "disabled", "switched off by name")
            elif only is not None and entry.name not in only:
                self._list(entry, "disabled", "not named in VSWA_PLUGINS")
            else:
                self._load_entry_point(entry)

    def load_local(self, where: str) -> None:
        """Load one plugin from a ``.py`` file or a dotted module name.

        :raises PluginError: it cannot be imported, or breaks the contract: the user named it.
        """
        name = plugin_sources.local_name(where)
        if name in self._disabled:
            self._statuses.append(PluginStatus(name, "", (), where, "disabled", "switched off by name"))
            return
        module = plugin_sources.load_local(where)
        try:
            self.register(module, name, version=str(getattr(module, "__version__", "")), source=where)
        except PluginError:
            plugin_sources.forget_local(module)
            raise

    def plugins(self) -> list[PluginStatus]:
        """All plugins that were found, also the disabled and failed ones, by name."""
        return sorted(self._statuses, key=lambda status: (status.name, status.source))

    def failures(self) -> dict[tuple[str, str], int]:
        """(plugin, hook) -> calls that failed."""
        return self._isolation.failures()

    def close(self) -> None:
        """Forget all plugins; later calls find none. May be called twice."""
        for name, plugin in self._manager.list_name_plugin():
            self._manager.unregister(name=name)
            plugin_sources.forget_local(plugin)
        self._calls = dict.fromkeys(self._specs, ())
        self._statuses.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- one method per hook -----------------------------------------------------------------------

    def engine(self, settings: EngineSettings) -> Engine:
        """The engine that ``settings.engine`` names: ``vswa_engine``.

        :raises ConfigError: from the engine's plugin, unchanged; or no plugin has such an engine.
        :raises PluginError: the plugin that should have answered failed.
        """
        lost: list[Lost] = []
        for implementation in self._calls["vswa_engine"]:
            began = self._clock()
            answer = self._isolation.call(
                implementation, {"settings": settings}, plugin_checks.check_engine, through=(ConfigError,)
            )
            if (took := self._clock() - began) > ENGINE_BUDGET_S:
                logger.warning(
                    "plugin %r took %.1f s in vswa_engine, expected at most %.0f s: only local checks "
                    "belong there, the slow part in the engine's start()",
                    implementation.plugin,
                    took,
                    ENGINE_BUDGET_S,
                )
            if isinstance(answer, Lost):
                lost.append(answer)
            elif answer is not None:
                return cast("Engine", answer)
        raise self._no_engine(settings.engine, lost)

    def engine_names(self) -> list[str]:
        """All names that ``--engine`` takes, sorted: ``vswa_engine_names``."""
        answers = self._ask_all("vswa_engine_names", {}, plugin_checks.check_names)
        return sorted({name for names in answers for name in names})

    def event_adapter(self, event_format: str, layout: CacheLayout) -> EventAdapter:
        """A new adapter for one engine's events: ``vswa_event_adapter``.

        :raises PluginError: no plugin reads this format; names those that failed.
        """
        lost: list[Lost] = []
        arguments = {"event_format": event_format, "layout": layout}
        for implementation in self._calls["vswa_event_adapter"]:
            answer = self._isolation.call(implementation, arguments, plugin_checks.check_adapter)
            if isinstance(answer, Lost):
                lost.append(answer)
            elif answer is not None:
                return cast("EventAdapter", answer)
        raise PluginError(
            f"no plugin reads KV events of the format {event_format!r}{self._why_not(lost)}; "
            f"see `vswa plugins`"
        )

    def worker_connected(self, worker: WorkerContext) -> None:
        """Tell all plugins of a worker that has connected: ``vswa_worker_connected``.

        :raises ConfigError: from a plugin, unchanged.
        """
        for implementation in self._calls["vswa_worker_connected"]:
            self._isolation.call(
                implementation, {"worker": worker}, plugin_checks.check_answer, through=(ConfigError,)
            )

    def reuse_rules(self) -> dict[str, ReuseRule]:
        """All reuse rules by name, the built-in ones and those of plugins: ``vswa_reuse_rules``."""
        owners = dict.fromkeys(RULES, "vswa-plugin")
        rules = dict(RULES)
        for implementation in self._calls["vswa_reuse_rules"]:
            check = partial(plugin_checks.check_rules, owners=owners)
            answer = self._isolation.call(implementation, {}, check)
            if answer is None or isinstance(answer, Lost):
                continue
            added = dict(cast("Mapping[str, ReuseRule]", answer))
            rules.update(added)
            owners.update(dict.fromkeys(added, implementation.plugin))
        return rules

    def score(self, request: RoutedRequest, candidates: Sequence[Scored]) -> dict[Rank, float]:
        """Blocks to add to the cost of some candidates: ``vswa_score``. Never raises."""
        totals: dict[Rank, float] = {}
        if self._calls["vswa_score"]:
            check = partial(plugin_checks.check_scores, ranks={each.rank for each in candidates})
            arguments = {"request": request, "candidates": candidates}
            for answer in self._ask_all("vswa_score", arguments, check):
                for rank, blocks in answer.items():
                    totals[rank] = totals.get(rank, 0.0) + blocks
        return totals

    def select_worker(self, request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
        """The candidate that a plugin has chosen: ``vswa_select_worker``. Never raises."""
        if not self._calls["vswa_select_worker"]:
            return None
        check = partial(plugin_checks.check_rank, ranks={each.rank for each in candidates})
        arguments = {"request": request, "candidates": candidates}
        for implementation in self._calls["vswa_select_worker"]:
            answer = self._isolation.call(implementation, arguments, check)
            if answer is not None and not isinstance(answer, Lost):
                return cast("Rank", answer)
        return None

    def accuracy_scorers(self, layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> list[Scorer]:
        """New scorers for one trace, those of all plugins: ``vswa_accuracy_scorers``."""
        scorers: list[Scorer] = []
        for implementation in self._calls["vswa_accuracy_scorers"]:
            check = partial(plugin_checks.check_scorers, taken=[each.name for each in scorers])
            answer = self._isolation.call(implementation, {"layout": layout, "rules": rules}, check)
            if answer is not None and not isinstance(answer, Lost):
                scorers += cast("Sequence[Scorer]", answer)
        return scorers

    def simulated_rank(self, setup: RankSetup) -> SimulatedRank:
        """The cache of one rank without its model: ``vswa_simulated_rank``.

        :raises ConfigError: from a plugin, unchanged.
        :raises PluginError: no plugin simulates this reuse rule; names those that failed.
        """
        lost: list[Lost] = []
        for implementation in self._calls["vswa_simulated_rank"]:
            answer = self._isolation.call(
                implementation,
                {"setup": setup},
                plugin_checks.check_simulated_rank,
                through=(ConfigError,),
            )
            if isinstance(answer, Lost):
                lost.append(answer)
            elif answer is not None:
                return cast("SimulatedRank", answer)
        rule = setup.layout.rule
        raise PluginError(
            f"no plugin simulates ranks with the reuse rule {rule!r}{self._why_not(lost)}; see `vswa plugins`"
        )

    def kv_batch(self, source: Source, batch: Batch) -> None:
        """Show one numbered batch to all observers: ``vswa_kv_batch``. Never raises."""
        self._ask_all("vswa_kv_batch", {"source": source, "batch": batch}, plugin_checks.check_answer)

    def kv_stored(self, source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Show announced blocks with their tokens to all observers: ``vswa_kv_stored``. Never raises."""
        arguments = {"source": source, "stored": stored, "nodes": nodes}
        self._ask_all("vswa_kv_stored", arguments, plugin_checks.check_answer)

    def engine_events(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        """Show an engine's own events to all observers: ``vswa_engine_events``. Never raises."""
        if self._calls["vswa_engine_events"]:
            arguments = {"dp_rank": dp_rank, "events": events}
            self._ask_all("vswa_engine_events", arguments, plugin_checks.check_answer)

    def request_arrived(self, request_id: str, request: RequestDict) -> None:
        """Show one request to all observers: ``vswa_request_arrived``. Never raises."""
        arguments = {"request_id": request_id, "request": request}
        self._ask_all("vswa_request_arrived", arguments, plugin_checks.check_answer)

    def request_finished(self, record: RequestRecord) -> None:
        """Show one finished request to all observers: ``vswa_request_finished``. Never raises."""
        self._ask_all("vswa_request_finished", {"record": record}, plugin_checks.check_answer)

    def metrics(self) -> str:
        """Prometheus text of all plugins, and the host's own failure counters: ``vswa_metrics``."""
        taken = {FAILURES_METRIC}

        def check(answer: object) -> None:
            plugin_checks.check_answer(answer)
            if not isinstance(answer, str):
                raise TypeError(f"expected Prometheus text, got {type(answer).__name__}")
            taken.update(plugin_checks.metric_families(answer, taken))

        texts = self._ask_all("vswa_metrics", {}, check)
        return (
            "".join(text if text.endswith("\n") else text + "\n" for text in texts)
            + self._isolation.metrics()
        )

    def commands(self, taken: Mapping[str, str]) -> list[Command]:
        """The subcommands that plugins add: ``vswa_register_commands``.

        :param taken: built-in command -> owner; plugins cannot replace these.
        """
        owners = dict(taken)
        added: list[Command] = []
        for implementation in self._calls["vswa_register_commands"]:
            commands = Commands(implementation.plugin, owners)
            arguments = {"commands": commands}
            if isinstance(self._isolation.call(implementation, arguments, plugin_checks.check_answer), Lost):
                continue
            added += commands.added
            owners.update({command.name: command.owner for command in commands.added})
        return added

    # -- inside ------------------------------------------------------------------------------------

    def _refuse_twice(self, plugin: object, name: str, source: str) -> None:
        for status in self._statuses:
            if status.name == name and status.state == "loaded":
                raise PluginError(
                    f"two plugins are named {name!r}: one from {status.source}, one from {source}; "
                    f"rename or uninstall one of them"
                )
        if (other := self._manager.get_name(plugin)) is not None:
            raise PluginError(f"plugin {name!r} is loaded already, under the name {other!r}")

    def _load_entry_point(self, entry: EntryPoint) -> None:
        try:
            plugin = entry.load()
        except plugin_sources.IMPORT_FAILURES as error:
            self._list(
                entry, "failed", f"cannot import {entry.value}: {plugin_sources.reason_of(error)}", error
            )
            return
        try:
            source = _source_of(entry)
            self.register(plugin, entry.name, version=plugin_sources.version_of(entry), source=source)
        except PluginError as error:
            self._list(entry, "failed", str(error), error)

    def _list(self, entry: EntryPoint, state: str, reason: str, error: BaseException | None = None) -> None:
        source = _source_of(entry)
        version = plugin_sources.version_of(entry)
        self._statuses.append(PluginStatus(entry.name, version, (), source, state, reason))
        if error is not None:
            # The traceback is for the plugin's author; everybody else gets one line per start.
            details = error if logger.isEnabledFor(logging.DEBUG) else None
            logger.warning(
                "plugin %r from %s is not loaded, the others are: %s",
                entry.name,
                source,
                reason,
                exc_info=details,
            )

    def _plan(self, hooks: Iterable[str]) -> None:
        """Fix the order of calls: by tier and name, whatever the order of loading was."""
        for hook in hooks:
            impls = sorted(getattr(self._manager.hook, hook).get_hookimpls(), key=_rank)
            self._calls[hook] = tuple(
                Implementation(impl.plugin_name, hook, impl.function, tuple(impl.argnames)) for impl in impls
            )

    def _ask_all(
        self, hook: str, arguments: Mapping[str, object], check: Callable[[object], None]
    ) -> list[Any]:
        answers = [self._isolation.call(each, arguments, check) for each in self._calls[hook]]
        return [answer for answer in answers if answer is not None and not isinstance(answer, Lost)]

    def _no_engine(self, engine: str, lost: Sequence[Lost]) -> ConfigError:
        known = self.engine_names()
        if engine in known:
            reason = self._why_not(lost) or ": its plugin names it, but gave no engine"
            return PluginError(f"engine {engine!r} cannot be used{reason}; see `vswa plugins`")
        return ConfigError(f"{unknown_choice('engine', engine, known)}{self._why_not(lost)}")

    def _why_not(self, lost: Sequence[Lost]) -> str:
        """What may be the reason that nobody answered."""
        reasons = [f"plugin {each.plugin!r} failed: {plugin_sources.reason_of(each.error)}" for each in lost]
        reasons += [
            f"plugin {status.name!r} is {status.state}: {status.reason}"
            for status in self.plugins()
            if status.state != "loaded"
        ]
        return f" ({'; '.join(reasons)})" if reasons else ""


def _specs() -> dict[str, tuple[str, ...]]:
    mark = hookspecs.NAME + "_spec"
    specs = {name: value for name, value in vars(hookspecs).items() if hasattr(value, mark)}
    return {name: tuple(inspect.signature(value).parameters) for name, value in specs.items()}


def _source_of(entry: EntryPoint) -> str:
    return f"{plugin_sources.package_of(entry)} ({entry.value})"


def _rank(impl: pluggy.HookImpl) -> tuple[int, str]:
    return (0 if impl.tryfirst else 2 if impl.trylast else 1, impl.plugin_name)
