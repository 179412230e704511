"""One front door for prefill and decode workers: Dynamo's frontend, the router, hidden workers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import engine_metric, eventually, long_prompt, post
from tests.router_helpers import Echo, Stack, logged, prompt_of
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.launch.processes import Child

PROMISED = r"prefill rank \S+ at cost \S+ promises (\d+) of"


@pytest.fixture(scope="module")
def stack(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Two echo workers of each kind."""
    made = Stack(tmp_path_factory.mktemp("apart"), brokers.env, model_dir, "apart")

    async def start() -> None:
        kinds = (("prefill", "prefill"), ("prefill", "prefill"), ("echo", "decode"), ("echo", "decode"))
        await asyncio.gather(
            made.start("--log-level", "debug"),
            *(made.echo(component=component, mode=mode) for component, mode in kinds),
        )
        await made.shows("gemma")
        await eventually(lambda: made.routers[0].log().count("joins") == 4, "all workers are used")

    try:
        run(start())
        yield made
    finally:
        codes = run(made.stop())
    assert {code for name, code in codes.items() if name not in made.killed} == {0}, codes


def of_mode(stack: Stack, mode: str) -> list[Echo]:
    return [echo for echo in stack.echoes if echo.options["mode"] == mode]


def served(stack: Stack, mode: str, key: str = "request") -> list[dict[str, Any]]:
    return [line for echo in of_mode(stack, mode) for line in echo.said(key)]


def cached_tokens(answer: dict[str, Any]) -> int:
    cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return cached


def test_a_repeated_prompt_is_computed_where_it_is_cached_and_decoded_elsewhere(
    run: Run[Any], stack: Stack
) -> None:
    async def body() -> list[int]:
        answers = [await stack.ask(prompt_of("again")) for _ in range(4)]
        assert [status for status, _ in answers] == [200] * 4
        return [cached_tokens(answer) for _, answer in answers]

    cached = run(body())
    computed, decoded = served(stack, "prefill"), served(stack, "decode")
    promised = logged(stack.routers[0], PROMISED)

    assert cached[0] == 0
    assert cached[1:] == [cached[1]] * 3
    assert cached[1] > 300
    assert [int(tokens) for tokens in promised[-4:]] == cached
    assert sorted(each["handed"][0] for each in decoded) == sorted(each["request"] for each in computed)
    assert [bool(echo.said("request")) for echo in of_mode(stack, "prefill")].count(True) == 1


@pytest.mark.parametrize("phase", ["prefill-", ""])
@pytest.mark.parametrize(
    ("wish", "status", "message"),
    [("invalid", 400, "the echo refuses this prompt"), ("full", 503, ""), ("broken", 500, "")],
)
def test_a_refusal_of_either_worker_reaches_the_client(
    run: Run[Any], stack: Stack, phase: str, wish: str, status: int, message: str
) -> None:
    got, answer = run(stack.ask(prompt_of(wish), phase + wish))

    assert got == status
    assert message in answer["message"]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_client_that_goes_stops_the_worker_that_is_at_work(run: Run[Any], stack: Stack, mode: str) -> None:
    async def body() -> None:
        wish = "prefill-hang" if mode == "prefill" else "hang"
        stopped = len(served(stack, mode, "stopped"))
        asking = asyncio.create_task(stack.ask(prompt_of(f"leaver {mode}"), wish))

        def at_work() -> bool:
            return any(each["wish"] == "hang" for each in served(stack, mode))

        await eventually(at_work, "the worker is at work")
        asking.cancel()
        await eventually(lambda: len(served(stack, mode, "stopped")) > stopped, "the worker is told")
        assert mode == "decode" or not any(each["wish"] == "hang" for each in served(stack, "decode"))

    run(body())


@pytest.mark.parametrize("wish", ["prefill-die:0", "die:9"])
def test_a_worker_of_either_kind_that_dies_is_not_noticed_by_the_client(
    run: Run[Any], stack: Stack, wish: str
) -> None:
    async def body() -> tuple[str, str]:
        undisturbed = "".join([p async for p in stack.stream(prompt_of(wish), max_tokens=40)])
        (stack.folder / "die").touch()
        text = "".join([p async for p in stack.stream(prompt_of(wish), wish, max_tokens=40)])
        assert not (stack.folder / "die").exists()
        await stack.replace_the_dead()
        return undisturbed, text

    undisturbed, text = run(body())

    assert text == undisturbed
    assert len(text) > 40


def test_a_model_that_lacks_one_kind_of_worker_is_shown_and_answers_503(run: Run[Any], stack: Stack) -> None:
    log = stack.routers[0].log

    async def answers(status: int) -> Any:
        """What its requests get from now on."""

        async def answered() -> bool:
            nonlocal answer
            got, answer = await stack.ask(prompt_of("half", 20), model="half")
            return bool(got == status)

        answer: Any = None
        await eventually(answered, f"status {status}")
        return answer

    async def body() -> Any:
        one = {"model": "half", "component": "half"}
        decode = await stack.echo(mode="decode", **one)
        await eventually(lambda: "model 'half' cannot be served: no prefill worker" in log(), "it is said")
        await stack.shows("gemma", "half")
        assert (await answers(503))["message"]
        await stack.echo(mode="prefill", **one)
        answer = await answers(200)
        await decode.child.stop()
        assert (await answers(503))["message"]
        assert await stack.models() == ["gemma", "half"]
        await stack.echo(mode="agg", **one)
        await answers(200)
        return answer

    assert run(body())["model"] == "half"


# -- real engines --------------------------------------------------------------------------------------

GREEDY = {"temperature": 0, "ignore_eos": True}


class Engines:
    """Two prefill and two decode engines behind the router, and Dynamo's round robin over the same."""

    def __init__(self, stack: Stack, round_robin: str, prefills: list[Child]) -> None:
        self.stack = stack
        self.round_robin = round_robin
        self._prefills = prefills

    async def computed(self) -> float:
        """Prompt tokens that the prefill engines have computed."""
        return sum([await engine_metric(each, "prefill_tokens") for each in self._prefills])


@asynccontextmanager
async def engines(brokers: Brokers, model_dir: Path, folder: Path) -> AsyncIterator[Engines]:
    stack = Stack(folder, brokers.env, model_dir, "pairs")
    kinds = [("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2)]
    try:
        *workers, _ = await asyncio.gather(
            *(stack.engine(f"{mode}-{number}", mode) for mode, number in kinds),
            stack.start("--log-level", "debug"),
        )
        await eventually(lambda: stack.routers[0].log().count("joins") == 4, "all workers are used", 30)
        await stack.shows("gemma")
        yield Engines(stack, await stack.stock("round-robin"), workers[:2])
    finally:
        codes = await stack.stop()
    assert set(codes.values()) == {0}, codes


def test_real_engines_answer_as_one_does_alone_and_compute_less_than_by_round_robin(
    run: Run[Any], brokers: Brokers, cluster: Cluster, model_dir: Path, tmp_path: Path
) -> None:
    async def talk(made: Engines, name: str, url: str = "") -> tuple[list[int], float]:
        """Three conversations of four turns each, turn by turn; cached tokens, and what was computed."""
        before, cached = await made.computed(), []
        for turn, who in itertools.product(range(4), "abc"):
            prompt = long_prompt(f"{name} {who}", 24 + 4 * turn)
            status, answer = await made.stack.ask(prompt, url=url, max_tokens=2, **GREEDY)
            assert status == 200, answer
            cached.append(cached_tokens(answer))
        return cached, await made.computed() - before

    async def body() -> None:
        async with engines(brokers, model_dir, tmp_path) as made:
            prompt = long_prompt("pairs", 60)
            request = {"model": "gemma", "prompt": prompt, "max_tokens": 24, **GREEDY}
            _, alone = await post(cluster, "/v1/completions", request)
            for _ in range(2):
                _, together = await made.stack.ask(prompt, max_tokens=24, **GREEDY)
                assert together["choices"][0]["text"] == alone["choices"][0]["text"]
            assert cached_tokens(together) > together["usage"]["prompt_tokens"] - 33, "the second time"

            cached, exact = await talk(made, "exact")
            _, round_robin = await talk(made, "stock", made.round_robin)
            promised = logged(made.stack.routers[0], PROMISED)

            assert max(cached[:3]) < 32 < 400 < min(cached[3:])
            assert [int(tokens) // 32 for tokens in promised[-12:]] == [tokens // 32 for tokens in cached]
            assert exact < 0.75 * round_robin, "prompt tokens that the engines computed"

    run(body())
