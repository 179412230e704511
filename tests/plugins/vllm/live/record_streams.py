"""Records what a real vLLM sends on its event sockets, byte for byte, into tests/data.

    make .venv-vllm/installed
    PYTHONPATH=. .venv-vllm/bin/python -m tests.plugins.vllm.live.record_streams MODEL tests/data

MODEL is written by `vswa make-model`. Prompts are made of random token ids. A file is xz of one msgpack array
of these:

    ["header", {...}]                  versions, options, cache groups
    ["request", token ids, cached]     one request at a time; before the events that it caused
    ["message", frames]                of the SUB socket
    ["answer", start, [frames, ...]]   of the replay socket, asked from batch ``start`` on
    ["restart"]                        another engine begins, at batch 0
"""

from __future__ import annotations

import asyncio
import lzma
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq
from vswa_plugins.vllm import package
from vswa_plugins.vllm.frames import END, answered, question
from vswa_plugins.vllm.grouping import cache_groups
from vswa_plugins.vllm.launching import launch
from vswa_plugins.vllm.model import load_shape
from vswa_plugins.vllm.options import parse_options
from vswa_plugins.vllm.sockets import private_sockets

BLOCK_SIZE = 32
OPTIONS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "max_model_len": 1536,
    "max_num_batched_tokens": 512,
    "num_gpu_blocks_override": 400,
    "enforce_eager": True,
    "dtype": "float32",
    "async_scheduling": False,
    "gpu_memory_utilization": 0.3,
}
#: How long a message may take that is on its way.
WAIT_MS = 3_000


class Recording:
    """One engine after the other, its sockets, and the records so far."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.records: list[list[Any]] = []
        self._api = package.load()
        self._random = random.Random(11)
        self._documents = [self._tokens(length) for length in (900, 700, 1_200)]

    @contextmanager
    def engine(self, **options: Any) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="vswa-") as directory:
            sockets = private_sockets(directory)
            assert sockets is not None
            self._reached = sockets.of_rank(0)
            self._context = zmq.Context()
            self._subscription = self._context.socket(zmq.SUB)
            self._subscription.connect(self._reached.endpoint)
            self._made = parse_options({**OPTIONS, **options}, "the recording", ())
            self._llm = launch(self._api, self._model, self._made, sockets)
            self._loop = asyncio.Runner()
            try:
                yield
            finally:
                self._loop.run(_nothing())
                self._llm.shutdown()
                self._loop.close()
                self._context.destroy(linger=0)

    def subscribe(self) -> None:
        self._subscription.setsockopt(zmq.SUBSCRIBE, b"")
        time.sleep(0.5)  # ZeroMQ does not say when a subscription has reached the publisher

    def unsubscribe(self) -> None:
        self._subscription.setsockopt(zmq.UNSUBSCRIBE, b"")
        time.sleep(0.5)

    def header(self, **more: Any) -> None:
        groups = cache_groups(load_shape(self._model).layers, BLOCK_SIZE)
        windows = [group.window_size for group in groups]
        self.records.append(
            [
                "header",
                {"vllm": package.installed_version(), "block_size": BLOCK_SIZE, "windows": windows, **more},
            ]
        )

    def work(self, count: int) -> None:
        """Requests one after the other, over a few documents that share prefixes and overfill the pool."""
        for _ in range(count):
            document = self._random.choice(self._documents)
            kept = self._random.choice([len(document), len(document) // 2, len(document) - 200])
            prompt = document[:kept] + self._tokens(self._random.choice([0, 1, 40, 150]))
            at = len(self.records)
            self.records.append([])
            cached = self._loop.run(self._ask(prompt))
            self.records[at] = ["request", prompt, cached]
            while self._subscription.poll(100):
                self.records.append(["message", self._subscription.recv_multipart()])

    def answer(self, start: int) -> None:
        """Ask for the batches from ``start`` on."""
        with self._context.socket(zmq.DEALER) as socket:
            socket.connect(self._reached.replay_endpoint)
            socket.send_multipart(question(start))
            frames: list[list[bytes]] = []
            while not frames or answered(frames[-1]).number != END:
                assert socket.poll(WAIT_MS), "the answer has not come"
                frames.append(socket.recv_multipart())
        self.records.append(["answer", start, frames])

    def received(self) -> int:
        """The number of the next batch."""
        numbers = [int.from_bytes(each[1][1], "big") for each in self.records if each[0] == "message"]
        return numbers[-1] + 1 if numbers else 0

    def write(self, path: Path) -> None:
        path.write_bytes(lzma.compress(msgspec.msgpack.encode(self.records), preset=9))
        sys.stdout.write(f"{path}: {path.stat().st_size} bytes, {len(self.records)} records\n")
        self.records = []

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(5, 4_000) for _ in range(count)]

    async def _ask(self, prompt: list[int]) -> int:
        params = self._api.SamplingParams(max_tokens=3, temperature=0.0, detokenize=False, ignore_eos=True)
        cached = None
        number = str(len(self.records))
        async for output in self._llm.generate({"type": "token", "prompt_token_ids": prompt}, params, number):
            cached = output.num_cached_tokens if cached is None else cached
        assert cached is not None
        return int(cached)


async def _nothing() -> None:
    """Lets the engine's own tasks have a turn."""


def dense(recording: Recording) -> None:
    with recording.engine(prefix_cache_retention_interval=None):
        recording.header(retention="dense")
        recording.subscribe()
        recording.work(24)


def sparse_and_lost(recording: Recording) -> None:
    """Sparse retention; then batches that nobody received, of which vLLM has kept the last three."""
    with recording.engine(kv_events_config={"buffer_steps": 3}):
        recording.header(retention="sparse", kept_batches=3)
        recording.subscribe()
        recording.work(20)
        missing = recording.received()
        recording.unsubscribe()
        recording.work(8)
        recording.answer(missing)
        recording.subscribe()
        recording.work(12)


def late_and_restarted(recording: Recording) -> None:
    """A subscriber that comes late and asks; a hole that is filled; another engine."""
    with recording.engine():
        recording.header(retention="sparse")
        recording.work(4)
        recording.subscribe()
        recording.answer(0)
        recording.work(8)
        missing = recording.received()
        recording.unsubscribe()
        recording.work(4)
        recording.subscribe()
        recording.answer(missing)
        recording.work(6)
    with recording.engine():
        recording.records.append(["restart"])
        recording.subscribe()
        recording.work(10)


STREAMS: dict[str, Callable[[Recording], None]] = {
    "vllm-zmq-dense.msgpack.xz": dense,
    "vllm-zmq-sparse-lost.msgpack.xz": sparse_and_lost,
    "vllm-zmq-late-restarted.msgpack.xz": late_and_restarted,
}


def main() -> None:
    recording = Recording(sys.argv[1])
    for name, make in STREAMS.items():
        make(recording)
        recording.write(Path(sys.argv[2]) / name)


if __name__ == "__main__":
    main()
