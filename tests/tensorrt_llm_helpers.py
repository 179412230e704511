"""Engines over the stand-in of TensorRT-LLM, a router that listens to their events, and prompts for both."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine
from vswa_plugins.trtllm_events import TrtllmEventAdapter

from tests.tensorrt_llm_package import BS, CONTEXT, LLM, install
from vswa_plugin.engine.contract import ChunkDict, EngineInfo, EngineSettings, RawEvent
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.nodes import NodeTable
from vswa_plugin.publishing.residency import Residency, Restart
from vswa_plugin.wire.events import Rank, layout_event

WINDOW = 8
#: Six layers as in Gemma 3: five sliding ones, then a global one.
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 5000,
}
OPTIONS: dict[str, Any] = {
    "max_num_tokens": 200,
    "kv_cache_config": {"max_attention_window": [WINDOW] * 5 + [CONTEXT], "tokens_per_block": BS},
}
NIXL = {"cache_transceiver_config": {"backend": "NIXL", "transceiver_runtime": "PYTHON"}}

Installer = Callable[[str], None]


@pytest.fixture
def install_standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Installs the stand-in as a release of that version, for the test."""

    def install_version(version: str) -> None:
        folder = tmp_path / f"site-{version}"
        install(folder, version)
        monkeypatch.syspath_prepend(str(folder))

    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(LLM, "made", [])
    yield install_version
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture
def standin(install_standin: Installer) -> None:
    """The stand-in as the release that Dynamo 1.6.1 names."""
    install_standin("1.3.0rc29")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with all that is looked at before the start."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")
    return directory


def settings_for(
    model: Path, options: dict[str, Any] | None = None, mode: str = "agg", source: str = "args.yaml"
) -> EngineSettings:
    given = OPTIONS if options is None else options
    return EngineSettings("tensorrt_llm", mode, str(model), "gemma", given, source)


class Started:
    """An engine that runs, and what it told.

    :ivar events: of each rank, in the order in which they came; written by the engine's thread.
    """

    def __init__(self, model: Path, options: dict[str, Any] | None = None, mode: str = "agg") -> None:
        self.engine = TensorRtLlmEngine(settings_for(model, options, mode))
        self.events: dict[int, list[RawEvent]] = {}
        self._arrived = threading.Condition()
        self.engine.start(self._take)
        self.llm = LLM.made[-1]

    def _take(self, rank: int, events: Sequence[RawEvent]) -> None:
        with self._arrived:
            self.events.setdefault(rank, []).extend(events)
            self._arrived.notify_all()

    def settled(self) -> dict[int, list[RawEvent]]:
        """All events, once what the engine has emitted so far has arrived."""
        with self._arrived:
            arrived = self._arrived.wait_for(
                lambda: sum(map(len, self.events.values())) >= self.llm.emitted, timeout=10
            )
        assert arrived
        return self.events

    def ask(self, request: dict[str, Any]) -> list[ChunkDict]:
        return asyncio.run(self._ask(request))

    async def _ask(self, request: dict[str, Any]) -> list[ChunkDict]:
        return [chunk async for chunk in self.engine.generate(request)]


def asked(prompt: list[int], max_tokens: int = 1, **more: Any) -> dict[str, Any]:
    return {"token_ids": prompt, "stop_conditions": {"max_tokens": max_tokens}, **more}


def tokens_of(chunks: list[ChunkDict]) -> list[int]:
    return list(itertools.chain.from_iterable(chunk["token_ids"] for chunk in chunks))


def cached_of(chunks: list[ChunkDict]) -> int:
    cached: int = chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


# -- a router --------------------------------------------------------------------------------------


class Router:
    """What a router knows of the ranks of one engine, from the events alone."""

    def __init__(self, info: EngineInfo) -> None:
        layout = info.layout
        self._seen: Counter[int] = Counter()
        self.index = WindowIndex(kernel=False)
        self.residency = {rank: Residency(layout, NodeTable()) for rank in range(info.data_parallel_size)}
        self._adapters = {rank: TrtllmEventAdapter(layout) for rank in self.residency}
        for rank in self.residency:
            self.index.apply(Rank(1, rank), layout_event(layout))

    def listen(self, told: Mapping[int, Sequence[RawEvent]]) -> None:
        """Take in what is new in all events so far, by rank."""
        for rank, events in told.items():
            for raw in events[self._seen[rank] :]:
                self._apply(rank, raw)
            self._seen[rank] = len(events)
        self.index.check()

    def predicted(self, prompt: list[int], rank: int = 0) -> int:
        return self.index.score_tokens(prompt).get(Rank(1, rank), 0)

    def _apply(self, rank: int, raw: RawEvent) -> None:
        for event in self._adapters[rank].feed(raw):
            try:
                changes = self.residency[rank].apply(event)
            except Restart:
                # The engine's windows are others than declared, which it says before anything else.
                self.index.apply(Rank(1, rank), layout_event(self.residency[rank].layout))
                continue
            for change in changes:
                self.index.apply(Rank(1, rank), change)


def workload(seed: int, requests: int, unit: int = 1) -> Iterator[tuple[list[int], int]]:
    """Prompts with the length of their answers: turns, resends, forks and new ones.

    :param unit: prompts of 1 to 90 tokens are this many times as long.
    """
    rng = random.Random(seed)
    earlier = [[rng.randrange(5000) for _ in range(40 * unit)]]
    for _ in range(requests):
        prompt = list(rng.choice(earlier[-10:]))
        if rng.random() < 0.4:
            del prompt[rng.randrange(len(prompt)) + 1 :]
        if rng.random() < 0.2:
            prompt = []
        if rng.random() < 0.8 or not prompt:
            prompt = prompt[: 60 * unit] + [rng.randrange(5000) for _ in range(rng.randrange(1, 30 * unit))]
        earlier.append(prompt)
        yield prompt, rng.randrange(1, 6)
