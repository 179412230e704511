"""The router's HTTP API over a fleet that needs no broker: its workers' batches are handed in directly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.index import WindowIndex
from vswa_plugin.program.status import Status
from vswa_plugin.registry import Entry
from vswa_plugin.registry.file import FileRegistry
from vswa_plugin.router.counts import RequestCounts
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.http.answers import choice_answers
from vswa_plugin.router.http.metrics import Counted, RouterMetrics
from vswa_plugin.router.http.server import RouterServer, Tokens
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.selector.choices import GatewayChoices
from vswa_plugin.selection import LoadBook, SelectionHooks, Weights
from vswa_plugin.wire.events import Batch, Event, Rank, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

#: Window of two blocks, and global.
GROUPS = (CacheGroup(0, 32, 16), CacheGroup(1, None, 16))
A, A1, B = Rank(1), Rank(1, 1), Rank(2)
PROMPT = list(range(130))
HASHES = list(namespaced_sequence_hashes(PROMPT, 16))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 15))


def entry_of(worker_id: int, model: str = "m", dp: int = 1, **changes: Any) -> Entry:
    given = {
        "namespace": "ns",
        "component": "backend",
        "worker_id": worker_id,
        "mode": "agg",
        "engine": "gemma3_cpu",
        "served_model_name": model,
        "model_path": "/models/m",
        "context_length": 1_024,
        "block_size": 16,
        "rule": "trtllm_v2",
        "hash_scheme": "dynamo-xxh3-1337",
        "groups": GROUPS,
        "epochs": dict.fromkeys(range(dp), 5),
        "total_kv_blocks": 100,
    }
    return Entry(**{**given, **changes})


def stored(*, sliding: Sequence[int] = (), whole: Sequence[int] = (), tier: str = "device") -> list[Event]:
    """Blocks of PROMPT, by position."""
    return [
        Stored(group, block, None, (HASHES[block],), tier)
        for group, blocks in ((0, sliding), (1, whole))
        for block in blocks
    ]


class Api:
    """Worker 1 with two ranks and worker 2, all of model ``m``; a running server."""

    def __init__(
        self,
        *,
        selector: bool = True,
        hooks: SelectionHooks | None = None,
        token: str | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        index = WindowIndex()
        self.fleet = Fleet(Transport(), FileRegistry("/nonexistent"), namespace="ns", index=index)
        self.decider = Decider(index, Weights(), namespaced_sequence_hashes, hooks)
        self.promises = Promises(self.decider.recent.reported)
        self.status = Status(ready=True)
        self.choices = GatewayChoices(self.fleet, self.decider, namespaced_sequence_hashes, self.promises)
        counted = Counted(
            self.decider,
            self.promises,
            self.choices.pools,
            RequestCounts(),
            self.choices.reservations,
        )
        self.server = RouterServer(
            self.fleet,
            namespaced_sequence_hashes,
            self.status,
            RouterMetrics("selector", self.fleet, counted),
            self.choices if selector else None,
            token,
            tokens,
            explain_choice=lambda prompt: choice_answers(self.decider, self.choices.models(), prompt),
        )
        self.url = ""

    async def __aenter__(self) -> Api:
        self.enter(entry_of(1, dp=2), entry_of(2))
        self.url = f"http://127.0.0.1:{await self.server.start('127.0.0.1', 0)}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()

    def enter(self, *entries: Entry) -> None:
        for entry in entries:
            self.fleet.entries[entry.key] = entry

    async def holds(self, rank: Rank, events: Sequence[Event] = (), model: str = "m") -> None:
        """The rank's view is live, with what ``events`` say."""
        source = Source("ns", "backend", *rank)
        layout = layout_event(CacheLayout(GROUPS, "trtllm_v2", model))
        batch = Batch(1, 5, 0, 1, (layout, *events))
        await self.fleet.subscriber._on_message(subject(source, "events"), encode(batch))

    async def all_live(self) -> None:
        for rank in (A, A1, B):
            await self.holds(rank)

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return await self.send("POST", path, json.dumps(body).encode())

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.send("GET", path)

    async def send(self, method: str, path: str, data: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON, or text where it is none."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, data=data) as answer,
        ):
            text = await answer.text()
            if answer.content_type == "application/json":
                return answer.status, json.loads(text)
            return answer.status, text

    @property
    def book(self) -> LoadBook:
        return self.choices.models()["m"].pool.book
