"""A trace through the real path: adapter, residency, wire bytes, index; each request predicted on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from vswa_plugin.accuracy.exceptions import LAG, exception_of
from vswa_plugin.accuracy.report import Outcome, Report, exceptions_in, scores_of
from vswa_plugin.accuracy.scorers import DEFAULT_TTL, EXACT, Exact, Prompt, Scorer, built_in_scorers
from vswa_plugin.accuracy.trace import Trace, TraceEvent, TraceHole, TraceRequest, TraceResult
from vswa_plugin.batches import Numbering
from vswa_plugin.dynamo import namespaced_block_hash
from vswa_plugin.engine import BlocksStored, EventAdapter
from vswa_plugin.errors import ConfigError, VswaError
from vswa_plugin.events import Event, Layout, Unknown, decode, encode, layout_event
from vswa_plugin.hashing import sequence_hashes, sequence_hashes_of_tokens
from vswa_plugin.index import Explanation
from vswa_plugin.layout import CacheLayout
from vswa_plugin.nodes import Node, NodeTable
from vswa_plugin.residency import Residency, Restart
from vswa_plugin.reuse import RULES, ReuseRule, rule_named

if TYPE_CHECKING:
    from vswa_plugin.host import PluginHost

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
    :param progress: told the bytes of the file that have been read.
    :raises ConfigError: a record or event that cannot be read, with its line; an unknown rule or format.
    """
    layout = trace.layout(rule)
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
    scorers = [*built_in_scorers(rules, ttl), *host.accuracy_scorers(trace.layout(rule), rules)]
    return replay(trace, host.event_adapter, rule=rule, rules=rules, scorers=scorers, progress=progress)


class _Waiting(NamedTuple):
    """A request whose result is not known yet.

    :ivar explanation: of our own prediction; None: as of now.
    :ivar later: our own predictions after it: events of the trace until then, and tokens.
    """

    line: int
    prompt: Prompt
    predicted: dict[str, int]
    explanation: Explanation | None
    later: list[tuple[int, int]]


class _Replay:
    """One trace on its way."""

    def __init__(
        self,
        layout: CacheLayout,
        new_adapter: Callable[[], EventAdapter],
        rules: Mapping[str, ReuseRule],
        scorers: Sequence[Scorer] | None,
    ) -> None:
        self._rule = rule_named(layout.rule, rules)
        chosen = built_in_scorers(rules) if scorers is None else list(scorers)
        known = next((each for each in chosen if isinstance(each, Exact)), None)
        self._exact = known or Exact(rules)
        self._scorers = chosen if known else [self._exact, *chosen]
        names = [each.name for each in self._scorers]
        if len(set(names)) != len(names):
            raise ConfigError(f"expected each scorer once, got {', '.join(names)}")
        self._new_adapter = new_adapter
        self._adapter = new_adapter()
        self._residency = Residency(layout, NodeTable(namespaced_block_hash))
        ticks = itertools.count(1)
        self._numbering = Numbering(lambda: next(ticks))
        self._outcomes: list[Outcome] = []
        self._waiting: dict[int, _Waiting] = {}
        self._events = 0
        self._restarts = 0
        self._changed = False
        self._begin()

    def feed(self, record: TraceEvent) -> None:
        """One engine event, to all scorers."""
        self._events += 1
        self._feed(record)
        for each in self._waiting.values():
            each.later.append((self._events, self._exact.predict(each.prompt)))

    def skip(self, hole: TraceHole) -> None:
        """Where events are missing nothing is known of the cache any more."""
        if hole.events:
            self._adapter = self._new_adapter()
            self._residency.clear()
            self._changed = True
            self._begin()

    def _feed(self, record: TraceEvent) -> None:
        for told in self._adapter.feed(record.event):
            if told.dp_rank != 0:
                raise ConfigError(f"expected events of one rank, 0, got one of dp_rank {told.dp_rank}")
            try:
                changes = self._residency.apply(told)
            except Restart:
                self._begin()
                continue
            if isinstance(told, BlocksStored):
                nodes = self._names_of(told)
                for scorer in self._scorers:
                    scorer.learn(told, nodes)
            self._changed = self._changed or bool(changes)
            for event in self._over_the_wire(changes):
                for scorer in self._scorers:
                    scorer.apply(event)

    def arrive(self, line: int, request: TraceRequest) -> None:
        """One request, predicted by all scorers."""
        prompt = Prompt(request.token_ids, self._hashes(request, self._residency.layout.block_size))
        predicted = {scorer.name: scorer.predict(prompt) for scorer in self._scorers}
        if request.cached_tokens is not None:
            self._settle(_Waiting(line, prompt, predicted, None, []), request.cached_tokens, 0)
            return
        assert request.id is not None, "or it says what was reused"
        if request.id in self._waiting:
            raise ConfigError(f"expected a request with an id of its own, got {request.id} again")
        explanation = self._exact.explain(prompt)
        self._waiting[request.id] = _Waiting(line, prompt, predicted, explanation, [])

    def end(self, result: TraceResult) -> None:
        """What came of a request."""
        waiting = self._waiting.pop(result.id, None)
        if waiting is None:
            raise ConfigError(f"expected the result of a request before it, got id {result.id}")
        self._settle(waiting, result.cached_tokens, self._events if result.seen is None else result.seen)

    def _settle(self, waiting: _Waiting, actual: int, seen: int) -> None:
        layout, prompt_len = self._residency.layout, len(waiting.prompt.token_ids)
        if actual > prompt_len:
            raise ConfigError(f"expected cached_tokens of at most the prompt's {prompt_len}, got {actual}")
        size, exception = layout.block_size, None
        if waiting.predicted[EXACT] // size != actual // size:
            explanation = waiting.explanation or self._exact.explain(waiting.prompt)
            exception = exception_of(self._rule, layout, explanation, prompt_len, actual)
            later = (tokens for events, tokens in waiting.later if events <= seen)
            if exception is None and any(tokens // size == actual // size for tokens in later):
                exception = LAG
        self._outcomes.append(Outcome(waiting.line, prompt_len, actual, waiting.predicted, exception))

    def report(self, trace: Trace) -> Report:
        layout, outcomes = self._residency.layout, self._outcomes
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
            restarts=self._restarts,
            unattributed=self._residency.unattributed,
            exceptions=exceptions_in(outcomes),
            scores=scores_of(outcomes, [each.name for each in self._scorers], layout.block_size),
            outcomes=tuple(outcomes),
            lagged=sum(each.exception == LAG for each in outcomes),
            unfinished=len(self._waiting),
        )

    def _begin(self) -> None:
        """As a publisher does: a new epoch, whose first event is the layout."""
        self._restarts += self._changed  # a layout that is corrected before any block costs nothing
        self._changed = False
        self._numbering.new_epoch()
        for event in self._over_the_wire([layout_event(self._residency.layout)]):
            assert isinstance(event, Layout)
            for scorer in self._scorers:
                scorer.begin(CacheLayout(event.groups, event.rule, event.model, event.hash_scheme))

    def _over_the_wire(self, changes: Sequence[Event]) -> Iterator[Event]:
        """As a router gets them."""
        for event in decode(encode(self._numbering.batch(changes))).events:
            assert not isinstance(event, Unknown), "both sides have one version"
            yield event

    def _names_of(self, stored: BlocksStored) -> list[Node]:
        """Of its leading blocks; the others could not be named."""
        nodes: list[Node] = []
        for block in stored.blocks:
            node = self._residency.nodes.get(block.hash)
            if node is None:
                break
            nodes.append(node)
        return nodes

    def _hashes(self, request: TraceRequest, block_size: int) -> Sequence[int]:
        tokens = request.token_ids
        if request.cache_salt is None and request.lora_name is None:
            return sequence_hashes_of_tokens(tokens, block_size)
        whole = range(0, len(tokens) - len(tokens) % block_size, block_size)
        return sequence_hashes(
            namespaced_block_hash(tokens[at : at + block_size], request.cache_salt, request.lora_name)
            for at in whole
        )
