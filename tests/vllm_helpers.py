"""Engines over the stand-in of vLLM, and what they have announced."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm.engine import VllmEngine

from tests.vllm_package import CONTEXT, AsyncLLM, install
from vswa_plugin.engine.contract import ChunkDict, EngineSettings, RawEvent

BS, WINDOW = 4, 8
#: Six layers as in Gemma 3: five sliding ones, then a global one.
CONFIG = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "sliding_window": WINDOW,
    "max_position_embeddings": CONTEXT,
    "vocab_size": 5000,
}
OPTIONS: dict[str, Any] = {"block_size": BS}
#: How long anything may take that only waits for a thread.
WAIT_S = 20.0

Installer = Callable[..., None]


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def install_standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    """Installs the stand-in as a release of that version, for the test."""

    def install_version(version: str, distribution: str = "vllm", *, nixl: bool = True) -> None:
        folder = tmp_path / f"site-{version}"
        install(folder, version, distribution)
        if nixl:
            (folder / "nixl.py").touch()
        monkeypatch.syspath_prepend(str(folder))

    _forget()
    monkeypatch.setattr(AsyncLLM, "made", [])
    monkeypatch.setattr(AsyncLLM, "quirks", {})
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    yield install_version
    for llm in AsyncLLM.made:
        if not llm.closed:
            llm.shutdown()
    _forget()


@pytest.fixture
def standin(install_standin: Installer) -> None:
    """The stand-in as the release that Dynamo 1.6.1 names."""
    install_standin("0.31.0")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with all that is looked at before the start."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def settings_for(
    model: Path, options: dict[str, Any] | None = None, mode: str = "agg", ranks: int = 1
) -> EngineSettings:
    given = {**OPTIONS, **(options or {})}
    return EngineSettings("vllm", mode, str(model), "gemma", given, "args.yaml", ranks)


class Started:
    """An engine that runs, and what it has announced.

    :ivar events: of each rank, in the order in which they came; written by the engine's thread.
    """

    def __init__(
        self, model: Path, options: dict[str, Any] | None = None, ranks: int = 1, mode: str = "agg"
    ) -> None:
        self.engine = VllmEngine(settings_for(model, options, mode, ranks))
        self.events: dict[int, list[RawEvent]] = {}
        self._arrived = threading.Condition()
        self.engine.start(self._take)
        self.llm = AsyncLLM.made[-1]

    def _take(self, rank: int, events: Sequence[RawEvent]) -> None:
        with self._arrived:
            self.events.setdefault(rank, []).extend(events)
            self._arrived.notify_all()

    def wait_for(self, count: int, rank: int = 0) -> list[RawEvent]:
        """The events of a rank, once there are so many."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(self.events.get(rank, ())) >= count, WAIT_S)
            assert arrived, f"expected {count} events, got {len(self.events.get(rank, ()))}"
            return list(self.events[rank])

    def ask(self, request: dict[str, Any]) -> list[ChunkDict]:
        return asyncio.run(self.chunks(request))

    async def chunks(self, request: dict[str, Any]) -> list[ChunkDict]:
        return [chunk async for chunk in self.engine.generate(request)]


def asked(prompt: Sequence[int], max_tokens: int = 1, **more: Any) -> dict[str, Any]:
    return {"token_ids": list(prompt), "stop_conditions": {"max_tokens": max_tokens}, **more}


def tokens_of(chunks: list[ChunkDict]) -> list[int]:
    return list(itertools.chain.from_iterable(chunk["token_ids"] for chunk in chunks))


def cached_of(chunks: list[ChunkDict]) -> int:
    cached: int = chunks[-1]["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached
