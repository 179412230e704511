"""The engine plugin over a real vLLM: the suite for engines, and what vLLM's own names and functions say."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm import package
from vswa_plugins.vllm.engine import VllmEngine
from vswa_plugins.vllm.fields import GUIDED, NOT_SET, SAMPLING
from vswa_plugins.vllm.grouping import Layer, cache_groups
from vswa_plugins.vllm.options import _ONLY, parse_options

from tests.plugins.vllm.live.conftest import OPTIONS
from vswa_plugin.engine.contract import ChunkDict, Engine, EngineInfo, EngineSettings, EventSink, RequestDict
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.testing.conformance import EngineConformance

pytestmark = [
    pytest.mark.timeout(600),
    # vLLM leaves a context of ZeroMQ to the garbage collector.
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]

#: Tests of the suite that stop their engine, or need one that has seen nothing.
ALONE = (
    "test_stopping_ends_the_requests_under_way",
    "test_a_stopped_engine_takes_no_requests",
    "test_no_events_come_after_the_stop",
    "test_its_events_say_what_it_holds_of_the_prompt",
)
WHOLE_PROMPT = [7 + 11 * n % 4000 for n in range(700)]


def settings_for(model: Path, **options: Any) -> EngineSettings:
    return EngineSettings("vllm", "agg", str(model), "gemma", {**OPTIONS, **options}, "args.yaml")


class Shared:
    """One engine for several lives: each start forgets its cache, no stop ends it.

    vLLM belongs to one event loop, a life of the suite has one of its own: requests go from one to the other.
    """

    event_format = "vllm"

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self._sink: EventSink = lambda *_: None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        engine.start(lambda rank, events: self._sink(rank, events))

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def start(self, on_events: EventSink) -> None:
        assert self.engine._running is not None
        reset = self.engine._running.llm.reset_prefix_cache()
        assert asyncio.run_coroutine_threadsafe(reset, self._loop).result(60)
        self._sink = on_events

    def stop(self) -> None:
        self._sink = lambda *_: None

    def end(self) -> None:
        self.engine.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        chunks = self.engine.generate(request)
        try:
            while True:
                step = asyncio.run_coroutine_threadsafe(anext(chunks, None), self._loop)
                chunk = await asyncio.wrap_future(step)
                if chunk is None:
                    return
                yield chunk
        finally:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(chunks.aclose(), self._loop))

    def failure(self) -> str | None:
        return self.engine.failure()

    def stats(self) -> dict[str, float]:
        return self.engine.stats()

    def ask(self, prompt: Sequence[int], max_tokens: int = 4, **more: Any) -> list[ChunkDict]:
        stop = {"max_tokens": max_tokens, "ignore_eos": True}
        request = {"token_ids": list(prompt), "stop_conditions": stop, **more}

        async def collect() -> list[ChunkDict]:
            async with aclosing(self.engine.generate(request)) as chunks:
                return [chunk async for chunk in chunks]

        return asyncio.run_coroutine_threadsafe(collect(), self._loop).result(120)

    def direct(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """vLLM's own tokens, without the plugin."""
        api = package.load()
        assert self.engine._running is not None
        llm = self.engine._running.llm
        params = api.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)

        async def collect() -> list[int]:
            tokens: list[int] = []
            async for output in llm.generate({"prompt_token_ids": list(prompt)}, params, "direct"):
                tokens = list(output.outputs[0].token_ids)
            return tokens

        return asyncio.run_coroutine_threadsafe(collect(), self._loop).result(120)


@pytest.fixture(scope="module")
def shared(model_dir: Path) -> Iterator[Shared]:
    made = Shared(VllmEngine(settings_for(model_dir)))
    yield made
    made.end()


class TestSharedEngine(EngineConformance):
    """What needs no engine of its own."""

    timeout_s = 120.0

    @pytest.fixture
    def engine(self, shared: Shared) -> Engine:
        return shared


class TestEngineAlone(EngineConformance):
    """The rest."""

    timeout_s = 180.0

    @pytest.fixture
    def engine(self, model_dir: Path) -> Engine:
        return VllmEngine(settings_for(model_dir))


for _name in dir(EngineConformance):
    if _name.startswith("test_"):
        setattr(TestSharedEngine if _name in ALONE else TestEngineAlone, _name, None)


def tokens_of(chunks: list[ChunkDict]) -> list[int]:
    return [token for chunk in chunks for token in chunk["token_ids"]]


# -- requests --------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_vllm_itself(shared: Shared) -> None:
    for length in (5, 300, 700):
        prompt = WHOLE_PROMPT[:length]

        assert shared.direct(prompt, 24) == tokens_of(shared.ask(prompt, 24))


def test_a_request_that_reads_no_cache_has_none_and_fills_it(shared: Shared) -> None:
    shared.start(lambda *_: None)
    prompts = (
        {"extra_args": {"skip_reading_prefix_cache": True}},
        {},
        {"extra_args": {"skip_reading_prefix_cache": True}},
    )
    cached = [
        shared.ask(WHOLE_PROMPT, 2, **more)[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
        for more in prompts
    ]

    assert [0, 672, 0] == cached


def test_salts_keep_equal_prompts_apart(shared: Shared) -> None:
    shared.start(lambda *_: None)
    cached = [
        shared.ask(WHOLE_PROMPT, 2, routing=routing)[-1]["completion_usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        for routing in ({}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"})
    ]

    assert [0, 0, 672, 0] == cached


def test_minimum_and_stop_tokens_are_kept(shared: Shared) -> None:
    drawn = tokens_of(shared.ask(WHOLE_PROMPT, 8))
    stop = next(token for token in drawn[2:] if token not in drawn[:2])
    request = {"stop_conditions": {"max_tokens": 8, "stop_token_ids": [stop], "min_tokens": 1}}
    chunks = _asked(shared, request)

    assert drawn[: drawn.index(stop) + 1] == tokens_of(chunks)
    assert ("stop", stop) == (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"])


def _asked(shared: Shared, more: dict[str, Any]) -> list[ChunkDict]:
    async def collect() -> list[ChunkDict]:
        async with aclosing(shared.engine.generate({"token_ids": WHOLE_PROMPT, **more})) as chunks:
            return [chunk async for chunk in chunks]

    return asyncio.run_coroutine_threadsafe(collect(), shared._loop).result(120)


def test_log_probabilities_are_of_the_drawn_token_and_as_many_as_wanted(shared: Shared) -> None:
    chunks = shared.ask(WHOLE_PROMPT, 3, output_options={"logprobs": 4})

    for chunk in chunks:
        (own,), (top,) = chunk["log_probs"], chunk["top_logprobs"]
        assert [1, 2, 3, 4] == [each["rank"] for each in top]
        assert (chunk["token_ids"][0], own) == (top[0]["token_id"], top[0]["logprob"]), (
            "greedy draws the likeliest"
        )


def test_an_answer_can_be_guided(shared: Shared, model_dir: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    guided = {"sampling_options": {"guided_decoding": {"choice": ["left", "right"]}}, "eos_token_ids": [1]}
    chunks = _asked(shared, {**guided, "stop_conditions": {"max_tokens": 20}})

    assert tokenizer.decode([token for token in tokens_of(chunks) if token != 1]) in ("left", "right")


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling_options": {"temperature": 3.0}},
        {"sampling_options": {"top_p": 2.0}},
        {"output_options": {"logprobs": 21}},
        {"sampling_options": {"guided_decoding": {"regex": "(("}}},
    ],
    ids=str,
)
def test_what_vllm_refuses_is_an_invalid_request(shared: Shared, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="vLLM refuses the request"):
        shared.ask(WHOLE_PROMPT, **fields)
    assert shared.failure() is None


# -- what vLLM's own code says ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def api() -> package.Api:
    return package.load()


def test_the_methods_that_we_call_take_what_we_give(api: package.Api) -> None:
    given = {"prompt", "sampling_params", "request_id", "lora_request", "priority", "data_parallel_rank"}

    assert given <= set(inspect.signature(api.AsyncLLM.generate).parameters)
    assert {"request_id"} <= set(inspect.signature(api.AsyncLLM.abort).parameters)
    assert isinstance(inspect.getattr_static(api.AsyncLLM, "errored"), property)
    assert isinstance(inspect.getattr_static(api.AsyncLLM, "dead_error"), property)


def test_every_sampling_parameter_is_set_or_has_a_reason(api: package.Api) -> None:
    """A parameter of a newer release fails here."""
    ours = {*SAMPLING, "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs", "detokenize"}
    ours |= {"output_kind", "structured_outputs", "skip_reading_prefix_cache"}
    theirs = {name for name in api.SamplingParams.__struct_fields__ if not name.startswith("_")}

    assert theirs - ours - NOT_SET.keys() == set()
    assert ours <= theirs


def test_the_ways_to_guide_are_vllms(api: package.Api) -> None:
    assert {*GUIDED, "whitespace_pattern"} <= {
        field.name for field in dataclasses.fields(api.StructuredOutputsParams)
    }


def test_options_read_from_the_source_are_those_of_the_class(api: package.Api) -> None:
    theirs = {
        field.name for field in dataclasses.fields(api.AsyncEngineArgs) if not field.name.startswith("_")
    }

    assert theirs == package.option_names()
    assert _ONLY.keys() <= theirs
    assert {field.name for field in dataclasses.fields(api.KVEventsConfig)} >= parse_options(
        {}, "x", theirs
    ).events.keys()


S, G, STATE = Layer(128), Layer(None), Layer(None, 100, recurrent=True)
#: Kinds of layers with their numbers; a size is that of a head, or bytes of a state.
LAYERS: list[dict[Layer, int]] = [
    *(
        {S: s, G: g}
        for s, g in [(5, 1), (22, 4), (40, 8), (52, 10), (12, 12), (12, 13), (3, 2), (7, 3), (1, 9)]
    ),
    *({G: 4}, {S: 4}),
    # Heads of several sizes: blocks of twice or thrice the tokens, or filled up where they do not divide.
    *({Layer(128, 1): 20, Layer(None, 2): 4}, {Layer(128, 4): 50, Layer(None, 2): 10}),
    *({Layer(128, 3): 5, Layer(None, 1): 5, Layer(512, 2): 5}, {Layer(None, 1): 3, Layer(None, 2): 3}),
    *({STATE: 24, G: 8}, {STATE: 20, Layer(None, 3): 7}, {STATE: 6, S: 3, G: 3}),
]


@pytest.mark.parametrize("counts", LAYERS, ids=str)
def test_the_grouping_is_vllms(counts: dict[Layer, int]) -> None:
    from vllm.v1.core import kv_cache_utils

    layers = [layer for layer, count in counts.items() for _ in range(count)]
    if len(layers) % 7:
        layers = [layers[n * 7 % len(layers)] for n in range(len(layers))]
    groups = cache_groups(layers, 16)
    made = kv_cache_utils.get_kv_cache_groups(_config(), _specs(layers))

    assert [_shown(group.kv_cache_spec) for group in made] == [
        (group.kind == "recurrent", group.window_size, group.block_size) for group in groups
    ]


def _specs(layers: list[Layer]) -> dict[str, Any]:
    """What vLLM makes of such layers once it has chosen the tokens of a block of attention."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

    token = max(layer.size for layer in layers if not layer.recurrent)
    state = max((layer.size for layer in layers if layer.recurrent), default=0)
    tokens = 16 * max(1, -(-state // (16 * token)))
    specs: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        shape = {"block_size": tokens, "num_kv_heads": 1, "head_size": layer.size, "dtype": torch.int8}
        if layer.recurrent:
            spec: Any = MambaSpec(
                block_size=tokens,
                shapes=((layer.size,),),
                dtypes=(torch.int8,),
                page_size_padded=2 * tokens * token,
            )
        elif layer.window is None:
            spec = FullAttentionSpec(**shape)
        else:
            spec = SlidingWindowSpec(**shape, sliding_window=layer.window)
        specs[f"model.layers.{number}"] = spec
    return specs


def _shown(spec: Any) -> tuple[bool, int | None, int]:
    one = next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))
    return type(one).__name__ == "MambaSpec", getattr(one, "sliding_window", None), spec.block_size


def _config() -> Any:
    from vllm.config import VllmConfig

    config = VllmConfig()
    config.scheduler_config.disable_hybrid_kv_cache_manager = False
    # In memory; newer releases decide it before they group.
    config.cache_config.kv_cache_layout = "LBNHC"
    return config
