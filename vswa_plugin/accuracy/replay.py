"""A trace through the real path: adapter, residency, wire bytes, index; each request predicted on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from vswa_plugin.accuracy.exceptions import exception_of
from vswa_plugin.accuracy.report import Outcome, Report, exceptions_in, scores_of
from vswa_plugin.accuracy.scorers import DEFAULT_TTL, EXACT, Exact, Prompt, Scorer, built_in_scorers
from vswa_plugin.accuracy.trace import Trace, TraceEvent, TraceRequest
from vswa_plugin.batches import Numbering
from vswa_plugin.dynamo import namespaced_block_hash
from vswa_plugin.engine import BlocksStored, EventAdapter
from vswa_plugin.errors import ConfigError, VswaError
from vswa_plugin.events import Event, Layout, Unknown, decode, encode, layout_event
from vswa_plugin.hashing import sequence_hashes, sequence_hashes_of_tokens
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
    run = _Replay(layout, adapter_for(trace.header.format, layout), rules, scorers)
    outcomes = []
    for line, record in trace.records(progress):
        try:
            if isinstance(record, TraceRequest):
                outcomes.append(run.outcome(line, record))
            else:
                run.feed(record)
        except VswaError as error:
            raise ConfigError(f"{trace.path}, line {line}: {error}") from error
    return run.report(trace, outcomes)


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


class _Replay:
    """One trace on its way."""

    def __init__(
        self,
        layout: CacheLayout,
        adapter: EventAdapter,
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
        self._adapter = adapter
        self._residency = Residency(layout, NodeTable(namespaced_block_hash))
        ticks = itertools.count(1)
        self._numbering = Numbering(lambda: next(ticks))
        self._restarts = 0
        self._changed = False
        self._begin()

    def feed(self, record: TraceEvent) -> None:
        """One engine event, to all scorers."""
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

    def outcome(self, line: int, request: TraceRequest) -> Outcome:
        """One request, by all scorers."""
        layout, tokens = self._residency.layout, request.token_ids
        if request.cached_tokens > len(tokens):
            raise ConfigError(
                f"expected cached_tokens of at most the prompt's {len(tokens)}, got {request.cached_tokens}"
            )
        prompt = Prompt(tokens, self._hashes(request, layout.block_size))
        predicted = {scorer.name: scorer.predict(prompt) for scorer in self._scorers}
        exception = None
        if predicted[EXACT] // layout.block_size != request.cached_tokens // layout.block_size:
            explanation = self._exact.explain(prompt)
            exception = exception_of(self._rule, layout, explanation, len(tokens), request.cached_tokens)
        return Outcome(line, len(tokens), request.cached_tokens, predicted, exception)

    def report(self, trace: Trace, outcomes: Sequence[Outcome]) -> Report:
        layout = self._residency.layout
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
