"""The pages of metrics of running programs: what docs/metrics.md says, and requests that add up.

Two models behind one router: ``gemma`` on a prefill and a decode engine, ``echo`` on two echo workers of each
kind, which refuse, hang and die as they are told. Beside them a selector, a picker, an aggregated worker of
two ranks with a host tier that feeds Dynamo's own router, ``vswa index``, and a relay of one recorded vLLM.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.test_router_http_process import url_of
from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, get, status_url
from tests.metrics_helpers import Family, documented, families_of, needs_promtool, promtool
from tests.relay_helpers import Engine, Recording, url_in
from tests.router_helpers import Stack, prompt_of
from vswa_plugin.engine.outcomes import OUTCOMES
from vswa_plugin.launch.processes import Child, free_port

NAME = "pages"
BESIDE, RELAYED = f"{NAME}-beside", f"{NAME}-relayed"
#: What no program here has: it takes the engine tensorrt_llm, whose own test looks at it.
ELSEWHERE = {"vswa_engine_prompt_tokens_total", "vswa_engine_kv_events_total"}
#: Asked of the echo workers: status, and how the router counts it. One that dies is moved by the frontend.
ASKED = [
    ("", 200, {"completed": 1}),
    ("invalid", 400, {"refused": 1}),
    ("prefill-invalid", 400, {"refused": 1}),
    ("full", 503, {"unavailable": 1}),
    ("prefill-full", 503, {"unavailable": 1}),
    ("broken", 500, {"failed": 1}),
    ("die:1", 200, {"unavailable": 1, "completed": 1}),
]


class Pages:
    """All programs, and where their pages are."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.workers: dict[str, Child] = {}
        self.index_url = f"http://127.0.0.1:{free_port()}"
        self.relayed = Engine()
        self.relay: Child
        self.picker: Child

    async def start(self) -> None:
        stack, folder = self.stack, self.stack.folder
        options = folder / "options.yaml"
        tier = {
            "gemma3_cpu": {"kv_blocks": {"512": 64, "global": 128}, "host_blocks": {"512": 8, "global": 8}}
        }
        options.write_text(json.dumps(tier))
        port = self.index_url.rpartition(":")[2]
        stack._env["VSWA_DYNAMO_EVENTS"] = "boundary"
        where = ("--endpoint", f"dyn://{BESIDE}.backend.generate", "--status-port", "0")
        model = ("--model-path", stack._model_path, "--served-model-name", "beside")
        ranks = ("--data-parallel-size", "2", "--extra-engine-args", str(options))
        await stack.start("--http-port", "0")
        self.workers["agg"] = await stack.child("agg", "vswa_plugin.worker", *where, *model, *ranks)
        del stack._env["VSWA_DYNAMO_EVENTS"]
        for mode in ("prefill", "decode"):
            self.workers[mode] = await stack.engine(mode, mode)
        await asyncio.gather(
            stack.router("--selector-only", "--http-port", "0"),
            *(stack.echo("echo", mode=mode, component=f"echo-{mode}") for mode in ("prefill", "decode") * 2),
            stack.child("index", "vswa_plugin", "index", "--status-port", port),
        )
        self.relay = await self._start_relay()
        listens = ("--grpc-port", "0", "--http-port", "0")
        self.picker = await stack.child("picker", "vswa_plugin", "picker", "--namespace", NAME, *listens)
        for worker in self.workers.values():
            await worker.until(lambda worker=worker: _holds("serves '" in worker.log()), "serving", 60)
        await stack.shows("gemma", "echo")
        await eventually(lambda: stack.routers[0].log().count("joins") == 6, "all workers are used", 60)

    async def _start_relay(self) -> Child:
        recording = Recording("dense")
        self.relayed.publish(recording.payloads[:3])
        model = recording.write_model(self.stack.folder / "relayed")
        options = self.relayed.options
        where = ("--events", options["events"], "--replay", options["replay"], "--worker-id", "7001")
        what = ("--model-path", str(model), "--engine-options", '{"block_size": 32}', "--namespace", RELAYED)
        relay = await self.stack.child("relay", "vswa_plugin.relay", *where, *what, "--status-port", "0")
        await relay.until(lambda: _holds("relayed as worker 7001" in relay.log()), "relaying", 30)
        return relay

    async def urls(self) -> dict[str, str]:
        router, selector = self.stack.routers
        urls = {name: await status_url(child) for name, child in self.workers.items()}
        urls |= {"router": await url_of(router), "selector": await url_of(selector)}
        urls["picker"] = await url_of(self.picker)
        return urls | {"index": self.index_url, "relay": await url_in(self.relay, "status on ")}

    async def texts(self) -> dict[str, str]:
        return {name: (await get(f"{url}/metrics"))[1] for name, url in (await self.urls()).items()}


@pytest.fixture(scope="module")
def pages(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pages]:
    stack = Stack(tmp_path_factory.mktemp("pages"), brokers.env, model_dir, NAME)
    made = Pages(stack)
    try:
        run(made.start())
        run(use(made))
        yield made
    finally:
        codes = run(stack.stop())
        made.relayed.close()
    assert {code for name, code in codes.items() if name not in stack.killed} == {0}, codes


async def _holds(condition: bool) -> bool:
    return condition


async def use(pages: Pages) -> None:
    """A little of everything, so that the families have samples."""
    stack, prompt = pages.stack, prompt_of("used", 300)
    for _ in range(2):
        assert (await stack.ask(prompt))[0] == 200
    # What nobody knows about counts too: more was found cached than was promised, and less.
    selector = (await pages.urls())["selector"]
    async with aiohttp.ClientSession() as session:
        for cached in (320, 0, None):
            body = {"token_ids": list(range(400)), "model_name": "gemma"}
            async with session.post(f"{selector}/select", json=body) as answer:
                chosen = await answer.json()
            wish = {"selection_id": chosen["selection_id"], "cached_tokens": cached}
            async with session.post(f"{selector}/release", json=wish) as answer:
                assert answer.status == 200


def test_the_pages_have_what_the_docs_say_and_nothing_else(run: Run[Any], pages: Pages) -> None:
    rows = {row.name: row for row in documented()}
    seen: dict[str, Family] = {}
    labels: dict[str, frozenset[str]] = {}
    for where, page in run(pages.texts()).items():
        families = families_of(page)
        assert {"vswa_build_info", "process_cpu_seconds_total"} <= families.keys(), where
        for name, family in families.items():
            assert name in rows, f"{name}, on the page of {where}, is not in docs/metrics.md"
            assert family.type == rows[name].type, name
            labels[name] = labels.get(name, frozenset()) | family.labels
        seen |= families

    assert set() == rows.keys() - seen.keys() - ELSEWHERE, "documented, and on no page"
    with_samples = {name: rows[name].labels for name in labels if labels[name] or not rows[name].labels}
    assert with_samples == {name: labels[name] for name in with_samples}
    assert {
        "vswa_router_decode_retries_total",
        "vswa_router_prefill_retries_total",
        "vswa_router_released_prompts_total",
        "vswa_kv_clears_total",
    } >= rows.keys() - with_samples.keys() - (ELSEWHERE), "labels that this test has not seen"


@needs_promtool
def test_promtool_has_nothing_to_say_of_the_pages(run: Run[Any], pages: Pages) -> None:
    texts = run(pages.texts())

    assert dict.fromkeys(texts, "") == {
        name: promtool("check", "metrics", given=page) for name, page in texts.items()
    }


def test_build_info_names_engine_and_versions(run: Run[Any], pages: Pages) -> None:
    found = {}
    for name, page in run(pages.texts()).items():
        (sample,) = families_of(page)["vswa_build_info"].samples
        found[name] = (sample.labels["program"], sample.labels["engine"])
        assert sample.labels["version"] and sample.labels["python_version"].startswith("3.")
        assert sample.labels["dynamo_version"]

    workers = dict.fromkeys(("agg", "prefill", "decode"), ("worker", "gemma3_cpu"))
    assert found == {
        **workers,
        **{name: (name, "") for name in ("router", "selector", "picker", "index", "relay")},
    }


def counts(page: str, program: str, **labels: str) -> tuple[float, dict[str, float], float]:
    """Requests received, ended by outcome, and in flight."""
    families, name = families_of(page), f"vswa_{program}_requests"
    ended = families[f"{name}_total"]
    return (
        families[f"{name}_received_total"].total(**labels),
        {outcome: ended.total(outcome=outcome, **labels) for outcome in OUTCOMES},
        families[f"{name}_in_flight"].total(**labels),
    )


def test_each_request_is_counted_once_however_it_ends(run: Run[Any], pages: Pages) -> None:
    stack, expected = pages.stack, dict.fromkeys(OUTCOMES, 0.0)

    async def router(model: str) -> tuple[float, dict[str, float], float]:
        url = (await pages.urls())["router"]
        return counts((await get(f"{url}/metrics"))[1], "router", model=model)

    async def body() -> None:
        received = 0.0
        for wish, status, outcomes in ASKED:
            (stack.folder / "die").touch()
            got, answer = await stack.ask(prompt_of(f"sums {wish} "), wish, model="echo")
            assert got == status, answer
            received += sum(outcomes.values())
            for outcome, count in outcomes.items():
                expected[outcome] += count
            assert await router("echo") == (received, expected, 0), wish
        for wish in ("prefill-hang", "hang"):
            asking = asyncio.create_task(stack.ask(prompt_of(f"sums {wish} "), wish, model="echo"))
            await eventually(lambda: _in_flight(router("echo"), 1), f"{wish} is under way")
            asking.cancel()
            await eventually(lambda: _in_flight(router("echo"), 0), f"{wish} has ended")
            expected["cancelled"] += 1
            received += 1
            assert await router("echo") == (received, expected, 0), wish
        assert received == sum(expected.values())

    run(body())
    (dead,) = (echo for echo in stack.echoes if "dies now" in echo.child.log())
    stack.killed.add(dead.child.name)


async def _in_flight(counted: Any, expected: int) -> bool:
    _, _, in_flight = await counted
    return bool(in_flight == expected)


def test_each_of_two_phases_is_counted_once_by_its_worker_and_the_request_once_by_the_router(
    run: Run[Any], pages: Pages
) -> None:
    async def requests() -> list[tuple[float, dict[str, float], float]]:
        texts = await pages.texts()
        of_workers = [counts(texts[mode], "worker", mode=mode) for mode in ("prefill", "decode")]
        return [counts(texts["router"], "router", model="gemma"), *of_workers]

    async def body() -> None:
        before = await requests()
        for number in range(3):
            assert (await pages.stack.ask(prompt_of(f"phases{number} ", 60)))[0] == 200
        for (was, ended, _), (now, ended_now, in_flight) in zip(before, await requests(), strict=True):
            assert (now - was, in_flight) == (3, 0)
            assert ended_now == {**ended, "completed": ended["completed"] + 3}

    run(body())
