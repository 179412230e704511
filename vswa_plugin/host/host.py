"""The plugin host: one typed method per hook, which asks each plugin on its own and joins the answers.

Hooks are called through these methods, never through pluggy's own relay: there, one exception would discard
the answers of all plugins and name none. How plugins get into the host is in registered.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from vswa_plugin.blocks.reuse import RULES, ReuseRule
from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError, PluginError, unknown_choice
from vswa_plugin.hookspecs.commands import Command, Commands
from vswa_plugin.host import checks as plugin_checks
from vswa_plugin.host import sources as plugin_sources
from vswa_plugin.host.calls import FAILURES_METRIC, Implementation, Lost
from vswa_plugin.host.guards import (
    Guard,
    GuardedAdapter,
    GuardedEngine,
    GuardedScorer,
    GuardedSource,
    guarded_rule,
)
from vswa_plugin.host.registered import PluginSet
from vswa_plugin.host.registered import PluginStatus as PluginStatus

if TYPE_CHECKING:
    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.engine.contract import (
        BlocksStored,
        Engine,
        EngineSettings,
        EventAdapter,
        Node,
        RawEvent,
        RequestDict,
    )
    from vswa_plugin.engine.predicted import RankSetup, Scorer, SimulatedRank
    from vswa_plugin.engine.records import RequestRecord
    from vswa_plugin.engine.sources import EventSource, SourceSettings
    from vswa_plugin.hookspecs import WorkerContext
    from vswa_plugin.selection import Booked, Chooser, RoutedRequest, Scored
    from vswa_plugin.wire.events import Batch, Event, Rank, Source

logger = logging.getLogger(__name__)

ENGINE_BUDGET_S = 2.0


class PluginHost(PluginSet):
    """All plugins of one process, and the answers of all of them.

    Load first, from one thread; after that the hook methods may be called from any thread. Those on a hot
    path cost a dictionary look-up where no plugin implements the hook.
    """

    def options(self, options: Mapping[str, Section]) -> None:
        """Give each plugin that takes options its own, or an empty section: ``vswa_options``.

        Hooks that a plugin then says it does without are not called.

        :raises ConfigError: from a plugin, unchanged.
        """
        for each in self._calls["vswa_options"]:
            own = options.get(each.plugin, Section({}, "no file", each.plugin))
            check = partial(plugin_checks.check_unused, hooks=self.hooks_of(each.plugin))
            unused = self._isolation.call(each, {"options": own}, check, through=(ConfigError,))
            if unused is not None and not isinstance(unused, Lost):
                self._leave_out(each.plugin, cast("Collection[str]", unused))

    def engine(self, settings: EngineSettings) -> Engine:
        """The engine that ``settings.engine`` names, or the default where that is empty: ``vswa_engine``.

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
                return GuardedEngine(cast("Engine", answer), Guard(self._isolation, implementation))
        raise self._no_engine(settings.engine, lost)

    def engine_names(self) -> list[str]:
        """All names that ``--engine`` takes, sorted: ``vswa_engine_names``."""
        answers = self._ask_all("vswa_engine_names", {}, plugin_checks.check_names)
        return sorted({name for names in answers for name in names})

    def event_adapter(self, event_format: str, layout: CacheLayout) -> EventAdapter:
        """A new adapter for one engine's events: ``vswa_event_adapter``.

        :raises PluginError: no plugin reads this format; names those that failed.
        """
        arguments = {"event_format": event_format, "layout": layout}
        adapter, owner, lost = self._ask_first("vswa_event_adapter", arguments, plugin_checks.check_adapter)
        if owner is not None:
            return GuardedAdapter(cast("EventAdapter", adapter), Guard(self._isolation, owner))
        raise PluginError(
            f"no plugin reads KV events of the format {event_format!r}{self._why_not(lost)}; "
            f"see `vswa plugins`"
        )

    def event_source(self, settings: SourceSettings) -> EventSource:
        """What reads the events of one relayed worker: ``vswa_event_source``.

        :raises ConfigError: from a plugin, unchanged; PluginError: no plugin reads those of this engine.
        """
        source, owner, lost = self._ask_first(
            "vswa_event_source", {"settings": settings}, plugin_checks.check_source, through=(ConfigError,)
        )
        if owner is not None:
            return GuardedSource(cast("EventSource", source), Guard(self._isolation, owner))
        raise PluginError(
            f"--engine: expected an engine whose workers can be relayed, got {settings.engine!r}: no plugin "
            f"reads the events of its workers{self._why_not(lost)}; see `vswa plugins`"
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
        check = partial(plugin_checks.check_rules, owners=owners)
        for implementation, added in self._answers("vswa_reuse_rules", {}, check):
            guard = Guard(self._isolation, implementation)
            rules.update({name: guarded_rule(rule, guard) for name, rule in added.items()})
            owners.update(dict.fromkeys(added, implementation.plugin))
        return rules

    def selection_hooks(self) -> PluginHost | None:
        """This host, where a plugin has a say in the choice of workers; None: nobody need be asked."""
        return self if self.implements("vswa_score") or self.implements("vswa_select_worker") else None

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
        return cast("Rank | None", self._ask_first("vswa_select_worker", arguments, check)[0])

    def load_changed(self, model: str, key: Hashable, step: str, request: Booked) -> None:
        """Show a step of a request to all observers: ``vswa_load_changed``. Never raises."""
        if self._calls["vswa_load_changed"]:
            arguments = {"model": model, "key": key, "step": step, "request": request}
            self._show("vswa_load_changed", arguments)

    def rank_changed(self, rank: Rank, event: Event | None) -> None:
        """Show an event of a rank to all observers: ``vswa_rank_changed``. Never raises."""
        if self._calls["vswa_rank_changed"]:
            self._show("vswa_rank_changed", {"rank": rank, "event": event})

    def choice_terms(
        self, request: RoutedRequest, candidates: Sequence[Scored]
    ) -> Mapping[Rank, Mapping[str, float]]:
        """What the costs consist of; empty where no plugin says it: ``vswa_choice_terms``. Never raises."""
        check = partial(plugin_checks.check_terms, ranks={each.rank for each in candidates})
        arguments = {"request": request, "candidates": candidates}
        return self._ask_first("vswa_choice_terms", arguments, check)[0] or {}

    def simulated_choosers(self, clock: Callable[[], float], taken: Collection[str]) -> dict[str, Chooser]:
        """New policies for one simulation, those of all plugins: ``vswa_simulated_choosers``."""
        choosers: dict[str, Chooser] = {}
        names = set(taken)
        check = partial(plugin_checks.check_choosers, taken=names)
        for _, added in self._answers("vswa_simulated_choosers", {"clock": clock}, check):
            choosers.update(added)
            names.update(added)
        return choosers

    def accuracy_scorers(
        self, layout: CacheLayout, rules: Mapping[str, ReuseRule], taken: Collection[str] = ()
    ) -> list[Scorer]:
        """New scorers for one trace, those of all plugins: ``vswa_accuracy_scorers``.

        :param taken: names of scorers that are there already; no plugin may use them.
        """
        scorers: list[Scorer] = []
        names = set(taken)
        check = partial(plugin_checks.check_scorers, taken=names)
        arguments = {"layout": layout, "rules": rules}
        for implementation, added in self._answers("vswa_accuracy_scorers", arguments, check):
            guard = Guard(self._isolation, implementation)
            scorers += [GuardedScorer(each, guard) for each in added]
            names.update(each.name for each in added)
        return scorers

    def simulated_rank(self, setup: RankSetup) -> SimulatedRank:
        """The cache of one rank without its model: ``vswa_simulated_rank``.

        :raises ConfigError: from a plugin, unchanged.
        :raises PluginError: no plugin simulates this reuse rule; names those that failed.
        """
        rank, _, lost = self._ask_first(
            "vswa_simulated_rank",
            {"setup": setup},
            plugin_checks.check_simulated_rank,
            through=(ConfigError,),
        )
        if rank is not None:
            return cast("SimulatedRank", rank)
        rule = setup.layout.rule
        raise PluginError(
            f"no plugin simulates ranks with the reuse rule {rule!r}{self._why_not(lost)}; see `vswa plugins`"
        )

    def kv_batch(self, source: Source, batch: Batch) -> None:
        """Show one numbered batch to all observers: ``vswa_kv_batch``. Never raises."""
        if self._calls["vswa_kv_batch"]:
            self._show("vswa_kv_batch", {"source": source, "batch": batch})

    def kv_stored(self, source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        """Show announced blocks with their tokens to all observers: ``vswa_kv_stored``. Never raises."""
        if self._calls["vswa_kv_stored"]:
            self._show("vswa_kv_stored", {"source": source, "stored": stored, "nodes": nodes})

    def engine_events(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        """Show an engine's own events to all observers: ``vswa_engine_events``. Never raises."""
        if self._calls["vswa_engine_events"]:
            self._show("vswa_engine_events", {"dp_rank": dp_rank, "events": events})

    def request_arrived(self, request_id: str, request: RequestDict) -> None:
        """Show one request to all observers: ``vswa_request_arrived``. Never raises."""
        if self._calls["vswa_request_arrived"]:
            self._show("vswa_request_arrived", {"request_id": request_id, "request": request})

    def request_finished(self, record: RequestRecord) -> None:
        """Show one finished request to all observers: ``vswa_request_finished``. Never raises."""
        if self._calls["vswa_request_finished"]:
            self._show("vswa_request_finished", {"record": record})

    def metrics(self, page: str = "") -> str:
        """Prometheus text of all plugins, and the host's own failure counters: ``vswa_metrics``.

        :param page: to which the text is added; no plugin may repeat a metric that it has a TYPE line of.
            Given one, the counters of failures are shown from 0 on.
        """
        taken = {FAILURES_METRIC, f"{FAILURES_METRIC}_total"}
        known = [each for calls in self._calls.values() for each in calls] if page else []
        if page and self._calls["vswa_metrics"]:
            taken |= plugin_checks.declared_families(page)

        def check(answer: object) -> None:
            plugin_checks.check_answer(answer)
            if not isinstance(answer, str):
                raise TypeError(f"expected Prometheus text, got {type(answer).__name__}")
            taken.update(plugin_checks.metric_families(answer, taken))

        texts = self._ask_all("vswa_metrics", {}, check)
        return "".join(
            text if text.endswith("\n") else text + "\n" for text in texts
        ) + self._isolation.metrics(known)

    def stopping(self, budget_s: float) -> None:
        """Let all plugins end, at the same time: ``vswa_stopping``. Never raises.

        Returns when all are done, after ``budget_s`` seconds at the latest: not for an event loop's thread.
        """
        deadline = time.monotonic() + budget_s
        ending = {
            each: threading.Thread(
                target=self._isolation.call,
                args=(each, {"budget_s": budget_s}, plugin_checks.check_answer),
                name=f"stopping {each.plugin}",
                daemon=True,
            )
            for each in self._calls["vswa_stopping"]
        }
        for thread in ending.values():
            thread.start()
        for each, thread in ending.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                late = TimeoutError(f"expected an end within {budget_s:g} s; it is not waited for any longer")
                self._isolation.note(each, late)

    def commands(self, taken: Mapping[str, str]) -> list[Command]:
        """The subcommands that plugins add: ``vswa_register_commands``.

        :param taken: built-in command -> owner; plugins cannot replace these.
        """
        owners = dict(taken)
        added: list[Command] = []
        for implementation in self._calls["vswa_register_commands"]:
            commands = Commands(implementation.plugin, owners, self.simulated_rank)
            arguments = {"commands": commands}
            if isinstance(self._isolation.call(implementation, arguments, plugin_checks.check_answer), Lost):
                continue
            added += commands.added
            owners.update({command.name: command.owner for command in commands.added})
        return added

    # -- inside ------------------------------------------------------------------------------------

    def _show(self, hook: str, arguments: Mapping[str, object]) -> None:
        for each in self._calls[hook]:
            self._isolation.call(each, arguments, plugin_checks.check_answer)

    def _ask_first(
        self,
        hook: str,
        arguments: Mapping[str, object],
        check: Callable[[object], None],
        through: tuple[type[Exception], ...] = (),
    ) -> tuple[Any, Implementation | None, list[Lost]]:
        """The first answer and whose it is, or None twice; and the plugins that failed before it."""
        lost: list[Lost] = []
        for implementation in self._calls[hook]:
            answer = self._isolation.call(implementation, arguments, check, through=through)
            if isinstance(answer, Lost):
                lost.append(answer)
            elif answer is not None:
                return answer, implementation, lost
        return None, None, lost

    def _answers(
        self, hook: str, arguments: Mapping[str, object], check: Callable[[object], None]
    ) -> Iterator[tuple[Implementation, Any]]:
        """Each answer and whose it is; the next plugin is asked when the caller is done with it."""
        for each in self._calls[hook]:
            answer = self._isolation.call(each, arguments, check)
            if answer is not None and not isinstance(answer, Lost):
                yield each, answer

    def _ask_all(
        self, hook: str, arguments: Mapping[str, object], check: Callable[[object], None]
    ) -> list[Any]:
        return [answer for _, answer in self._answers(hook, arguments, check)]

    def _no_engine(self, engine: str, lost: Sequence[Lost]) -> ConfigError:
        known = self.engine_names()
        if engine in known:
            reason = self._why_not(lost) or ": its plugin names it, but gave no engine"
            return PluginError(f"engine {engine!r} cannot be used{reason}; see `vswa plugins`")
        if not engine:
            return ConfigError(
                "--engine: expected the name of an engine, got none, and no plugin has a default"
                f"{self._why_not(lost)}; known: {', '.join(known)}"
            )
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
