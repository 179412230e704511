"""A trace through the real path: adapter, residency, wire bytes, index; each request predicted on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vswa_plugin.accuracy.exceptions import LAG
from vswa_plugin.accuracy.forecasting import Forecasting
from vswa_plugin.accuracy.pipeline import EventPipeline
from vswa_plugin.accuracy.report import Outcome, Report, exceptions_in, scores_of
from vswa_plugin.accuracy.scorers import DEFAULT_TTL, EXACT, Exact, built_in_scorers
from vswa_plugin.accuracy.trace import Trace, TraceEvent, TraceHole, TraceRequest, TraceResult
from vswa_plugin.accuracy.waiting import Arrivals, Waiting
from vswa_plugin.blocks.hashing import with_lookahead
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.reuse import RULES, ReuseRule, rule_named
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.engine.contract import EventAdapter
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.errors import ConfigError, ProtocolError, VswaError
from vswa_plugin.wire.events import Event

if TYPE_CHECKING:
    from vswa_plugin.host.host import PluginHost

__all__ = [
    "replay",
    "replay_with",
]

#: (event format, layout) -> adapter, as ``PluginHost.event_adapter``.
AdapterFor: TypeAlias = Callable[[str, CacheLayout], EventAdapter]


def replay(
    trace: Trace,
    adapter_for: AdapterFor,
    *,
    rule: str | None = None,
    rules: Mapping[str, ReuseRule] = RULES,
    scorers: Sequence[Scorer] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Predict every request of ``trace`` from the events before it, and compare.

    :param rule: reuse rule; None: the trace's, or the usual one of its format.
    :param rules: all there are; plugins may have added some.
    :param scorers: other scorers than the built-in ones; the exact one is added where it is not among them.
    :param progress: called with the bytes of the file that have been read.
    :raises ConfigError: a record or event that cannot be read, with its line; an unknown rule or format.
    """
    layout = trace.layout(rule)
    if scorers is None:
        scorers = built_in_scorers(rules, blocks=trace.header.blocks)
    run = _Replay(layout, partial(adapter_for, trace.header.format, layout), rules, scorers)
    for line, record in trace.records(progress):
        try:
            match record:
                case TraceRequest():
                    run.arrive(line, record)
                case TraceResult():
                    run.end(record)
                case TraceHole():
                    run.skip(record)
                case TraceEvent():
                    run.feed(record)
        except ProtocolError as error:
            raise ConfigError(
                f"{trace.path}, line {line}: {error}. The header says that events are of the format "
                f"{trace.header.format!r}: is it another engine's trace?"
            ) from error
        except VswaError as error:
            raise ConfigError(f"{trace.path}, line {line}: {error}") from error
    return run.report(trace)


def replay_with(
    host: PluginHost,
    trace: Trace,
    *,
    rule: str | None = None,
    ttl: int = DEFAULT_TTL,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """The same with the adapters, rules and scorers of all plugins.

    :param ttl: of the approximate scorer, in requests.
    """
    rules = host.reuse_rules()
    scorers = built_in_scorers(rules, ttl, trace.header.blocks)
    scorers += host.accuracy_scorers(trace.layout(rule), rules, [each.name for each in scorers])
    return replay(trace, host.event_adapter, rule=rule, rules=rules, scorers=scorers, progress=progress)


class _Late(NamedTuple):
    """A request that was predicted wrongly, and of whose time events may still come.

    :ivar place: among the outcomes.
    """

    place: int
    waiting: Waiting
    actual: int
    seen: int


class _Replay:
    """One trace on its way."""

    def __init__(
        self,
        layout: CacheLayout,
        new_adapter: Callable[[], EventAdapter],
        rules: Mapping[str, ReuseRule],
        scorers: Sequence[Scorer],
    ) -> None:
        self._rule = rule_named(layout.rule, rules)
        chosen = list(scorers)
        self._forecasts = [each for each in chosen if isinstance(each, Forecasting)]
        exact = next((each for each in chosen if isinstance(each, Exact)), None)
        self._exact = exact or Exact(rules)
        self._scorers = chosen if exact else [self._exact, *chosen]
        names = [each.name for each in self._scorers]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected each scorer once, got {', '.join(names)}")
        self._pipeline = EventPipeline(layout, new_adapter, self._scorers)
        self._outcomes: list[Outcome | None] = []
        self._waiting: dict[int, Waiting] = {}
        self._late: list[_Late] = []
        self._arrivals = Arrivals()
        self._events = 0

    def feed(self, record: TraceEvent) -> None:
        """One engine event, to all scorers."""
        self._events += 1
        self._follow(self._pipeline.feed(record.event))

    def _follow(self, wire_events: Sequence[Event]) -> None:
        self._arrivals.follow(self._events, wire_events)
        for waiting in (*self._waiting.values(), *(late.waiting for late in self._late)):
            waiting.follow(self._events, wire_events, self._exact)
        self._settle([late for late in self._late if self._over(late)])

    def skip(self, hole: TraceHole) -> None:
        """Where events are missing nothing is known of the cache any more."""
        if hole.events:
            self._settle(self._late)
            self._pipeline.lose()

    def arrive(self, line: int, request: TraceRequest) -> None:
        """One request, predicted by all scorers, before its worker sees it."""
        self._follow(self._pipeline.settle())
        prompt = Prompt(request.token_ids, self._names(request))
        # A request that stands where it was matched waits for nothing.
        waits = request.cached_tokens is None
        predicted = {
            scorer.name: scorer.predict(prompt)
            for scorer in self._scorers
            if waits or scorer not in self._forecasts
        }
        for forecast in self._forecasts if not waits else ():
            predicted[forecast.name] = predicted[EXACT]
        if not request.reads_cache:
            predicted = dict.fromkeys(predicted, 0)
        waiting = Waiting(line, prompt, predicted, self._exact.explain(prompt))
        self._arrivals.arrive(self._events, prompt)
        self._pipeline.prompt(request.token_ids, request.cache_salt, request.lora_name)
        if request.cached_tokens is not None:
            self._judge(self._result(waiting, request.cached_tokens, self._events))
            return
        assert request.id is not None, "or it says what was reused"
        if request.id in self._waiting:
            raise ConfigError(f"expected a request with an id of its own, got {request.id} again")
        self._waiting[request.id] = waiting
        for forecast in self._forecasts:
            forecast.sent(request.id, prompt, request.reads_cache)

    def end(self, result: TraceResult) -> None:
        """What came of a request."""
        self._follow(self._pipeline.settle())
        waiting = self._waiting.pop(result.id, None)
        if waiting is None:
            raise ConfigError(f"expected the result of a request before it, got id {result.id}")
        for forecast in self._forecasts:
            forecast.admitted(result.id, result.cached_tokens)
            if result.seen is not None:  # of a recorder that writes it at the end of the request
                forecast.ended(result.id)
        late = self._result(
            waiting, result.cached_tokens, self._events if result.seen is None else result.seen
        )
        right = waiting.predicted[EXACT] // self._size == late.actual // self._size
        if right or self._over(late):
            self._judge(late)
        else:
            self._late.append(late)

    def _names(self, request: TraceRequest) -> Sequence[int]:
        layout, token_ids = self._pipeline.layout, request.token_ids
        hashes = namespaced_sequence_hashes(
            token_ids, layout.hash_block_size, request.cache_salt, request.lora_name
        )
        return with_lookahead(hashes, token_ids, layout.hash_block_size, layout.lookahead)

    @property
    def _size(self) -> int:
        return self._pipeline.layout.block_size

    def _result(self, waiting: Waiting, actual: int, seen: int) -> _Late:
        length = len(waiting.prompt.token_ids)
        if actual > length:
            raise ConfigError(f"expected cached_tokens of at most the prompt's {length}, got {actual}")
        self._outcomes.append(None)
        return _Late(len(self._outcomes) - 1, waiting, actual, seen)

    def _over(self, late: _Late) -> bool:
        """Whether no event to come can be from before its match."""
        return self._arrivals.end(late.seen) < math.inf

    def _settle(self, results: Sequence[_Late]) -> None:
        for late in list(results):
            self._late.remove(late)
            self._judge(late)

    def _judge(self, late: _Late) -> None:
        place, waiting, actual, seen = late
        exception = None
        if waiting.predicted[EXACT] // self._size != actual // self._size:
            end = self._arrivals.end(seen)
            exception = waiting.explained(self._rule, self._pipeline.layout, actual, seen, end)
        length = len(waiting.prompt.token_ids)
        self._outcomes[place] = Outcome(waiting.line, length, actual, waiting.predicted, exception)

    def report(self, trace: Trace) -> Report:
        self._follow(self._pipeline.settle())
        self._settle(self._late)
        layout, outcomes = self._pipeline.layout, [each for each in self._outcomes if each is not None]
        failed = tuple(each.name for each in self._scorers if getattr(each, "failed", False))
        return Report(
            trace=trace.name,
            format=trace.header.format,
            engine=trace.header.engine,
            rule=layout.rule,
            provenance=self._rule.provenance,
            block_size=layout.block_size,
            windows=tuple(group.label for group in layout.groups),
            requests=len(outcomes),
            prompt_tokens=sum(each.prompt_len for each in outcomes),
            cached_tokens=sum(each.actual for each in outcomes),
            restarts=self._pipeline.restarts,
            unattributed=self._pipeline.unattributed,
            exceptions=exceptions_in(outcomes),
            scores=scores_of(
                outcomes,
                [each.name for each in self._scorers if each.name not in failed],
                layout.block_size,
            ),
            outcomes=tuple(outcomes),
            lagged=sum(each.exception == LAG for each in outcomes),
            unfinished=len(self._waiting),
            failed_scorers=failed,
        )
