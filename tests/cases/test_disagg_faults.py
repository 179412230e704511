"""A deployment that lacks a worker says so; and prefill workers let go of what nobody will fetch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from vswa_plugins.gemma3_cpu.transfer.client import PullRequest, pull
from vswa_plugins.gemma3_cpu.transfer.errors import TransferError
from vswa_plugins.gemma3_cpu.transfer.messages import VERSION, Pull, PullRefused, decode_answer
from vswa_plugins.gemma3_cpu.transfer.params import parse_params
from vswa_plugins.gemma3_cpu.transfer.plan import GroupBlocks
from vswa_plugins.gemma3_cpu.transfer.server import ServerOptions
from vswa_plugins.gemma3_cpu.transfer.wire import Timeouts

from tests.conftest import Brokers, Run
from tests.e2e_helpers import cluster_on, own_namespace, running
from tests.gemma3_disagg_helpers import Pair, running_pair, until, with_options
from tests.gemma3_engine_helpers import prompt_of, request_for, tokens_of
from tests.gemma3_engine_helpers import small as small
from tests.gemma3_transfer_helpers import FULL, OFFERED, Decode, Prefill, connect, expected_blocks
from tests.router.test_forward import FakeCall
from vswa_plugin.blocks.layout import Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.engine.contract import ChunkDict
from vswa_plugin.errors import Unavailable
from vswa_plugin.index import WindowIndex
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.topologies import Routing, WorkerGroup
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.pools import Model
from vswa_plugin.router.promises import Promises
from vswa_plugin.selection import Weights
from vswa_plugin.wire.events import Rank

# -- a worker that lacks -----------------------------------------------------------------------------------


def deployment(
    folder: Path, model_dir: Path, brokers: Brokers, router: str | None, *modes: str
) -> AbstractAsyncContextManager[Cluster]:
    """A frontend and one worker of each mode, behind our router or not."""
    settings = ClusterSettings(
        str(model_dir),
        "gemma",
        groups=tuple(WorkerGroup(mode) for mode in modes),
        namespace=own_namespace("lacking"),
        routing=Routing(router),
    )
    return running(cluster_on(brokers, folder, settings))


async def refusal(cluster: Cluster, stream: bool) -> tuple[int, bool]:
    """Status of one request, or of the error that ends its stream, and whether a reason is given."""
    body = {"model": "gemma", "prompt": "Hello there", "max_tokens": 3, "stream": stream}
    timeout = aiohttp.ClientTimeout(total=40)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{cluster.url}/v1/completions", json=body) as answer,
    ):
        status, text = answer.status, await answer.text()
    if status == 200 and stream:
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        errors = [chunk["error"] for chunk in chunks if "error" in chunk]
        return (errors[0]["code"], bool(errors[0]["message"])) if errors else (status, False)
    try:
        return status, bool(json.loads(text)["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return status, False


async def refusals(cluster: Cluster) -> list[tuple[int, bool]]:
    """Of one request whose answer is streamed, and one whose is not."""
    return list(await asyncio.gather(refusal(cluster, True), refusal(cluster, False)))


async def all_refusals(cluster: Cluster, rounds: int = 5) -> set[tuple[int, bool]]:
    """Of some requests, one after the other, while what has happened reaches everybody."""
    found = set(await refusals(cluster))
    for _ in range(rounds - 1):
        await asyncio.sleep(0.2)
        found.update(await refusals(cluster))
    return found


async def known_to_be_gone(cluster: Cluster, worker: Child) -> None:
    """Until the registry does not list that worker any more."""
    async with asyncio.timeout(25):
        while worker.pid in [entry.pid for entry in await cluster.entries()]:
            await asyncio.sleep(0.1)


REFUSED = (503, True)
#: An empty body, as for a path that does not exist.
UNKNOWN = (404, False)


@pytest.mark.parametrize(
    ("router", "gone"),
    [(None, "prefill"), ("exact", "prefill"), ("exact", "decode")],
)
def test_a_model_that_lacks_one_phase_is_answered_with_503_and_a_reason(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers, router: str | None, gone: str
) -> None:
    async def body() -> set[tuple[int, bool]]:
        async with deployment(tmp_path, model_dir, brokers, router, "prefill", "decode") as cluster:
            worker = cluster.workers[("prefill", "decode").index(gone)]
            await worker.stop()
            await known_to_be_gone(cluster, worker)
            return await all_refusals(cluster)

    assert {REFUSED} == run(body())


def test_dynamos_frontend_alone_forgets_a_model_whose_decode_workers_have_all_gone(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    """A limit of Dynamo that docs/failures.md states: the prefill workers' registration does not count."""

    async def body() -> set[tuple[int, bool]]:
        async with deployment(tmp_path, model_dir, brokers, None, "prefill", "decode") as cluster:
            _, decode = cluster.workers
            await decode.stop()
            async with asyncio.timeout(25):
                while UNKNOWN not in await refusals(cluster):
                    await asyncio.sleep(0.1)
            entries = await cluster.entries()  # of all that use these brokers
            modes = [each.mode for each in entries if each.namespace == cluster.settings.namespace]
            assert ["prefill"] == modes, "the prefill worker is there"
            return await all_refusals(cluster)

    assert {UNKNOWN} == run(body())


@pytest.mark.soak
@pytest.mark.timeout(120)
@pytest.mark.skipif("'soak' not in (config.getoption('-m') or '')", reason="half a minute: ask with -m soak")
@pytest.mark.parametrize("router", [None, "exact"])
def test_a_model_whose_only_worker_is_frozen_is_answered_with_503_and_a_reason(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers, router: str | None
) -> None:
    """At once, and when its registration has run out."""

    async def body() -> tuple[set[tuple[int, bool]], set[tuple[int, bool]]]:
        async with deployment(tmp_path, model_dir, brokers, router, "agg") as cluster:
            worker = cluster.workers[0]
            os.kill(worker.pid, signal.SIGSTOP)
            try:
                at_once = set(await refusals(cluster))
                await known_to_be_gone(cluster, worker)
                return at_once, await all_refusals(cluster)
            finally:
                os.kill(worker.pid, signal.SIGCONT)

    assert ({REFUSED}, {REFUSED}) == run(body())


# -- prompts that nobody fetches -------------------------------------------------------------------------

#: 30 blocks of each window on the prefill side: one prompt of 200 tokens fills the global pool.
ONE_PROMPT = with_options(kv_blocks={32: 30, "global": 30}, transfer_timeout_s=30, transfer_patience_s=30)
IMPATIENT = with_options(kv_blocks={32: 30, "global": 30}, transfer_timeout_s=30, transfer_patience_s=0.1)
FIRST, SECOND = (request_for(prompt_of(200, seed), 4, model="m") for seed in range(2))
#: Far below ``transfer_timeout_s``, and far above what a prompt takes.
SOON_S = 2.0
PREFILL, DECODE = Rank(11), Rank(21)


class Workers:
    """The engines of a pair as a router calls them. ``lost``: calls of the decode worker fail."""

    def __init__(self, pair: Pair) -> None:
        self._engines = {PREFILL.worker_id: pair.prefill, DECODE.worker_id: pair.decode}
        self.lost = False

    async def release(self, worker_id: int, params: dict[str, Any]) -> bool:
        return self._engines[worker_id].release(params)

    def instance_ids(self) -> list[int]:
        return list(self._engines)

    async def generate(self, request: dict[str, Any], worker_id: int, _: object) -> AsyncIterator[ChunkDict]:
        if self.lost and worker_id == DECODE.worker_id:
            raise Unavailable("the decode worker has died")
        async for chunk in self._engines[worker_id].generate(request):
            yield chunk


def forwarder_of(workers: Workers) -> Forwarder:
    decider = Decider(WindowIndex(), Weights(), namespaced_sequence_hashes)
    forwarder = Forwarder(decider, Promises(), lambda _: True)
    model = forwarder.models["m"] = Model("m", Naming(8, 8))
    model.clients = dict.fromkeys(workers.instance_ids(), workers)  # type: ignore[arg-type]
    model.prefill.ranks, model.decode.ranks = (PREFILL,), (DECODE,)
    return forwarder


async def served(forwarder: Forwarder, request: dict[str, Any]) -> int:
    """Tokens that the client gets; -1: none came soon."""
    try:
        async with asyncio.timeout(SOON_S):
            return len(tokens_of([chunk async for chunk in forwarder.forward(request, FakeCall())]))  # type: ignore[arg-type]
    except TimeoutError:
        return -1


def test_a_prompt_whose_decode_call_failed_does_not_keep_the_next_one_waiting(small: Path) -> None:
    async def body() -> int:
        async with running_pair(small, ONE_PROMPT) as pair:
            workers = Workers(pair)
            forwarder = forwarder_of(workers)
            workers.lost = True
            with pytest.raises(Unavailable, match="has died"):
                await served(forwarder, FIRST)
            workers.lost = False
            return await served(forwarder, SECOND)

    assert 4 == asyncio.run(body())


def test_a_prompt_whose_decode_call_failed_unnoticed_does_not_keep_the_next_one_waiting(small: Path) -> None:
    """As behind Dynamo's own router, which tells nobody."""

    async def body() -> tuple[int, float]:
        async with running_pair(small, IMPATIENT) as pair:
            await pair.prefilled(FIRST)
            tokens = tokens_of(await asyncio.wait_for(pair.run(SECOND), 10))
            return len(tokens), pair.prefill.stats()["transfers_displaced"]

    assert (4, 1.0) == asyncio.run(body())


def test_a_prompt_of_which_nothing_is_wanted_is_let_go_at_once(small: Path) -> None:
    """So that whoever holds its ticket can free it."""

    async def body() -> int:
        async with running_pair(small, ONE_PROMPT) as pair:
            params = parse_params((await pair.prefilled(FIRST))["disaggregated_params"])
            waiting = asyncio.create_task(pair.prefilled(SECOND))
            await until(lambda: pair.prefill.stats()["waiting"] == 1.0)
            nothing = (GroupBlocks(range(0), 1),) * 2
            request = PullRequest(
                (params.host, params.port), params.ticket, params.fingerprint, nothing, lambda *_: None
            )
            await asyncio.to_thread(pull, request)
            return len(tokens_of([await asyncio.wait_for(waiting, 10)]))

    assert 1 == asyncio.run(body())


# -- strangers on the transfer port ----------------------------------------------------------------------


def fetched(prefill: Prefill, ticket: str) -> object:
    """The blocks that an honest decode worker gets with its ticket, or why it gets none."""
    decode = Decode()
    try:
        decode.pull(prefill.server.address, ticket, Timeouts(connect_s=1.0, io_s=1.0, total_s=2.0))
    except TransferError as error:
        return error.cause
    return decode.blocks


@pytest.mark.parametrize("peers", [0, 3, 4, 16])
def test_peers_that_say_nothing_keep_no_decode_worker_from_its_blocks(peers: int) -> None:
    options = ServerOptions(max_connections=4, hello_s=20.0)
    with Prefill(options) as prefill, ExitStack() as silent:
        for _ in range(peers):
            # From another address than the decode worker's.
            silent.enter_context(socket.create_connection(prefill.server.address, 5, ("127.0.0.2", 0)))

        assert expected_blocks(OFFERED) == fetched(prefill, prefill.offer())


def test_a_wrong_fingerprint_uses_no_ticket_up() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        with connect(prefill.server.address) as stranger:
            stranger.send(Pull(VERSION, ticket, "another", FULL))
            assert isinstance(stranger.receive(decode_answer), PullRefused)

        assert expected_blocks(OFFERED) == fetched(prefill, ticket)


def test_a_guessed_ticket_gets_nothing_and_leaves_the_right_one_good() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        guesses = [fetched(prefill, f"{number:032x}") for number in range(20)]

        assert ["refused"] * 20 == guesses
        assert expected_blocks(OFFERED) == fetched(prefill, ticket)


def test_a_used_ticket_gets_nothing() -> None:
    with Prefill() as prefill:
        ticket = prefill.offer()
        fetched(prefill, ticket)

        assert "refused" == fetched(prefill, ticket)
