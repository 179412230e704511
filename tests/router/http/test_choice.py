"""What a router would choose, over HTTP, and as `vswa explain --choice` shows it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vswa_plugins.placement import Placement

from tests.registry_helpers import entry
from tests.router_http_helpers import PROMPT, A, Api, B, run, stored
from vswa_plugin.cli.choice import lines, show_choice
from vswa_plugin.cli.main import main
from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.router.http.messages import ChoiceAnswer, RankText


def placement() -> PluginHost:
    host = PluginHost()
    host.register(Placement(lambda: 0.0), "placement")
    host.options({"placement": Section({"mode": "placement"}, "a test", "placement")})
    return host


def test_the_choice_names_the_winner_the_promises_and_the_terms() -> None:
    async def body() -> Any:
        async with Api(hooks=placement()) as api:
            await api.holds(A)
            await api.holds(B, stored(sliding=range(8), whole=range(8)))
            return await api.post("/choice", token_ids=PROMPT, model_name="m")

    status, found = run(body())

    assert 200 == status
    assert ["2", 0] == next(each["rank"] for each in found if each["chosen"])
    assert 1 == sum(each["chosen"] for each in found)
    assert all({"wait", "compute", "evicted", "total"} <= set(each["terms"]) for each in found)
    winner = min(found, key=lambda each: each["cost"])
    assert winner["chosen"] and winner["cached_tokens"] > 0


def test_without_the_plugin_there_are_costs_and_no_terms() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.holds(A)
            return await api.post("/choice", token_ids=PROMPT, model_name="m")

    _, found = run(body())

    assert all({} == each["terms"] and 0 == each["added"] for each in found)


def answer(worker: str, cost: float, chosen: bool = False, **terms: float) -> ChoiceAnswer:
    return ChoiceAnswer(RankText(worker, 0), "agg", 64, cost, 0.0, chosen, terms)


def test_people_are_shown_why_the_winner_won() -> None:
    winner = answer("7", 10.0, True, wait=0.5, compute=0.1, price=3.0, evicted=12.0)
    loser = answer("8", 40.0, wait=0.2, compute=0.4, price=3.0, evicted=0.0)
    shown = lines("agg", [loser, winner])

    assert "-> rank 7.0: cost 10.0, promises 64 tokens" == shown[1]
    assert "evicted 12 blocks" in shown[2] and "price x3.0" in shown[2]
    assert "   the winner is 30.0 blocks cheaper than the next, most of all by compute (0.900 s)" == shown[-1]


def test_a_router_that_is_not_there_and_what_is_no_url() -> None:
    asking = entry(0)
    with pytest.raises(ConfigError, match="--router: expected a URL"):
        asyncio.run(show_choice("localhost:80", [1], asking, 1.0, False))
    with pytest.raises(ConnectError, match=r"--router: cannot reach http://127.0.0.1:1/choice"):
        asyncio.run(show_choice("http://127.0.0.1:1/", [1], asking, 1.0, False))


def test_the_command_shows_the_answer_of_a_router(capsys: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        async with Api(hooks=placement()) as api:
            await api.holds(A)
            served = api.fleet.entries[next(iter(api.fleet.entries))]
            assert 0 == await show_choice(api.url, list(PROMPT), served, 5.0, False)
            with pytest.raises(ConfigError, match="answered 400"):
                await show_choice(api.url, [-1], served, 5.0, False)

    run(body())

    assert "agg: 3 ranks, costs in blocks" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--choice"], ["--router", "http://127.0.0.1:8090"]])
def test_choice_and_router_go_together(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["explain", "--token-ids", "1,2", *options])
    assert "--choice" in capsys.readouterr().err
