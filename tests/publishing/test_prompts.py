"""Prompts on their way to an adapter that names blocks by them, and what it holds back until then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tests.publishing.test_publisher import DirectAdapter, Harness, block
from vswa_plugin.engine.contract import EngineEvent
from vswa_plugin.errors import ProtocolError


class NamingAdapter(DirectAdapter):
    """Holds events back until it is settled; hashes a prompt in as many pieces as it has tokens."""

    wants_prompts = True

    def __init__(self) -> None:
        self.held: list[EngineEvent] = []
        self.settled = 0
        self.left = 0

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        self.held += super().feed(raw)
        return []

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        if not token_ids:
            raise ProtocolError("expected tokens, got none")
        self.left = len(token_ids)

    def prepare(self) -> bool:
        self.left = max(0, self.left - 1)
        return not self.left

    def settle(self) -> list[EngineEvent]:
        self.settled += 1
        held, self.held = self.held, []
        if any(event == block(99) for event in held):
            raise ProtocolError("a block is its own ancestor")
        return held


def test_what_an_adapter_holds_back_is_published_with_the_events_of_its_step() -> None:
    adapter = NamingAdapter()
    harness = Harness(adapter=adapter)

    async def two_steps() -> None:
        harness.offer(block(1), block(2))
        await harness.until(lambda: len(harness.events()) == 3)
        assert 1 == adapter.settled, "once all events of the step are there, and not while nothing comes"
        harness.offer(block(3))

    asyncio.run(harness.during(two_steps))

    assert [1, 2, 1] == [len(batch.events) for batch in harness.sent if batch.events]
    assert 2 == adapter.settled


def test_a_prompt_is_prepared_piece_by_piece_while_nothing_else_is_to_do() -> None:
    adapter = NamingAdapter()
    harness = Harness(adapter=adapter)

    async def a_prompt() -> None:
        harness.publisher.prompt([1] * 50, None, None)
        assert 50 == adapter.left, "not at once"
        await harness.until(lambda: adapter.left == 0)

    asyncio.run(harness.during(a_prompt))


def test_prompts_that_an_adapter_does_not_want_or_cannot_take_do_no_harm() -> None:
    adapter = NamingAdapter()
    harness = Harness(adapter=adapter)
    harness.publisher.prompt([], None, None)
    assert 1 == harness.publisher.ledger.stats.rejected_events

    adapter.wants_prompts = False
    harness.publisher.prompt([1], None, None)
    assert 0 == adapter.left
    Harness().publisher.prompt([1], None, None)


def test_events_that_cannot_be_settled_void_the_epoch_like_those_that_cannot_be_read() -> None:
    harness = Harness(adapter=NamingAdapter())

    async def malformed() -> None:
        harness.offer(block(1))
        await harness.until(lambda: len(harness.events()) == 2)
        harness.offer(block(99))
        await harness.until(lambda: len(harness.events()) == 3)

    asyncio.run(harness.during(malformed))

    assert (1, 1) == (
        harness.publisher.ledger.stats.rejected_events,
        harness.publisher.ledger.stats.restarts,
    )
    assert not harness.publisher.ledger.residency.resident()[1]
