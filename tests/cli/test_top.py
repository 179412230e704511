"""The live display of ``vswa index``: what it shows, in how much room, and what stands out."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console

from tests.router_http_helpers import PROMPT, A, Api, B, entry_of, run, stored
from vswa_plugin.cli.main import main
from vswa_plugin.cli.pages import MAX_BYTES, Pages, WorkerNumbers, kept_of, worker_numbers
from vswa_plugin.cli.top import Rates, display
from vswa_plugin.following.fleet import RankStatus
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Rank, Source

LONG = 2**64 - 1


def status(worker_id: int = LONG, state: str = "live", **changes: Any) -> RankStatus:
    given = {
        "source": Source("ns", "backend", worker_id, 0),
        "model": "m",
        "state": state,
        "reason": "",
        "registered": True,
        "epoch": 5,
        "next_event_id": 1_000,
        "lag_ms": 3.0,
        "blocks": {"32": {"device": 1_234_567, "host": 89}, "global": {"device": 50}},
    }
    return RankStatus(**{**given, **changes})


def shown(*statuses: RankStatus, colours: bool = False, width: int = 80, **known: Any) -> str:
    entries = {f"{n}": entry_of(each.source.worker_id) for n, each in enumerate(statuses)}
    content = display(
        statuses,
        WindowIndex().stats(),
        known.get("entries", entries),
        known.get("rates", {}),
        known.get("workers", {}),
        known.get("kept", {}),
    )
    system: Any = "standard" if colours else None
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False, force_terminal=colours, color_system=system)
    console.print(content)
    return file.getvalue()


def test_the_largest_numbers_fit_80_columns_and_no_id_is_shortened() -> None:
    rank = Rank(LONG)
    text = shown(
        status(state="unreadable"),
        rates={rank: 99_999.0},
        workers={LONG: WorkerNumbers(9_999, 100.0, 100.0)},
        kept={rank: 1.0},
    )

    assert f"{LONG}/0 !unreadable 32     1234567+89" in text
    for number in ("99999", "9999", "100%", "50%"):
        assert f" {number}" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert f"{LONG}/0 " in shown(status(), width=50)


def test_ranks_in_trouble_come_first_and_stand_out_with_and_without_colours() -> None:
    ranks = [status(1), status(2, "silent", reason="heartbeats are missing"), status(3, "stale"), status(4)]
    plain, coloured = shown(*ranks), shown(*ranks, colours=True)
    order = [line.split("/0")[0] for line in plain.splitlines() if "/0 " in line]

    assert ["2", "3", "1", "4"] == order
    assert "1 silent   1 stale   2 live" in plain.splitlines()[0]
    assert "!silent" in plain and "!stale" in plain and "\x1b" not in plain
    assert "\x1b[1;37;41m!silent" in coloured
    assert "2/0: heartbeats are missing" in plain


def test_what_is_not_known_is_a_dash_and_full_is_said_where_the_capacity_is() -> None:
    (first, second) = shown(status(7)).splitlines()[2:4]

    assert first.split() == ["7/0", "live", "32", "1234567+89", "-", "-", "-", "-", "-"]
    assert second.split() == ["global", "50", "50%"]


def test_windows_that_share_a_pool_have_a_line_for_it() -> None:
    blocks = {"32": {"device": 30}, "global": {"device": 20}}
    entry = entry_of(7, rule="vllm", total_kv_blocks=200)
    lines = shown(status(7, blocks=blocks), entries={"k": entry}).splitlines()

    assert lines[-1].split() == ["pool", "50", "25%"]


def test_a_rate_is_of_the_events_since_the_last_look_and_of_one_epoch() -> None:
    now = [10.0]
    rates, rank = Rates(lambda: now[0]), Rank(1)
    looks = []
    for seconds, epoch, next_id in ((0, 5, 100), (2, 5, 150), (2, 5, 150), (2, 6, 300), (2, 6, 310)):
        now[0] += seconds
        looks.append(rates.of([status(1, epoch=epoch, next_event_id=next_id)]).get(rank))

    assert [None, 25.0, 0.0, None, 5.0] == looks


PAGE = """\
# TYPE vswa_worker_requests_in_flight gauge
vswa_worker_requests_in_flight{model="m",mode="agg"} 2.0
vswa_worker_requests_in_flight{model="n",mode="agg"} 1.0
# TYPE vswa_prompt_tokens_total counter
vswa_prompt_tokens_total{model="m",mode="agg"} 400.0
vswa_prompt_tokens_total{model="m",mode="decode"} 1000.0
# TYPE vswa_cached_tokens_total counter
vswa_cached_tokens_total{model="m",mode="agg"} 100.0
vswa_cached_tokens_total{model="m",mode="decode"} 1000.0
"""


def test_load_and_hits_are_read_from_a_workers_page_but_not_what_was_handed_over() -> None:
    assert WorkerNumbers(3, 400.0, 100.0) == worker_numbers(PAGE)
    assert 0.25 == worker_numbers(PAGE).hit
    assert (None, None) == (worker_numbers("").load, worker_numbers("").hit)


def test_pages_that_are_away_slow_wrong_or_too_long_cost_their_own_numbers_alone() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        match request.path.split("/")[1]:
            case "fine":
                return web.Response(text=PAGE)
            case "wrong":
                return web.Response(text="{")
            case "long":
                return web.Response(body=b"#" * (MAX_BYTES + 1))
            case _:
                return web.Response(status=500)

    async def body() -> dict[int, WorkerNumbers]:
        app = web.Application()
        app.router.add_get("/{tail:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        urls = [
            f"{url}/fine",
            f"{url}/wrong",
            f"{url}/long",
            f"{url}/broken",
            "http://127.0.0.1:1",
            "nonsense",
            None,
        ]
        pages = Pages(
            {str(n): entry_of(n, status_url=each) for n, each in enumerate(urls)}, "http://127.0.0.1:1"
        )
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            await pages.read(session)
        await runner.cleanup()
        assert pages.kept == {}
        return pages.workers

    assert {0: WorkerNumbers(3, 400.0, 100.0)} == run(body())


def test_promises_kept_are_those_of_the_routers_overview() -> None:
    async def body() -> Any:
        async with Api() as api, aiohttp.ClientSession() as session:
            await api.all_live()
            await api.holds(A, stored(sliding=[3, 4], whole=range(5)))
            for reused in (80, 80, 80, 16):
                _, chosen = await api.post("/select", token_ids=PROMPT)
                await api.post("/release", selection_id=chosen["selection_id"], cached_tokens=reused)
            pages = Pages({}, api.url + "/")
            await pages.read(session)
            return pages.kept

    assert {A: 0.75} == run(body())
    assert {} == kept_of(b"{}") == kept_of(b"\xff") and B not in kept_of(b"[]")


@pytest.mark.parametrize("url", ["127.0.0.1:8090", "ftp://x", ""])
def test_a_router_that_is_no_url_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["index", "--router", url])
    assert "--router: expected a URL such as http://127.0.0.1:8090" in capsys.readouterr().err


def test_the_pages_are_read_again_and_again_until_cancelled() -> None:
    async def body() -> int:
        asked = 0
        both = asyncio.Event()

        class Counting(Pages):
            async def read(self, session: aiohttp.ClientSession) -> None:
                nonlocal asked
                asked += 1
                if asked == 2:
                    both.set()

        pages = Counting({})
        task = asyncio.create_task(pages.follow())
        await both.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return asked

    assert 2 == run(body())
