"""Metrics of a fleet: what subscribers count, and a bound on what names ranks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.metrics_helpers import Family, families_of
from tests.router_http_helpers import Api, run
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.following import metrics
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.following.metrics import PIECE, fleet_families
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.wire.events import Rank, Stored, layout_event


async def families(fleet: Fleet) -> dict[str, Family]:
    return families_of(await Page(lambda: About("index"), lambda: fleet_families(fleet)).render())


def test_what_is_malformed_or_foreign_or_fails_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> dict[str, Family]:
        async with Api() as api:
            await api.all_live()
            subscriber = api.fleet.subscriber
            await subscriber._on_message("vswa.v1.ns.backend.1.0.events", b"\xc1")
            await subscriber._on_message("vswa.v1.ns.backend.no-number.0.events", b"")
            await subscriber._on_message("vswa.v1.ns.elsewhere.2.0.events", b"")
            monkeypatch.setattr(api.fleet.index, "join", lambda *_: 1 / 0)
            await api.holds(Rank(9))
            return await families(api.fleet)

    found = run(body())
    values = {name: found[f"vswa_subscriber_{name}_total"].total() for name in (
        "messages", "malformed_messages", "foreign_messages", "given_up_ranks",
    )}  # fmt: skip

    assert {"messages": 7, "malformed_messages": 1, "foreign_messages": 2, "given_up_ranks": 1} == values
    assert 1 == found["vswa_reader_malformed_messages_total"].total(worker="1", dp_rank="0")
    assert 1 == found["vswa_reader_epochs_total"].total(worker="2")


def test_of_too_many_ranks_the_registered_ones_are_named_and_the_rest_are_counted_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "MAX_RANKS", 3)

    async def body() -> dict[str, Family]:
        async with Api() as api:
            for worker_id in range(1, 11):
                await api.holds(Rank(worker_id))
            for worker_id in (4, 7, 9):
                view = api.fleet.subscriber.view(Rank(worker_id))
                assert view is not None
                view.registered = True
            return await families(api.fleet)

    found = run(body())

    for name in ("vswa_rank_state", "vswa_reader_batches_total"):
        assert {"4", "7", "9", "other"} == {each.labels["worker"] for each in found[name].samples}
        assert 10 == found[name].total()
        assert 7 == found[name].total(worker="other")


def test_of_too_many_models_in_the_index_the_rest_are_counted_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "MAX_MODELS", 3)  # that of the registry, and two

    async def body() -> dict[str, Family]:
        async with Api() as api:
            for worker_id in range(1, 6):
                layout = layout_event(CacheLayout((CacheGroup(0, None, 32),), "trtllm_v2", f"m{worker_id}"))
                api.fleet.index.apply(Rank(worker_id), layout)
                api.fleet.index.apply(Rank(worker_id), Stored(0, 0, None, (worker_id,)))
            return await families(api.fleet)

    found = run(body())

    for name in ("vswa_index_ranks", "vswa_index_scored_ranks", "vswa_index_blocks"):
        models = {each.labels["model"] for each in found[name].samples}
        assert len(models) == 3
        assert "other" in models
    assert found["vswa_index_ranks"].total(model="other") >= 3
    assert 5 == found["vswa_index_blocks"].total()


def test_a_rank_that_has_gone_is_on_the_page_no_more() -> None:
    async def body() -> tuple[dict[str, Family], dict[str, Family]]:
        async with Api() as api:
            await api.all_live()
            before = await families(api.fleet)
            api.fleet.subscriber.withdraw(Rank(2))
            return before, await families(api.fleet)

    before, after = run(body())
    of_two = [
        name for name, each in before.items() if any(s.labels.get("worker") == "2" for s in each.samples)
    ]

    assert len(of_two) > 10
    assert [] == [name for name in of_two if any(s.labels["worker"] == "2" for s in after[name].samples)]


def test_a_rank_that_goes_while_its_page_is_written_spoils_nothing() -> None:
    async def body() -> Any:
        async with Api() as api:
            await api.all_live()
            made = []
            for family in fleet_families(api.fleet):
                made.append(family)
                for rank in [view.source.rank for view in api.fleet.subscriber.views()][:1]:
                    api.fleet.subscriber._forget(api.fleet.subscriber.view(rank))  # type: ignore[arg-type]
            return made

    assert run(body())


def test_no_piece_has_more_than_a_few_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: a piece is written without a turn for others."""
    ranks = 5 * PIECE

    async def body() -> list[tuple[str, int]]:
        async with Api() as api:
            for worker_id in range(1, ranks + 1):
                await api.holds(Rank(worker_id))
            pieces = [*fleet_families(api.fleet)]
            return [(each.name, len({s.labels.get("worker") for s in each.samples})) for each in pieces]

    pieces = asyncio.run(body())

    assert PIECE == max(count for _, count in pieces)
    assert ranks == sum(count for name, count in pieces if name == "vswa_rank_state")
