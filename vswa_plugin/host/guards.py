"""What hooks return is called through the host as well: whatever it raises is counted, named, and its own.

A guard stands before one object of a plugin and has its shape. What the object's contract lets it raise goes
through unchanged; anything else becomes :class:`PluginFailed`, which costs what that object would have given
and nothing more. Answers are checked where a wrong one would do harm elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar, cast

from vswa_plugin.blocks.hybrid import Need
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import HybridRule, Needs, ReuseRule, is_hybrid
from vswa_plugin.engine.contract import (
    BlocksMoved,
    BlocksRemoved,
    BlocksStored,
    ChunkDict,
    Engine,
    EngineEvent,
    EngineInfo,
    EventAdapter,
    EventSink,
    EventsLost,
    GroupCreated,
    Node,
    RawEvent,
    RequestDict,
    with_prompts,
)
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.engine.sources import EventSource, SourceState
from vswa_plugin.errors import ConfigError, PluginFailed, RequestError, VswaError
from vswa_plugin.host.calls import Implementation, Isolation
from vswa_plugin.wire.events import Event

#: Numbers that an engine may state: each is a series of the worker's page.
MAX_STATS = 1_000

T = TypeVar("T")

_ENGINE_EVENTS = (BlocksStored, BlocksRemoved, BlocksMoved, GroupCreated, EventsLost)


class Guard:
    """Turns what goes wrong in an object of a plugin into PluginFailed.

    :param implementation: the hook by which the plugin gave the object.
    """

    def __init__(self, isolation: Isolation, implementation: Implementation) -> None:
        self._isolation = isolation
        self._implementation = implementation

    def failed(self, part: str, error: BaseException) -> PluginFailed:
        """Count ``error``, and the exception to raise in its place."""
        self._isolation.note(self._implementation, error)
        return PluginFailed(
            f"plugin {self._implementation.plugin!r} failed in {part}: {type(error).__name__}: {error}"
        )

    def call(self, through: type[Exception], function: Callable[..., T], *arguments: object) -> T:
        """The answer of ``function``; what ``through`` names is raised unchanged.

        :raises PluginFailed: for everything else.
        """
        try:
            return function(*arguments)
        except (through, KeyboardInterrupt):
            raise
        except BaseException as error:
            # These functions are synchronous, so a SystemExit or CancelledError is the plugin's own.
            part = getattr(function, "__name__", type(function).__name__)  # a partial has no name
            raise self.failed(part, error) from error


class GuardedAdapter:
    """An event adapter of a plugin."""

    def __init__(self, adapter: EventAdapter, guard: Guard) -> None:
        self._adapter = with_prompts(adapter)
        self._guard = guard

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """As :meth:`EventAdapter.feed`; PluginFailed where the adapter does what it must not."""
        return self._checked("feed", self._guard.call(VswaError, self._adapter.feed, raw))

    @property
    def wants_prompts(self) -> bool:
        """As :attr:`PromptAdapter.wants_prompts`, and so are the others."""
        return bool(self._guard.call(VswaError, lambda: self._adapter.wants_prompts))

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        self._guard.call(VswaError, self._adapter.prompt, token_ids, cache_salt, lora_name)

    def prepare(self) -> bool:
        return bool(self._guard.call(VswaError, self._adapter.prepare))

    def settle(self) -> list[EngineEvent]:
        return self._checked("settle", self._guard.call(VswaError, self._adapter.settle))

    def _checked(self, part: str, events: list[EngineEvent]) -> list[EngineEvent]:
        if not isinstance(events, list | tuple) or not all(isinstance(e, _ENGINE_EVENTS) for e in events):
            wrong = TypeError(f"expected a list of engine events, got {type(events).__name__}")
            raise self._guard.failed(part, wrong) from None
        return events


class GuardedRule:
    """A reuse rule of a plugin. What it answers is checked too: it decides how far loops run."""

    def __init__(self, rule: ReuseRule, guard: Guard) -> None:
        self.name = rule.name
        self.provenance = rule.provenance
        self._rule = rule
        self._guard = guard

    def boundaries(self, layout: CacheLayout, prompt_len: int) -> int:
        count = self._guard.call(ConfigError, self._rule.boundaries, layout, prompt_len)
        return self._within("boundaries", count, 0, prompt_len)

    def tokens(self, layout: CacheLayout, boundary: int, prompt_len: int) -> int:
        tokens = self._guard.call(ConfigError, self._rule.tokens, layout, boundary, prompt_len)
        return self._within("tokens", tokens, 0, max(0, prompt_len - 1))

    def first_needed(self, group: CacheGroup, boundary: int, prompt_len: int) -> int:
        first = self._guard.call(ConfigError, self._rule.first_needed, group, boundary, prompt_len)
        return self._within("first_needed", first, 0, boundary)

    def needs(self, layout: CacheLayout, prompt_len: int) -> Needs | None:
        needs = self._guard.call(ConfigError, self._rule.needs, layout, prompt_len)
        if needs is not None and not _fits(needs, len(layout.groups)):
            wrong = TypeError(f"expected Needs for {len(layout.groups)} groups or None, got {needs!r}")
            raise self._guard.failed("needs", wrong) from None
        return needs

    def _within(self, part: str, answer: int, least: int, most: int) -> int:
        if type(answer) is int and least <= answer <= most:
            return answer
        wrong = ValueError(f"expected a whole number from {least} to {most}, got {answer!r}")
        raise self._guard.failed(part, wrong) from None


class GuardedHybridRule(GuardedRule):
    """The same for a :class:`~vswa_plugin.blocks.reuse.HybridRule`."""

    def __init__(self, rule: HybridRule, guard: Guard) -> None:
        super().__init__(rule, guard)
        self._hybrid = rule

    def need(self, layout: CacheLayout, group: CacheGroup, boundary: int, prompt_len: int) -> Need:
        need = self._guard.call(ConfigError, self._hybrid.need, layout, group, boundary, prompt_len)
        if isinstance(need, Need) and all(_inside(each, prompt_len) for each in need if each is not None):
            return need
        wrong = ValueError(f"expected a Need of positions from 1 to {prompt_len}, got {need!r}")
        raise self._guard.failed("need", wrong) from None


def guarded_rule(rule: ReuseRule, guard: Guard) -> ReuseRule:
    """``rule`` of a plugin, guarded."""
    return GuardedHybridRule(rule, guard) if is_hybrid(rule) else GuardedRule(rule, guard)


def _inside(positions: object, prompt_len: int) -> bool:
    return isinstance(positions, range) and (
        not positions or (positions.step > 0 and positions[0] > 0 and positions[-1] <= prompt_len)
    )


def _fits(needs: object, groups: int) -> bool:
    """Whether ``needs`` has a number of blocks, or None, for each group."""
    return (
        isinstance(needs, Needs)
        and all(_numbers(blocks, groups) for blocks in (needs.trailing, needs.at_prompt_end))
        and all(_numbers(blocks, groups) for blocks in (needs.chunks, needs.after) if blocks != ())
        and 0 not in needs.chunks
        and None not in needs.after
    )


def _numbers(blocks: object, groups: int) -> bool:
    return (
        isinstance(blocks, tuple)
        and len(blocks) == groups
        and all(each is None or (type(each) is int and each >= 0) for each in blocks)
    )


class _Guarded:
    """What an engine and the source of a relayed worker have in common."""

    def __init__(self, guarded: Engine | EventSource, guard: Guard) -> None:
        self._guarded = guarded
        self._guard = guard
        self.event_format = guarded.event_format

    @property
    def info(self) -> EngineInfo:
        """What the plugin states. PluginFailed where it fails to, or states something else."""

        def info() -> object:
            return self._guarded.info

        stated = self._guard.call(VswaError, info)
        if not isinstance(stated, EngineInfo):
            wrong = TypeError(f"expected an EngineInfo, got {type(stated).__name__}")
            raise self._guard.failed("info", wrong) from None
        return stated

    def stop(self) -> None:
        """Never raises: what comes after it must happen all the same."""
        with suppress(PluginFailed):  # counted and logged already
            self._guard.call(PluginFailed, self._guarded.stop)


class GuardedEngine(_Guarded):
    """An engine of a plugin. Its health is its own word: where that fails, the engine has failed."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        super().__init__(engine, guard)
        self._engine = engine

    def start(self, on_events: EventSink) -> None:
        self._guard.call(VswaError, self._engine.start, on_events)

    async def generate(self, request: RequestDict) -> AsyncIterator[ChunkDict]:
        try:
            async with aclosing(cast(Any, self._engine.generate(request))) as chunks:
                async for chunk in chunks:
                    yield chunk
        except RequestError:
            raise
        except (Exception, SystemExit) as error:  # a SystemExit would end the event loop
            raise self._guard.failed("generate", error) from error

    def release(self, params: Mapping[str, Any]) -> bool:
        """As :meth:`PromptHolder.release`; False too where the engine has no such method, or fails in it."""
        release = getattr(self._engine, "release", None)
        if release is None:
            return False
        try:
            return bool(self._guard.call(RequestError, release, params))
        except PluginFailed:  # counted and logged already
            return False

    def failure(self) -> str | None:
        try:
            return self._guard.call(VswaError, self._engine.failure)
        except VswaError as error:
            return str(error)

    def stats(self) -> dict[str, float]:
        """Empty where the engine fails to say."""
        try:
            stats = self._guard.call(VswaError, self._engine.stats)
            if not isinstance(stats, dict) or not all(isinstance(v, int | float) for v in stats.values()):
                raise self._guard.failed("stats", TypeError(f"expected numbers by name, got {stats!r}"))
            if len(stats) > MAX_STATS:
                wrong = ValueError(f"expected at most {MAX_STATS} numbers, got {len(stats)}")
                raise self._guard.failed("stats", wrong)
            if (odd := next((n for n in stats if not re.fullmatch("[a-z][a-z0-9_]*", n)), None)) is not None:
                wrong = ValueError(f"expected names of lower-case letters, digits and _, got {odd!r}")
                raise self._guard.failed("stats", wrong)
        except VswaError:
            return {}
        return stats


class GuardedSource(_Guarded):
    """The events of a relayed worker, read by a plugin. One that fails to say how far it is has ended."""

    def __init__(self, source: EventSource, guard: Guard) -> None:
        super().__init__(source, guard)
        self._source = source
        self.caveats = source.caveats

    def start(self, on_events: EventSink, on_change: Callable[[], None]) -> None:
        self._guard.call(VswaError, self._source.start, on_events, on_change)

    def state(self) -> SourceState:
        try:
            state: object = self._guard.call(VswaError, self._source.state)
        except VswaError as error:
            return SourceState(ended=str(error))
        if not isinstance(state, SourceState):
            wrong = TypeError(f"expected a SourceState, got {type(state).__name__}")
            return SourceState(ended=str(self._guard.failed("state", wrong)))
        return state

    def stats(self) -> dict[str, int]:
        """Empty where the source fails to say."""
        try:
            stats = self._guard.call(VswaError, self._source.stats)
            if not isinstance(stats, dict) or not all(type(value) is int for value in stats.values()):
                raise self._guard.failed("stats", TypeError(f"expected whole numbers by name, got {stats!r}"))
        except VswaError:
            return {}
        return stats


class GuardedScorer:
    """A scorer of a plugin. One that has failed once predicts nothing any more.

    :ivar failed: what it predicted is not to be shown.
    """

    def __init__(self, scorer: Scorer, guard: Guard) -> None:
        self.name = scorer.name
        self.failed = False
        self._scorer = scorer
        self._guard = guard

    def begin(self, layout: CacheLayout) -> None:
        self._call(self._scorer.begin, layout)

    def learn(self, stored: BlocksStored, nodes: Sequence[Node]) -> None:
        self._call(self._scorer.learn, stored, nodes)

    def apply(self, event: Event) -> None:
        self._call(self._scorer.apply, event)

    def predict(self, prompt: Prompt) -> int:
        predicted = self._call(self._scorer.predict, prompt)
        if type(predicted) is int and 0 <= predicted <= len(prompt.token_ids):
            return predicted
        if not self.failed:
            wrong = ValueError(f"expected from 0 to {len(prompt.token_ids)} tokens, got {predicted!r}")
            self._guard.failed("predict", wrong)
            self.failed = True
        return 0

    def _call(self, function: Callable[..., T], *arguments: object) -> T | None:
        if self.failed:
            return None
        try:
            return self._guard.call(ConfigError, function, *arguments)
        except PluginFailed:
            self.failed = True
            return None
