"""A stand-in engine of a few lines, in all three modes, for tests of what stands around engines.

It repeats the prompt's last token, and refuses what real engines refuse. As a plugin:
``--plugin vswa_plugin.testing.engine --engine standin``. Options:

* ``step_s``: the seconds that each token takes (0).
* ``cache``: whether it keeps blocks, counts cached tokens and announces KV events (false). Its cache never
  evicts: a test that needs eviction scripts the events with :class:`TrtllmScript`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import (
    MODES,
    ChunkDict,
    EngineInfo,
    EngineSettings,
    EventSink,
    RawEvent,
    RequestDict,
)
from vswa_plugin.engine.requests import Fields, dp_rank, prefill_result, token_ids
from vswa_plugin.engine.uses import SHARED, FieldUses, ignored, used
from vswa_plugin.errors import ConfigError, InvalidRequest, Unavailable, unknown_choice
from vswa_plugin.hookspecs import hookimpl

__all__ = [
    "GROUPS",
    "StandinEngine",
    "TrtllmScript",
    "standin_settings",
]

NAME = "standin"
BLOCK_SIZE, WINDOW, CONTEXT = 32, 512, 8192
#: The cache groups of the stand-in engine: one with a sliding window, one global.
GROUPS = (CacheGroup(0, WINDOW, BLOCK_SIZE), CacheGroup(1, None, BLOCK_SIZE))
_REPEATS = ignored("a token is repeated, whatever the sampling")
FIELDS = FieldUses(
    {
        **SHARED,
        "token_ids": used("its last token is repeated"),
        "eos_token_ids": _REPEATS,
        "stop_conditions.max_tokens": used("length of the answer, 1 where none is given"),
        **{
            f"stop_conditions.{name}": _REPEATS
            for name in (
                "min_tokens",
                "stop_token_ids",
                "stop_token_ids_visible",
                "stop_token_ids_hidden",
                "ignore_eos",
            )
        },
        **{
            f"sampling_options.{name}": _REPEATS
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "seed",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
        },
        "routing.dp_rank": used("there is one, 0"),
        "routing.cache_salt": ignored("its cache has no salts"),
        "prefill_result.disaggregated_params": used("the token that a decode worker repeats"),
        "prefill_result.prompt_tokens_details": ignored("a decode worker counts its own cache"),
    }
)


def standin_settings(mode: str = "agg", **options: Any) -> EngineSettings:
    """Settings with which :class:`StandinEngine` starts."""
    return EngineSettings(engine=NAME, mode=mode, model_path="/m", served_model_name="m", options=options)


class TrtllmScript:
    """Writes KV events in the format ``trtllm`` (cache manager V2), with ids that count up."""

    def __init__(self) -> None:
        self._next_id = 0

    def created(self, group: CacheGroup, context_length: int = CONTEXT) -> RawEvent:
        """A group's first event; a global group's window is the context length there."""
        data = {"type": "created", "num_blocks_per_cache_level": [256]}
        return self._event(group, data, window_size=group.window_size or context_length)

    def stored(self, group: CacheGroup, prompt: Sequence[int], first_block: int = 0) -> RawEvent:
        """The full blocks of a prompt from ``first_block`` on, named by their sequence hashes."""
        size = group.block_size
        names = sequence_hashes_of_tokens(prompt, size)
        blocks = [_block(names[n], prompt[n * size : (n + 1) * size]) for n in range(first_block, len(names))]
        parent = names[first_block - 1] if first_block else None
        return self._event(group, {"type": "stored", "parent_hash": parent, "blocks": blocks})

    def removed(self, group: CacheGroup, prompt: Sequence[int], first_block: int = 0) -> RawEvent:
        """The full blocks of a prompt from ``first_block`` on are gone."""
        names = sequence_hashes_of_tokens(prompt, group.block_size)[first_block:]
        return self._event(group, {"type": "removed", "block_hashes": list(names)})

    def _event(self, group: CacheGroup, data: dict[str, Any], **more: Any) -> RawEvent:
        event_id, self._next_id = self._next_id, self._next_id + 1
        return {"event_id": event_id, "data": data, "layer_group_id": group.group_id, **more}


def _block(name: int, tokens: Sequence[int]) -> dict[str, Any]:
    unique = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    block = {"type": "stored_block", "block_hash": name, "tokens": unique}
    return {**block, "cache_level": 0, "priority": 35, "mm_keys": []}


class _Cache:
    """Blocks of all prompts so far, the same in both groups."""

    def __init__(self) -> None:
        self._script = TrtllmScript()
        self._held: set[int] = set()

    def created(self) -> list[RawEvent]:
        return [self._script.created(group) for group in GROUPS]

    def take(self, prompt: Sequence[int]) -> tuple[int, list[RawEvent]]:
        """The tokens that were there already, at most all but the last; and the events of the others."""
        names = sequence_hashes_of_tokens(prompt, BLOCK_SIZE)
        known = next((n for n, name in enumerate(names) if name not in self._held), len(names))
        self._held.update(names)
        events = [self._script.stored(group, prompt, known) for group in GROUPS] if known < len(names) else []
        return min(known * BLOCK_SIZE, len(prompt) - 1), events


class StandinEngine:
    """Has the shape of ``vswa_plugin.engine.Engine``.

    :raises ConfigError: an unknown mode or option.
    """

    event_format = "trtllm"

    def __init__(self, settings: EngineSettings) -> None:
        if settings.mode not in MODES:
            raise ConfigError(unknown_choice("mode", settings.mode, MODES))
        if unknown := settings.options.keys() - {"step_s", "cache"}:
            raise ConfigError(f"unknown option {sorted(unknown)} in {settings.options_source}")
        self._mode = settings.mode
        self._step_s = settings.options.get("step_s", 0)
        self._cache = _Cache() if settings.options.get("cache") else None
        self._on_events: EventSink = lambda rank, events: None
        self._stopped = False
        self._running = 0
        layout = CacheLayout(GROUPS, "trtllm_v2", settings.served_model_name)
        self.info = EngineInfo(layout, CONTEXT, 8, 1024, 256)

    def start(self, on_events: EventSink) -> None:
        """Announce the cache groups, where there is a cache."""
        self._on_events = on_events
        if self._cache is not None:
            on_events(0, self._cache.created())

    def stop(self) -> None:
        """Requests under way end with their next token."""
        self._stopped = True

    def failure(self) -> str | None:
        """It never fails."""
        return None

    def stats(self) -> dict[str, float]:
        """``running``: requests under way."""
        return {"running": float(self._running)}

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        """Repeat the prompt's last token; a decode worker repeats what its prefill worker handed over.

        :raises InvalidRequest: it can never be served.
        :raises Unavailable: the engine stops.
        """
        FIELDS.check(request)
        fields = Fields(request)
        prompt = token_ids(fields, CONTEXT)
        dp_rank(fields.object("routing"), 1, "this engine has one rank")
        token = self._token(fields, prompt)
        count = fields.object("stop_conditions").integer("max_tokens", 1, low=1)
        self._check_running()
        self._running += 1
        try:
            cached = self._take(prompt)
            for chunk in self._chunks(token, len(prompt), count, cached):
                yield chunk
                if "finish_reason" in chunk:
                    return
                await asyncio.sleep(self._step_s)
                self._check_running()
        finally:
            self._running -= 1

    def _token(self, fields: Fields, prompt: Sequence[int]) -> int:
        handed_over = prefill_result(fields, self._mode)
        if self._mode != "decode":
            return prompt[-1]
        if not handed_over.data:
            raise InvalidRequest("prefill_result: expected what a prefill worker has answered, got none")
        token = handed_over.object("disaggregated_params").integer("token", None, low=0)
        if token is None:
            raise InvalidRequest("prefill_result.disaggregated_params.token: expected a token, got none")
        return token

    def _take(self, prompt: Sequence[int]) -> int:
        if self._cache is None:
            return 0
        cached, events = self._cache.take(prompt)
        if events:
            self._on_events(0, events)
        return cached

    def _chunks(self, token: int, prompt_tokens: int, count: int, cached: int) -> Iterator[ChunkDict]:
        count = 1 if self._mode == "prefill" else min(count, CONTEXT - prompt_tokens)
        for _ in range(count - 1):
            yield {"token_ids": [token], "index": 0}
        last: ChunkDict = {"token_ids": [token], "index": 0, "finish_reason": "length"}
        last["completion_usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": count,
            "total_tokens": prompt_tokens + count,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        if self._mode == "prefill":
            last["disaggregated_params"] = {"token": token}
        yield last

    def _check_running(self) -> None:
        if self._stopped:
            raise Unavailable("the engine stops")


@hookimpl
def vswa_engine_names() -> list[str]:
    """The name that ``--engine`` takes."""
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> StandinEngine | None:
    """The stand-in, where it is asked for by its name."""
    return StandinEngine(settings) if settings.engine == NAME else None
