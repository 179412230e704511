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

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import Needs, ReuseRule
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
)
from vswa_plugin.engine.predicted import Prompt, Scorer
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
        self._feed = adapter.feed
        self._guard = guard

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """As :meth:`EventAdapter.feed`; PluginFailed where the adapter does what it must not."""
        events = self._guard.call(VswaError, self._feed, raw)
        if not isinstance(events, list | tuple) or not all(isinstance(e, _ENGINE_EVENTS) for e in events):
            wrong = TypeError(f"expected a list of engine events, got {type(events).__name__}")
            raise self._guard.failed("feed", wrong) from None
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


def _fits(needs: object, groups: int) -> bool:
    """Whether ``needs`` has a number of blocks, or None, for each group."""
    return isinstance(needs, Needs) and all(
        isinstance(blocks, tuple)
        and len(blocks) == groups
        and all(each is None or (type(each) is int and each >= 0) for each in blocks)
        for blocks in (needs.trailing, needs.at_prompt_end)
    )


class GuardedEngine:
    """An engine of a plugin. Its health is its own word: where that fails, the engine has failed."""

    def __init__(self, engine: Engine, guard: Guard) -> None:
        self._engine = engine
        self._guard = guard
        self.event_format = engine.event_format

    @property
    def info(self) -> EngineInfo:
        """What the engine states. PluginFailed where it fails to, or states something else."""

        def info() -> object:
            return self._engine.info

        stated = self._guard.call(VswaError, info)
        if not isinstance(stated, EngineInfo):
            wrong = TypeError(f"expected an EngineInfo, got {type(stated).__name__}")
            raise self._guard.failed("info", wrong) from None
        return stated

    def start(self, on_events: EventSink) -> None:
        self._guard.call(VswaError, self._engine.start, on_events)

    def stop(self) -> None:
        """Never raises: what comes after it must happen all the same."""
        with suppress(PluginFailed):  # counted and logged already
            self._guard.call(PluginFailed, self._engine.stop)

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
