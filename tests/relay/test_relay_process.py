"""The relay as a process, between publishers as vLLM's and a selector: what vLLM then reused is promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from tests.relay_helpers import MODEL, WAIT_S, Engine, Recording, Stack, counted, promised, until_promised
from vswa_plugin.launch.processes import Child
from vswa_plugin.registry import Entry
from vswa_plugin.registry.opening import open_registry

ONE, TWO = 7001, 7002


@pytest.fixture(scope="module")
def dense() -> Recording:
    return Recording("dense")


@pytest.fixture
def stack(run: Run[Any], brokers: Brokers, tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path, brokers.env, own_namespace("relayed"))
    yield made
    codes = run(made.stop())
    assert {*codes.values()} <= {0}, codes


@pytest.fixture
def engines() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def started(engines: contextlib.ExitStack, **options: Any) -> Engine:
    engine = Engine(**options)
    engines.callback(engine.close)
    return engine


def worker(engine: Engine, number: int, model: Path, **more: Any) -> dict[str, Any]:
    return {**engine.options, "id": number, "model": MODEL, "model_path": str(model), **more}


async def entries(stack: Stack) -> list[Entry]:
    registry = open_registry("etcd", {**stack.env})
    try:
        return await registry.entries(stack.namespace)
    finally:
        await registry.close()


async def registered(stack: Stack, *numbers: int) -> list[Entry]:
    """The entries, once they are those of these workers."""
    found: list[Entry] = []

    async def there() -> bool:
        found[:] = await entries(stack)
        return sorted(each.worker_id for each in found) == sorted(numbers)

    await eventually(there, f"just {numbers} are registered", WAIT_S)
    return found


async def has_read(relay: Child, number: int, batches: int) -> None:
    async def read() -> bool:
        return await counted(relay, "vswa_relay_batches_total", number) >= batches

    await eventually(read, f"{batches} batches are read", WAIT_S)


def test_a_relay_that_starts_late_promises_what_vllm_then_reused(
    run: Run[Any], stack: Stack, engines: contextlib.ExitStack, dense: Recording, tmp_path: Path
) -> None:
    """The declared block size is not that of the events, which correct it."""
    model, engine = dense.write_model(tmp_path / "model"), started(engines)
    checked = [each for each in dense.requests if each.cached]
    assert 32 == dense.header["block_size"] and len(checked) >= 14
    first = checked[0]
    engine.publish(dense.payloads[: first.batches])

    async def body() -> None:
        relay = await stack.listed([worker(engine, ONE, model)])
        selector = await stack.selector()
        (entry,) = await registered(stack, ONE)
        assert (32, "vllm", "agg", MODEL) == (
            entry.block_size,
            entry.rule,
            entry.mode,
            entry.served_model_name,
        )
        assert dense.header["windows"] == [group.window_size for group in entry.groups]
        done = first.batches
        for each in checked:
            engine.publish(dense.payloads[done : each.batches])
            done = each.batches
            await until_promised(selector, each.tokens, {str(ONE): each.cached})
        shown = await stack.index("--check")
        (rank,) = shown["ranks"]
        assert (True, "live", str(ONE)) == (shown["exact"], rank["state"], rank["source"]["worker_id"])
        resident = await counted(relay, "vswa_relay_resident_blocks", ONE)
        assert 0 < resident == sum(sum(tiers.values()) for tiers in rank["blocks"].values())
        assert 0 == await counted(relay, "vswa_relay_lost_batches_total", ONE)

    run(body())


def test_a_ring_that_has_lost_its_begin_is_promised_too_little_and_never_too_much(
    run: Run[Any], stack: Stack, engines: contextlib.ExitStack, dense: Recording, tmp_path: Path
) -> None:
    model, engine = dense.write_model(tmp_path / "model"), started(engines, kept=3)
    last = next(each for each in reversed(dense.requests) if each.cached)
    engine.publish(dense.payloads[: last.batches])

    async def body() -> None:
        relay = await stack.listed([worker(engine, ONE, model, options={"block_size": 32})])
        await registered(stack, ONE)
        assert last.batches - 3 == await counted(relay, "vswa_relay_lost_batches_total", ONE)
        selector = await stack.selector()

        async def known() -> bool:
            return (await promised(selector, last.tokens)).get(str(ONE), (0, ""))[1] == "live"

        await eventually(known, "it is scored", WAIT_S)
        assert last.cached > (await promised(selector, last.tokens))[str(ONE)][0]
        (rank,) = (await stack.index())["ranks"]
        assert rank["state"] == "live"

    run(body())


def test_a_gap_is_asked_for_and_another_worker_that_sends_rubbish_costs_itself_alone(
    run: Run[Any], stack: Stack, engines: contextlib.ExitStack, dense: Recording, tmp_path: Path
) -> None:
    model, good, bad = dense.write_model(tmp_path / "model"), started(engines), started(engines)
    last = next(each for each in reversed(dense.requests) if each.cached)

    async def body() -> None:
        options = {"block_size": 32}
        workers = [worker(good, ONE, model, options=options), worker(bad, TWO, model, options=options)]
        relay = await stack.listed(workers)
        selector = await stack.selector()
        await registered(stack, ONE, TWO)
        for number, payload in enumerate(dense.payloads[: last.batches]):
            good.publisher.dropped = int(number in (3, 4))
            good.publish([payload])
            bad.publish([b"\xc1 no msgpack", b"\x93\x00\x91\x2a\x00", b"\x93\x00\x91\x81\xa4type\xa3odd\x00"])
        await until_promised(selector, last.tokens, {str(ONE): last.cached, str(TWO): 0})
        assert 2 <= await counted(relay, "vswa_relay_repaired_batches_total", ONE)
        assert 0 == await counted(relay, "vswa_relay_lost_batches_total", ONE)
        assert 0 < await counted(relay, "vswa_relay_unreadable_messages_total", TWO)
        assert relay.log().count("cannot be read") <= 3, "further ones are only counted"

    run(body())


def test_a_worker_that_goes_leaves_the_registry_and_comes_back_with_a_new_epoch(
    run: Run[Any], stack: Stack, engines: contextlib.ExitStack, dense: Recording, tmp_path: Path
) -> None:
    model, engine, stays = dense.write_model(tmp_path / "model"), Engine(), started(engines)
    last = next(each for each in reversed(dense.requests) if each.cached)
    engine.publish(dense.payloads[: last.batches])

    async def body() -> None:
        options = {"block_size": 32}
        workers = [worker(engine, ONE, model, options=options), worker(stays, TWO, model, options=options)]
        relay = await stack.listed(workers)
        selector = await stack.selector()
        before = {each.worker_id: each.epochs for each in await registered(stack, ONE, TWO)}
        await until_promised(selector, last.tokens, {str(ONE): last.cached, str(TWO): 0})
        engine.close()
        await registered(stack, TWO)
        await until_promised(selector, last.tokens, {str(TWO): 0})

        again = started(engines, ports=engine.ports)
        again.publish(dense.payloads[:1])
        after = {each.worker_id: each.epochs for each in await registered(stack, ONE, TWO)}
        assert after[ONE][0] > before[ONE][0] and after[TWO] == before[TWO]
        await until_promised(selector, last.tokens, {str(ONE): 0, str(TWO): 0})
        assert 2 == await counted(relay, "vswa_relay_connections_total", ONE)

    run(body())


def test_sigterm_leaves_the_registry_clean_and_a_second_relay_takes_over(
    run: Run[Any], stack: Stack, engines: contextlib.ExitStack, dense: Recording, tmp_path: Path
) -> None:
    model, engine = dense.write_model(tmp_path / "model"), started(engines)
    last = next(each for each in reversed(dense.requests) if each.cached)
    engine.publish(dense.payloads[: last.batches])
    given = (
        "--events",
        engine.options["events"],
        "--replay",
        engine.options["replay"],
        "--worker-id",
        str(ONE),
    )
    what = (
        "--model-path",
        str(model),
        "--served-model-name",
        MODEL,
        "--engine-options",
        '{"block_size": 32}',
    )

    async def body() -> None:
        selector = await stack.selector()
        first = await stack.relay(*given, *what)
        (entry,) = await registered(stack, ONE)
        assert first.pid == entry.pid
        second = await stack.relay(*given, *what, name="second")
        await eventually(lambda: "stands by" in second.log(), "it stands by", WAIT_S)
        assert 0 == await first.stop()

        async def taken_over() -> bool:
            return [second.pid] == [each.pid for each in await entries(stack)]

        await eventually(taken_over, "the second one has it", WAIT_S)
        await until_promised(selector, last.tokens, {str(ONE): last.cached})
        assert 0 == await second.stop()
        assert [] == await entries(stack)

    run(body())
