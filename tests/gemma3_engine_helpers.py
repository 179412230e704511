"""A small real model, and two ways to run it: step by step in this thread, and as the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.blas import set_threads
from vswa_plugins.gemma3_cpu.model.config import load_config
from vswa_plugins.gemma3_cpu.model.model import Chunk, Gemma3Model, PagedKV, group_layers
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.serving.generation import Generation, Output
from vswa_plugins.gemma3_cpu.serving.managers import make_manager, shared_pools
from vswa_plugins.gemma3_cpu.serving.options import parse_options
from vswa_plugins.gemma3_cpu.serving.pages import PageStore
from vswa_plugins.gemma3_cpu.serving.pools import model_shape, plan_cache
from vswa_plugins.gemma3_cpu.serving.rank import PagedForward, make_budget
from vswa_plugins.gemma3_cpu.serving.request import Limits, parse_request
from vswa_plugins.gemma3_cpu.serving.scheduler import Scheduler
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint
from vswa_plugins.gemma3_cpu.weights.source import load_model

from vswa_plugin.engine.contract import EngineSettings

T = TypeVar("T")

#: Two sliding layers and a global one, a window of four blocks.
OVERRIDES = {
    "num_hidden_layers": 3,
    "sliding_window_pattern": 3,
    "sliding_window": 32,
    "max_position_embeddings": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "head_dim": 16,
}
BLOCK = 8
CONTEXT = 512
OPTIONS: dict[str, Any] = {
    "max_num_tokens": 64,
    "kv_cache_config": {"tokens_per_block": BLOCK},
    "gemma3_cpu": {"max_chunk_tokens": 24},
}
#: Nothing is computed while the engine runs: a step waits for a minute first, or for the engine's end.
STUCK = {**OPTIONS, "gemma3_cpu": {"debug_step_delay_s": 60, "max_queue_size": 2}}
#: Token ids below this are special tokens and bytes.
FIRST_TEXT_ID = 300


#: As many sliding layers as global ones: their blocks are of one size and share a pool.
EVEN_OVERRIDES = {**OVERRIDES, "num_hidden_layers": 2, "sliding_window_pattern": 2}


def make_small_model(directory: Path, overrides: Mapping[str, Any] = OVERRIDES) -> Path:
    make_checkpoint(directory, overrides=dict(overrides))
    return directory


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(FIRST_TEXT_ID, 4000, length).tolist()


def request_for(prompt: Sequence[int], max_tokens: int | None = 4, **more: Any) -> dict[str, Any]:
    """A request in Dynamo's shape, with its usual None values; ``more`` goes into its sections."""
    request: dict[str, Any] = {
        "model": "small",
        "token_ids": list(prompt),
        "stop_conditions": {"max_tokens": max_tokens, "min_tokens": None, "stop": None, "ignore_eos": None},
        "sampling_options": {"n": None, "temperature": None, "top_p": None, "seed": None},
        "output_options": {"logprobs": None},
        "eos_token_ids": [],
        "annotations": [],
        "routing": None,
    }
    for name, value in more.items():
        request[name] = {**request[name], **value} if isinstance(request.get(name), dict) else value
    return request


def tokens_of(chunks: Sequence[Mapping[str, Any]]) -> list[int]:
    return [token for chunk in chunks for token in chunk["token_ids"]]


class Reader:
    """What one client got."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.generation: Generation | None = None

    @property
    def tokens(self) -> list[int]:
        return tokens_of([o for o in self.outputs if isinstance(o, dict)])

    @property
    def finished(self) -> bool:
        last = self.outputs[-1] if self.outputs else {}
        return isinstance(last, Exception) or "finish_reason" in last

    @property
    def last(self) -> dict[str, Any]:
        assert isinstance(self.outputs[-1], dict)
        return self.outputs[-1]

    @property
    def cached_tokens(self) -> int:
        return int(self.last["completion_usage"]["prompt_tokens_details"]["cached_tokens"])


class Bench:
    """A scheduler over the real model and cache, stepped by the test.

    ``log`` has, in order, ``("compute", chunks)``, ``("events", events)`` and ``("output", reader)``.
    """

    def __init__(self, model: Gemma3Model, options: dict[str, Any]) -> None:
        parsed = parse_options(options)
        plan = plan_cache(parsed, model_shape(model.config))
        self.store = PageStore(model.config, plan, shared_pools(plan, parsed.reuse_rule))
        self.manager = make_manager(plan, parsed, self.store.move)
        self.log: list[tuple[str, Any]] = []
        self.logits: list[np.ndarray[Any, Any]] = []
        self.before_forward: Callable[[list[Chunk]], None] = lambda chunks: None
        self._forward = PagedForward(model, plan, self.store)
        self.scheduler = Scheduler(self._compute, self.manager, make_budget(parsed), self._publish)
        self._limits = Limits(plan.context_length, plan.context_length, model.config.vocab_size)
        self.readers: list[Reader] = []

    def add(self, request: dict[str, Any]) -> Reader:
        reader = Reader()

        def emit(output: Output) -> None:
            reader.outputs.append(output)
            self.log.append(("output", reader))

        parsed = parse_request(request, self._limits)
        self.manager.check_fits(len(parsed.prompt), parsed.max_new_tokens)
        reader.generation = Generation(parsed, emit)
        self.scheduler.add(reader.generation)
        self.readers.append(reader)
        return reader

    def step(self) -> None:
        self.scheduler.step()
        self.manager.check()

    def run(self, *requests: dict[str, Any]) -> list[Reader]:
        """Run these to their end; verify the cache after every step."""
        readers = [self.add(request) for request in requests]
        while self.scheduler.has_work:
            self.step()
        return readers

    def used(self) -> dict[str, float]:
        """Blocks that running requests hold, by gauge name."""
        return {name: value for name, value in self.manager.stats().items() if name.startswith("blocks_used")}

    def _compute(self, chunks: list[Chunk], /) -> np.ndarray[Any, Any]:
        self.log.append(("compute", [(len(c.token_ids), c.start, c.want_logits) for c in chunks]))
        self.before_forward(chunks)
        logits = self._forward(chunks)
        self.logits.extend(logits.copy())
        return logits

    def _publish(self, events: Sequence[Any]) -> None:
        self.log.append(("events", list(events)))


class Cold:
    """The model without any scheduler or cache: one sequence, computed whole each time."""

    def __init__(self, model: Gemma3Model) -> None:
        self._model = model
        self._known: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        key = tuple(tokens)
        if key not in self._known:
            blocks = -(-len(key) // BLOCK)
            layers = group_layers(self._model.config)
            kv = PagedKV(self._model.config, layers, [blocks] * len(layers), BLOCK)
            chunk = Chunk(np.array(key), 0, [list(range(blocks))] * len(layers), True)
            self._known[key] = self._model.forward([chunk], kv)[0]
        return self._known[key]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]


def load_small_model(directory: Path) -> Gemma3Model:
    set_threads(1)
    return load_model(directory, load_config(directory))


def settings_for(
    directory: Path, options: dict[str, Any] | None = None, mode: str = "agg", ranks: int = 1
) -> EngineSettings:
    return EngineSettings(
        "gemma3_cpu",
        mode,
        str(directory),
        "small",
        OPTIONS if options is None else options,
        data_parallel_size=ranks,
    )


@asynccontextmanager
async def running_engine(
    directory: Path,
    options: dict[str, Any] | None = None,
    on_events: Callable[..., None] = lambda rank, events: None,
    ranks: int = 1,
) -> AsyncIterator[Gemma3CpuEngine]:
    engine = Gemma3CpuEngine(settings_for(directory, options, ranks=ranks))
    await asyncio.to_thread(engine.start, on_events)
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


async def collect(engine: Gemma3CpuEngine, request: dict[str, Any]) -> list[dict[str, Any]]:
    return [chunk async for chunk in engine.generate(request)]


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(Path(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(small: Path) -> Gemma3Model:
    return load_small_model(small)


@pytest.fixture(scope="module")
def cold(model: Gemma3Model) -> Cold:
    return Cold(model)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Gemma3Model:
    return load_small_model(make_small_model(Path(tmp_path_factory.mktemp("even")), EVEN_OVERRIDES))


@pytest.fixture(scope="module")
def even_cold(even: Gemma3Model) -> Cold:
    return Cold(even)


@pytest.fixture
def bench(model: Gemma3Model) -> Bench:
    return Bench(model, OPTIONS)
