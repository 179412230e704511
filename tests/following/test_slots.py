"""Who may send a request to its publisher, and for how long others wait."""

from __future__ import annotations

import asyncio

from tests.cases.follower_helpers import run_in_jumps
from vswa_plugin.following.slots import Slots


async def hold(slots: Slots, seconds: float, name: str, order: list[str], first: bool = False) -> None:
    async with slots.one(first=first):
        order.append(name)
        await asyncio.sleep(seconds)


async def together(slots: Slots, *work: asyncio.Task[None]) -> float:
    """Seconds until all are done."""
    began = asyncio.get_running_loop().time()
    await asyncio.gather(*work)
    return asyncio.get_running_loop().time() - began


def test_so_many_run_at_a_time() -> None:
    async def body() -> float:
        slots, order = Slots(2, 10.0), list[str]()
        return await together(
            slots, *(asyncio.create_task(hold(slots, 1.0, str(each), order)) for each in range(6))
        )

    assert 3.0 == run_in_jumps(body())


def test_what_waits_longer_than_patience_gives_its_place_up_once() -> None:
    async def body() -> tuple[float, int]:
        slots, order = Slots(1, 0.5), list[str]()
        tasks = [asyncio.create_task(hold(slots, 4.0, str(each), order)) for each in range(3)]
        return await together(slots, *tasks), slots._free

    assert (5.0, 1) == run_in_jumps(body())


def test_those_that_answer_go_before_those_that_came_earlier() -> None:
    async def body() -> list[str]:
        slots, order = Slots(1, 10.0), list[str]()
        names = [("a", False), ("b", False), ("c", True), ("d", True)]
        tasks = [asyncio.create_task(hold(slots, 1.0, name, order, first)) for name, first in names]
        await asyncio.gather(*tasks)
        return order

    assert ["a", "c", "d", "b"] == run_in_jumps(body())


def test_a_place_that_was_waited_for_in_vain_is_not_lost() -> None:
    async def body() -> tuple[list[str], int]:
        slots, order = Slots(1, 10.0), list[str]()
        holder = asyncio.create_task(hold(slots, 1.0, "holder", order))
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(hold(slots, 1.0, "cancelled", order))
        last = asyncio.create_task(hold(slots, 1.0, "last", order))
        await asyncio.sleep(0.1)
        holder.cancel()
        while not holder.done():
            await asyncio.sleep(0)
        waiting.cancel()  # its place was given to it just now
        await asyncio.gather(waiting, last, return_exceptions=True)
        return order, slots._free

    assert (["holder", "last"], 1) == run_in_jumps(body())
