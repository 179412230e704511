"""A gateway before Dynamo's own frontend: it asks /select, pins the request, and the chosen worker serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from tests.conftest import Run
from tests.e2e_helpers import TextModel, beside, eventually, long_prompt
from vswa_plugin.host.loading import load_host
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.topologies import WorkerGroup
from vswa_plugin.program.life import Life
from vswa_plugin.registry.etcd import EtcdRegistry
from vswa_plugin.router.args import parse
from vswa_plugin.router.selector.app import Selector

#: A gateway may say who serves a request in its headers or in its body.
PINNED_BY = ("headers", "nvext")


class Gateway:
    """Tokenizes as the frontend does, asks the selector, pins the request, reports what came of it."""

    def __init__(self, cluster: Cluster, selector: str, session: aiohttp.ClientSession) -> None:
        self._cluster = cluster
        self._selector = selector
        self._session = session
        self._tokenizer = TextModel(Path(cluster.settings.model_path))

    async def post(self, path: str, **body: Any) -> Any:
        async with self._session.post(self._selector + path, json=body) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def knows(self, prompt: str) -> bool:
        """Whether the selector knows a worker that holds nearly all of it."""
        token_ids = self._tokenizer.ids(prompt)
        answer = await self.post("/query", token_ids=token_ids, model_name="gemma")
        return max(each["longest_matched"] for each in answer["instances"].values()) > len(token_ids) - 33

    async def ask(self, prompt: str, by: str = "headers", **wish: Any) -> tuple[Any, dict[str, int], int]:
        """The choice, ``by`` what it is told; who served it, by phase; the tokens that were reused."""
        token_ids = self._tokenizer.ids(prompt)
        chosen = await self.post("/select", token_ids=token_ids, model_name="gemma", **wish)
        body = {"model": "gemma", "prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        body["nvext"] = {"extra_fields": ["worker_id"], **(chosen["nvext"] if by == "nvext" else {})}
        headers = chosen["headers"] if by == "headers" else {}
        url = f"{self._cluster.url}/v1/completions"
        async with self._session.post(url, json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            found = await answer.json()
        cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
        await self.post("/release", selection_id=chosen["selection_id"], cached_tokens=cached)
        return chosen, found["nvext"]["worker_id"], cached


@asynccontextmanager
async def selecting(
    cluster: Cluster, session: aiohttp.ClientSession
) -> AsyncIterator[tuple[Gateway, Selector]]:
    """A selector among the cluster's workers, and a gateway that asks it."""
    environ = {"NATS_SERVER": cluster.nats_server}
    options = ["--selector-only", "--http-port", "0", "--namespace", cluster.settings.namespace]
    args = parse(options, environ)
    with load_host(()) as host:
        life = Life("test")
        selector = Selector(args, host, EtcdRegistry(cluster.etcd_endpoints), life)
        try:
            await selector.start()
            yield Gateway(cluster, f"http://127.0.0.1:{selector.port}", session), selector
        finally:
            await selector.end()


def test_the_worker_that_was_selected_serves_and_reuses_what_was_predicted(
    run: Run[Any], cluster: Cluster
) -> None:
    async def body() -> list[tuple[Any, dict[str, int], int]]:
        async with (
            aiohttp.ClientSession() as session,
            selecting(cluster, session) as (gateway, selector),
        ):
            workers = [entry.worker_id for entry in selector.fleet.entries.values()]
            found = []
            for worker_id, by in zip(workers, PINNED_BY, strict=True):
                prompt = long_prompt(f"gateway {by}", 60)
                found.append(await gateway.ask(prompt, by, allowed_worker_ids=[worker_id]))
                await eventually(lambda text=prompt: gateway.knows(text), "its blocks are known")
                found.append(await gateway.ask(prompt))
            assert sum(counts.exact for counts in selector.promises.ranks.values()) == 4
            return found

    found = run(body())
    (first, _, _), (second, _, again), (third, _, _), (fourth, _, last) = found

    assert [served["decode_worker_id"] for _, served, _ in found] == [
        int(chosen["worker_id"]) for chosen, _, _ in found
    ]
    assert first["worker_id"] == second["worker_id"] != third["worker_id"] == fourth["worker_id"]
    assert [chosen["cached_tokens"] // 32 for chosen, _, _ in found] == [
        cached // 32 for _, _, cached in found
    ]
    assert min(again, last) > 500


def test_prefill_and_decode_ranks_that_were_selected_serve_and_reuse_what_was_predicted(
    run: Run[Any], cluster: Cluster
) -> None:
    """Two workers of each kind with two ranks each: left alone, the frontend would go round all of them."""
    options = ("--data-parallel-size", "2")
    two_ranks = Cluster(msgspec.structs.replace(cluster.settings, worker_options=options), cluster.folder)
    two_ranks.nats_server, two_ranks.etcd_endpoints = cluster.nats_server, cluster.etcd_endpoints

    async def body() -> list[tuple[Any, dict[str, int], int]]:
        groups = (WorkerGroup("prefill", 2), WorkerGroup("decode", 2))
        async with (
            aiohttp.ClientSession() as session,
            beside(two_ranks, "selected", *groups) as apart,
            selecting(apart, session) as (gateway, selector),
        ):
            entries = selector.fleet.entries.values()
            decoders = [entry.worker_id for entry in entries if entry.mode == "decode"]
            found = []
            for decoder, by in zip(decoders, PINNED_BY, strict=True):
                prompt = long_prompt(f"apart {by}", 60)
                for _ in range(3):
                    found.append(await gateway.ask(prompt, by, decode_worker_id=decoder, dp_rank=1))
                    await eventually(lambda text=prompt: gateway.knows(text), "its blocks are known")
            assert sum(counts.exact for counts in selector.promises.ranks.values()) == 6
            assert not any(len(pool.book) for pool in selector.choices.pools())
            return found

    found = run(body())

    for chosen, served, cached in found:
        prefill = chosen["prefill"]
        assert served == {
            "decode_worker_id": int(chosen["worker_id"]),
            "decode_dp_rank": 1,
            "prefill_worker_id": int(prefill["worker_id"]),
            "prefill_dp_rank": prefill["dp_rank"],
        }
        assert cached // 32 == chosen["cached_tokens"] // 32
    assert [cached > 500 for _, _, cached in found] == [False, True, True] * 2
    assert len({served["decode_worker_id"] for _, served, _ in found}) == 2
