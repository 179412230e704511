"""The verdict of the demo can fail; what it shows follows from events, metrics and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from tests.conftest import Run
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.cli.demo.report import (
    Answer,
    Choice,
    Tally,
    Transfers,
    checks_of_all,
    checks_of_transfers,
    verdict,
)
from vswa_plugin.cli.demo.routing import Choices, checks_of_choices, show_choices
from vswa_plugin.errors import ProtocolError
from vswa_plugin.registry import Entry
from vswa_plugin.wire.events import Batch, Layout, Removed, Source, Stored

SOURCE = Source("dynamo", "backend", 7)
PREFILL = Source("dynamo", "prefill", 8)
GROUPS = (CacheGroup(0, 512, 32), CacheGroup(1, None, 32))
LAYOUT = Layout(GROUPS, "trtllm_v2", "h", "gemma")


def good_answers() -> list[Answer]:
    moved, full = {"512": 10.0, "global": 40.0}, {"512": 80.0, "global": 40.0}
    return [Answer(200, "r", "text", 1500, 1024, moved=moved, full=full) for _ in range(14)]


def good_tally() -> Tally:
    tally = Tally()
    for source in (SOURCE, PREFILL):
        events = (LAYOUT, Stored(0, 0, None, (1, 2)), Stored(1, 0, None, (1, 2)), Removed(0, (1,)))
        tally.add(source, Batch(1, 1, 0, 0, events))
    return tally


def judged(answers: list[Answer], tally: Tally, codes: dict[str, int]) -> int:
    return verdict(checks_of_all(answers, 14, tally, codes), 1.0)


def test_the_verdict_holds_where_all_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(good_answers(), good_tally(), {"worker-0": 0, "decode-0": 0, "etcd": -15}) == 0
    assert "demo passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "tally", "codes"),
    [
        (good_answers()[1:], good_tally(), {}),
        ([*good_answers()[1:], Answer(503)], good_tally(), {}),
        ([Answer(200, "r", "text", 1500, 0)] * 14, good_tally(), {}),
        ([Answer(200, "r", "text", 900, 512)] * 14, good_tally(), {}),
        (good_answers(), Tally(), {}),
        (good_answers(), good_tally(), {"worker-1": 1}),
        (good_answers(), good_tally(), {"prefill-0": -9}),
    ],
)
def test_the_verdict_fails_where_something_was_not_seen(
    answers: list[Answer], tally: Tally, codes: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(answers, tally, codes) == 1
    assert "demo FAILED" in capsys.readouterr().out


MODES = {7: "decode", 8: "prefill"}


def test_the_checks_of_transfers_hold_where_all_was_seen() -> None:
    assert all(checks_of_transfers(good_answers(), MODES, good_tally(), 0, 0).values())


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"modes": {7: "decode", 8: "decode"}}, "prefill and decode workers announced blocks"),
        ({"answers": [Answer(200, "r", "text", 1500, 1024)]}, "KV of every window was moved"),
        (
            {"answers": [Answer(200, "r", "t", moved={"512": 0, "global": 4}, full={"512": 8, "global": 4})]},
            "KV of every window was moved",
        ),
        (
            {"answers": [Answer(200, "r", "t", moved={"512": 8, "global": 4}, full={"512": 8, "global": 4})]},
            "sliding windows moved less than a full cache would have",
        ),
        ({"failures": 1}, "no transfer failed"),
        ({"held": 1}, "nothing is held any more"),
    ],
)
def test_the_checks_of_transfers_name_what_was_not_seen(changes: dict[str, Any], failed: str) -> None:
    good = {"answers": good_answers(), "modes": MODES, "tally": good_tally(), "failures": 0, "held": 0}
    checks = checks_of_transfers(**{**good, **changes})

    assert [what for what, held in checks.items() if not held] == [failed]


def test_blocks_stored_again_for_a_window_that_global_still_holds_are_counted_as_overpromised() -> None:
    tally = good_tally()
    assert tally.recomputed["backend"] == 0

    tally.add(SOURCE, Batch(1, 1, 4, 0, (Stored(0, 0, None, (1,)), Stored(0, 5, 9, (77,)))))
    tally.add(PREFILL, Batch(1, 1, 4, 0, (Stored(0, 0, None, (1, 2)),)))

    assert (tally.recomputed["backend"], tally.recomputed["prefill"]) == (32, 64)
    assert (tally.stored[7, "window 512"], tally.stored[7, "window global"]) == (4, 2)
    assert tally.removed[7, "window 512"] == 1


def test_a_gap_in_the_ids_is_counted() -> None:
    tally = good_tally()
    tally.add(SOURCE, Batch(1, 1, 9, 0, ()))

    assert tally.gaps == 1


@contextmanager
def metrics(gauges: dict[str, float]) -> Iterator[str]:
    """The URL of a status server that shows ``gauges`` as they are when it is asked."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            lines = []
            for name, value in gauges.items():
                base, _, window = name.rpartition("_")
                lines += [f"# TYPE vswa_engine_{base}_total counter"] if window == "512" else []
                lines.append(f'vswa_engine_{base}_total{{dp_rank="0",window="{window}"}} {value}')
            text = "\n".join([*lines, ""])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_full_cache_would_have_moved_follows_from_the_first_prompts_blocks(run: Run[Any]) -> None:
    """1,000 tokens: 32 blocks, of which the window of 512 sees 17; then 4 more blocks of each window."""
    gauges = {"transfer_bytes_512": 500.0, "transfer_bytes_global": 100.0}

    async def body(url: str) -> list[Any]:
        transfers = Transfers([], [url], GROUPS)
        await transfers.begin()
        gauges.update(transfer_bytes_512=500.0 + 17 * 50, transfer_bytes_global=100.0 + 32 * 10)
        first = await transfers.take(1000)
        gauges.update(transfer_bytes_512=500.0 + 21 * 50, transfer_bytes_global=100.0 + 36 * 10)
        return [first, await transfers.take(1100)]

    with metrics(gauges) as url:
        first, second = run(body(url))

    assert first == ({"512": 850.0, "global": 320.0}, {"512": 1600.0, "global": 320.0})
    assert second == ({"512": 200.0, "global": 40.0}, {"512": 200.0, "global": 40.0})


# -- who was chosen ------------------------------------------------------------------------------------

OTHER = Source("dynamo", "backend", 9)
NEW = (LAYOUT, Stored(1, 0, None, (1, 2)), Stored(0, 0, None, (1, 2)), Stored(1, 3, 3, (4,)))
#: A prompt of four blocks, of which worker 7 holds the first two and the last, worker 9 the first.
GOES_ON = (Stored(0, 1, 1, (2, 3, 4, 5)), Stored(1, 1, 1, (2, 3, 4, 5)))


def entry_of(worker_id: int) -> Entry:
    return Entry(
        namespace="dynamo",
        component="backend",
        worker_id=worker_id,
        mode="agg",
        engine="gemma3_cpu",
        served_model_name="gemma",
        model_path="m",
        context_length=100,
        block_size=32,
        rule="trtllm_v2",
        hash_scheme="h",
        groups=GROUPS,
        epochs={0: 1},
        total_kv_blocks=1,
    )


Page = dict[int, tuple[int, int]]
#: What routers have promised before: requests that have finished and tokens, by worker id.
BEFORE: Page = {7: (3, 96), 9: (1, 32)}


def metrics_of(page: Page) -> str:
    """A router's page of metrics; what was reported differs from what was promised."""
    lines = ["# TYPE vswa_router_predictions counter"]
    for worker, (finished, _) in page.items():
        rank = f'worker="{worker}",dp_rank="0"'
        lines += [
            f'vswa_router_predictions_total{{{rank},result="exact"}} {finished - 1}',
            f'vswa_router_predictions_total{{{rank},result="over"}} 1',
        ]
    lines += ['vswa_router_predictions_total{worker="other",dp_rank="",result="exact"} 5']
    for which, more in (("predicted", 0), ("reported", 1000)):
        name = f"vswa_router_{which}_cached_tokens"
        lines += [f"# TYPE {name} counter", f'{name}_total{{worker="other",dp_rank=""}} 160']
        for worker, (_, tokens) in page.items():
            lines.append(f'{name}_total{{worker="{worker}",dp_rank="0"}} {tokens + more}')
    return "\n".join(lines) + "\n"


def chosen(answer: Answer, *after: Page) -> tuple[Choices, Answer]:
    """``answer`` to a prompt whose blocks 2 to 5 worker 9 has stored.

    :param after: what each router has promised when it is there; before it was :data:`BEFORE`, and nothing.
    """
    pages = [[BEFORE, *({} for _ in after[1:])], after]

    async def read() -> list[str]:
        return [metrics_of(page) for page in pages.pop(0)]

    return asyncio.run(_chosen(answer, read if after else None))


async def _chosen(answer: Answer, read: Callable[[], Awaitable[list[str]]] | None) -> tuple[Choices, Answer]:
    tally = Tally()
    tally.add(SOURCE, Batch(1, 1, 0, 0, NEW))
    tally.add(OTHER, Batch(1, 1, 0, 0, (LAYOUT, Stored(1, 0, None, (1,)), Stored(0, 0, None, (1,)))))
    choices = Choices(tally, [entry_of(9), entry_of(7)], read)
    await choices.begin()
    tally.add(PREFILL, Batch(1, 1, 0, 0, (LAYOUT, Stored(1, 9, 77, (78,)))))
    tally.add(OTHER, Batch(1, 1, 3, 0, GOES_ON))
    answer.choice = await choices.take(answer)
    return choices, answer


def test_exact_routers_count_who_was_chosen_and_the_events_tell_what_others_would_have_promised() -> None:
    choices, answer = chosen(Answer(200, "r1", "text", 130, 41), BEFORE, {9: (1, 32)})
    checks = checks_of_choices([answer], choices)

    assert answer.choice == Choice(9, 32, {7: 64, 9: 32})
    assert answer.choice.best_alone() == (7, 64)
    assert choices.names == {7: "A", 9: "B"}
    assert [what for what, held in checks.items() if not held] == ["every worker was chosen"]


def test_of_equal_promises_the_chosen_workers_is_shown_and_blocks_beyond_the_prompt_are_not_promised() -> (
    None
):
    choices, answer = chosen(Answer(200, "r0", "text", 40, 39), {7: (4, 195), 9: (1, 32)})

    assert answer.choice == Choice(7, 99, {7: 32, 9: 32})
    assert answer.choice.best_alone() == (7, 32)
    assert not checks_of_choices([answer], choices)[
        "the global layers alone would have promised what no worker could resume"
    ]


def test_dynamos_frontend_tells_its_choice_in_the_answer() -> None:
    said = {"worker_id": {"prefill_worker_id": 7}, "timing": {"kv_hit_rate": 0.6}}
    choices, answer = chosen(Answer(200, "r1", "text", 130, 64, nvext=said))

    assert answer.choice is not None
    assert (answer.choice.worker_id, answer.choice.promised) == (7, 96)
    assert not choices.kept(answer)
    assert "every promise was kept, in whole blocks" not in checks_of_choices([answer], choices)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ((), "expected worker_id and timing in nvext"),
        ((BEFORE,), "expected one finished request more .* got {}"),
        (({7: (5, 99), 9: (1, 32)},), "expected one finished request more .* got {'7': 2}"),
        (({7: (4, 99), 9: (2, 64)},), "expected one finished request more .* got {'7': 1, '9': 1}"),
    ],
)
def test_a_choice_that_cannot_be_known_is_an_error(after: tuple[Page, ...], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        chosen(Answer(200, "unknown", "text", 130, 64), *after)


def test_the_table_has_a_line_per_worker_and_their_sum(capsys: pytest.CaptureFixture[str]) -> None:
    choices, answer = chosen(Answer(200, "r1", "text", 130, 41), {**BEFORE, 9: (2, 64)})
    show_choices([answer, answer], choices)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]

    assert ["A", "0", "0", "0", "0", "0"] in lines
    assert ["B", "2", "260", "64", "82", "178"] in lines
    assert ["all", "2", "260", "64", "82", "178"] in lines
