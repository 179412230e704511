"""A model stays shown while workers of it lack: its requests are refused with the reason, not unknown."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.test_forward import FakeCall, run
from tests.router.test_models_faults import Followed, of
from vswa_plugin.registry import Entry
from vswa_plugin.router import models as module
from vswa_plugin.selection import NoCandidate

PREFILL, DECODE = of("m", 11, mode="prefill"), of("m", 21, mode="decode")


class Reachable:
    """Stands for the client of workers that Dynamo's discovery lists, all of them."""

    def instance_ids(self) -> list[int]:
        return [PREFILL.worker_id, DECODE.worker_id]

    def busy(self, worker_id: int) -> bool:
        return False


class Shown(Followed):
    """One model, ``m``, as its workers come and go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)

        async def opened(*_: Any) -> Reachable:
            return Reachable()

        monkeypatch.setattr(module.WorkerClient, "open", opened)

    async def now(self, *entries: Entry) -> list[str]:
        """What is shown with these workers and no others."""
        self.entries.clear()
        self.entries |= {entry.key: entry for entry in entries}
        await self.models.update()
        return self.dynamo.shown

    async def refusal(self) -> str:
        with pytest.raises(NoCandidate) as refused:
            await anext(self.forwarder.forward({"model": "m", "token_ids": [1]}, FakeCall()))  # type: ignore[arg-type]
        return str(refused.value)


@pytest.mark.parametrize("before", [(), (PREFILL, DECODE)], ids=["never_complete", "was_complete"])
@pytest.mark.parametrize(("there", "lacks"), [(PREFILL, "decode"), (DECODE, "prefill")])
def test_a_model_that_lacks_one_phase_is_shown_and_its_requests_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, there: Entry, lacks: str, before: tuple[Entry, ...]
) -> None:
    async def body() -> None:
        shown = Shown(monkeypatch)
        if before:
            await shown.now(*before)
        assert ["m"] == await shown.now(there)
        assert f"start a worker with --mode {lacks}" in await shown.refusal()
        assert 1 == shown.dynamo.tries.count("showing of m")

    run(body())


def test_a_model_without_any_worker_is_shown_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        shown = Shown(monkeypatch)
        await shown.now(PREFILL, DECODE)
        assert ["m"] == await shown.now()
        assert "no worker serves this model right now" == await shown.refusal()
        monkeypatch.setattr(module, "UNSERVED_S", 0.0)
        assert [] == await shown.now()
        assert ["m"] == await shown.now(PREFILL)

    run(body())


def test_the_time_without_workers_begins_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        shown, now = Shown(monkeypatch), 1_000.0
        monkeypatch.setattr(module.Models, "_now", staticmethod(lambda: now))
        await shown.now(PREFILL, DECODE)
        await shown.now()
        now += module.UNSERVED_S - 1
        assert ["m"] == await shown.now()
        assert ["m"] == await shown.now(DECODE)
        assert ["m"] == await shown.now()
        now += module.UNSERVED_S - 1
        assert ["m"] == await shown.now()
        now += 1
        assert [] == await shown.now()

    run(body())


@pytest.mark.parametrize("changes", [{}, {"tool_call_parser": "hermes"}, {"context_length": 64}])
def test_a_card_made_before_all_phases_were_there_is_made_again_only_where_clients_see_a_difference(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    async def body() -> None:
        shown = Shown(monkeypatch)
        decode = of("m", 21, mode="decode", **changes)
        await shown.now(PREFILL)
        for _ in range(2):
            assert ["m"] == await shown.now(PREFILL, decode)
        last = shown.dynamo.cards[-1]
        assert 1 + bool(changes) == len(shown.dynamo.cards)
        assert (decode.tool_call_parser, decode.context_length) == (
            last.tool_call_parser,
            last.context_length,
        )
        await shown.now(decode)
        await shown.now(PREFILL, decode)
        assert 1 + bool(changes) == len(shown.dynamo.cards), "it is complete once and for all"

    run(body())


def test_workers_of_another_block_size_show_the_model_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        shown = Shown(monkeypatch)
        await shown.now(of("m", 1))
        assert ["m"] == await shown.now(of("m", 2, block_size=16))
        assert [32, 16] == [card.block_size for card in shown.dynamo.cards]

    run(body())
