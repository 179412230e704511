"""An engine that repeats the last token of a prompt, with a cache that evicts and announces its blocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.engine import (
    SHARED,
    BlocksRemoved,
    BlocksStored,
    ChunkDict,
    Engine,
    EngineBlock,
    EngineEvent,
    EngineInfo,
    EngineSettings,
    EventAdapter,
    EventSink,
    Fields,
    FieldUses,
    RawEvent,
    RequestDict,
    Section,
    dp_rank,
    ignored,
    refused,
    token_ids,
    used,
)
from vswa_plugin.errors import ConfigError, InvalidRequest, ProtocolError, Unavailable
from vswa_plugin.hookspecs import hookimpl

NAME = "example"
BLOCK_SIZE, CONTEXT = 16, 4096
#: One cache group with global attention. Add a group for each sliding window: CacheGroup(1, 512, BLOCK_SIZE).
GROUPS = (CacheGroup(0, None, BLOCK_SIZE),)
_REPEATS = ignored("a token is repeated, whatever the sampling")
#: What Dynamo's frontend sends with any request, and what makes no difference here.
_IGNORED = (
    "eos_token_ids",
    "stop_conditions.ignore_eos",
    "stop_conditions.min_tokens",
    "stop_conditions.stop_token_ids",
    "stop_conditions.stop_token_ids_hidden",
    "stop_conditions.stop_token_ids_visible",
    "sampling_options.temperature",
    "sampling_options.top_p",
    "sampling_options.top_k",
    "sampling_options.min_p",
    "sampling_options.seed",
    "sampling_options.presence_penalty",
    "sampling_options.frequency_penalty",
    "sampling_options.repetition_penalty",
)
#: What becomes of each field of a request. A field that is in no row is refused or reported in the log.
FIELDS = FieldUses(
    {
        **SHARED,
        "token_ids": used("its last token is repeated"),
        "stop_conditions.max_tokens": used("length of the answer, 1 where none is given"),
        **dict.fromkeys(_IGNORED, _REPEATS),
        "output_options.logprobs": refused("none: this engine computes no probabilities"),
        "routing.cache_salt": refused("none: the cache of this engine keeps no tenants apart"),
        "routing.dp_rank": used("there is one, 0"),
        "prefill_result.disaggregated_params": refused("none: this engine serves both phases itself"),
    }
)


class ExampleCache:
    """Blocks by the prompt up to their end; the one that was used longest ago goes first."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._held: dict[tuple[int, ...], None] = {}

    def take(self, prompt: Sequence[int]) -> tuple[int, list[RawEvent]]:
        """Reused tokens of the prompt, whose full blocks are held from now on, and the events."""
        ends = range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
        names = [tuple(prompt[:end]) for end in ends][: self._blocks]
        known = next((at for at, name in enumerate(names) if name not in self._held), len(names))
        events: list[RawEvent] = [{"store": list(name)} for name in names[known:]]
        # The end of a prompt is the first to go, so that no block is held without those before it.
        for name in reversed(names):
            self._held.pop(name, None)
            self._held[name] = None
        while len(self._held) > self._blocks:
            oldest = next(iter(self._held))
            del self._held[oldest]
            events.append({"remove": list(oldest)})
        # At least one token is computed: its logits give the first token of the answer.
        return min(known, (len(prompt) - 1) // BLOCK_SIZE) * BLOCK_SIZE, events


class ExampleEngine:
    """Replace what :meth:`start` loads and what :meth:`generate` computes; keep the order of the steps."""

    event_format = NAME

    def __init__(self, settings: EngineSettings) -> None:
        if settings.mode != "agg":
            raise ConfigError(f"--mode: expected agg, which {NAME} serves, got {settings.mode}")
        options = Section({**settings.options}, settings.options_source)
        options.check({"blocks"})
        self._cache = ExampleCache(options.integer("blocks", 256, low=1))
        layout = CacheLayout(GROUPS, "vllm", settings.served_model_name)
        self.info = EngineInfo(
            layout, CONTEXT, 8, 1024, total_kv_blocks=options.integer("blocks", 256, low=1)
        )
        self._on_events: EventSink = lambda rank, events: None
        self._running = 0
        self._stopped = False

    def start(self, on_events: EventSink) -> None:
        """Load the model here."""
        self._on_events = on_events

    def stop(self) -> None:
        self._stopped = True

    def failure(self) -> str | None:
        return None

    def stats(self) -> dict[str, float]:
        return {"running": float(self._running)}

    async def generate(self, request: RequestDict) -> AsyncIterator[ChunkDict]:
        FIELDS.check(request)
        fields = Fields(request)
        prompt = token_ids(fields, CONTEXT)
        dp_rank(fields.object("routing"), 1, f"{NAME} has one rank")
        wanted = fields.object("stop_conditions").integer("max_tokens", 1, low=1)
        if any(not 0 <= token < 1 << 32 for token in prompt):
            raise InvalidRequest("token_ids: expected numbers from 0 to 2**32 - 1")
        self._check_running()
        self._running += 1
        try:
            cached, events = self._cache.take(prompt)
            if events:
                self._on_events(0, events)
            count = min(wanted, CONTEXT - len(prompt))
            for _ in range(count - 1):
                yield {"token_ids": [prompt[-1]], "index": 0}
                await asyncio.sleep(0)  # compute the next token here, in a thread
                self._check_running()
            yield {
                "token_ids": [prompt[-1]],
                "index": 0,
                "finish_reason": "length",
                "completion_usage": {
                    "prompt_tokens": len(prompt),
                    "completion_tokens": count,
                    "total_tokens": len(prompt) + count,
                    "prompt_tokens_details": {"cached_tokens": cached},
                },
            }
        finally:
            self._running -= 1

    def _check_running(self) -> None:
        if self._stopped:
            raise Unavailable("the engine stops")


class ExampleAdapter:
    """Reads the events of :class:`ExampleCache`; each names a block by all tokens up to its end."""

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        (kind, tokens) = self._checked(raw)
        name = _named(tokens)
        if kind == "remove":
            return [BlocksRemoved(0, (name,))]
        parent = _named(tokens[:-BLOCK_SIZE]) if len(tokens) > BLOCK_SIZE else None
        return [BlocksStored(0, parent, (EngineBlock(name, tuple(tokens[-BLOCK_SIZE:])),))]

    def _checked(self, raw: Any) -> tuple[str, list[int]]:
        if not isinstance(raw, dict) or len(raw) != 1 or not raw.keys() <= {"store", "remove"}:
            raise ProtocolError("expected an object with store or remove, got something else")
        ((kind, tokens),) = raw.items()
        right = isinstance(tokens, list) and all(
            type(token) is int and 0 <= token < 1 << 32 for token in tokens
        )
        if not right or not tokens or len(tokens) % BLOCK_SIZE:
            raise ProtocolError(f"{kind}: expected token ids of whole blocks of {BLOCK_SIZE}")
        return kind, tokens


def _named(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))


@hookimpl
def vswa_engine_names() -> list[str]:
    return [NAME]


@hookimpl
def vswa_engine(settings: EngineSettings) -> Engine | None:
    return ExampleEngine(settings) if settings.engine == NAME else None


@hookimpl
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    return ExampleAdapter() if event_format == NAME else None
