"""One worker with an odd layout or an odd registry entry leaves the rest of the fleet in sight."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cases.follower_helpers import (
    GOOD,
    GROUPS,
    HELD,
    LAYOUT,
    PROMPT,
    STRANGE,
    UNKNOWN_RULE,
    HandedIn,
    Told,
    entry_of,
    outcome,
    run_in_jumps,
)
from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.following.fleet import Fleet, RankStatus
from vswa_plugin.following.metrics import fleet_families
from vswa_plugin.program.metrics import About, Page
from vswa_plugin.registry import Connected, Entry, Joined, Left, Updated, encode_entry
from vswa_plugin.registry.entry_files import file_name
from vswa_plugin.registry.file import FOLDER, FileRegistry
from vswa_plugin.testing.streams import LAYOUT as PUBLISHED
from vswa_plugin.testing.streams import Publishing, running
from vswa_plugin.wire.events import Rank, Source, layout_event

NEW = Rank(3)
NO_SUCH_RULE = layout_event(CacheLayout(GROUPS, UNKNOWN_RULE, "m"))


@asynccontextmanager
async def fleet_of_two() -> AsyncIterator[tuple[Fleet, HandedIn, Told]]:
    """Both are registered; ``GOOD`` holds a block, the layout of ``STRANGE`` names a rule of nobody."""
    transport, registry = HandedIn(), Told()
    fleet = Fleet(transport, registry)  # type: ignore[arg-type]
    starting = asyncio.create_task(fleet.start(5))
    await registry.tell(
        Joined(entry_of(1, epochs={0: 4})), Joined(entry_of(2, epochs={0: 4}, rule=UNKNOWN_RULE)), Connected()
    )
    await starting
    await transport.hear(GOOD, 0, layout_event(LAYOUT), HELD)
    await transport.hear(STRANGE, 0, NO_SUCH_RULE)
    try:
        yield fleet, transport, registry
    finally:
        await fleet.stop()


# -- a rule that this router does not know -----------------------------------------------------------


def test_metrics_are_shown_of_every_rank_though_the_index_refuses_the_layout_of_one() -> None:
    async def body() -> str:
        async with fleet_of_two() as (fleet, _, _):
            return await Page(lambda: About("index"), lambda: fleet_families(fleet)).render()

    page = run_in_jumps(body())
    shown = [f'vswa_reader_batches_total{{dp_rank="0",worker="{number}"}} 1.0' in page for number in (1, 2)]

    assert ([True, True], True) == (shown, 'vswa_index_ranks{model="m"} 1.0' in page), page


def test_a_status_is_given_of_every_rank_and_says_why_one_is_not_scored() -> None:
    async def body() -> list[RankStatus] | str:
        async with fleet_of_two() as (fleet, _, _):
            return outcome(fleet.statuses, time.time_ns())

    statuses = run_in_jumps(body())

    assert not isinstance(statuses, str), statuses
    assert [(1, "live"), (2, "unreadable")] == [(each.source.worker_id, each.state) for each in statuses]
    assert UNKNOWN_RULE in statuses[1].reason
    assert {} == statuses[1].blocks


def test_workers_join_and_leave_after_an_update_of_one_whose_layout_is_refused() -> None:
    async def body() -> tuple[set[int], dict[Rank, int]]:
        async with fleet_of_two() as (fleet, transport, registry):
            await registry.tell(Updated(entry_of(2, epochs={0: 6}, rule=UNKNOWN_RULE)))
            await registry.tell(Joined(entry_of(3, epochs={0: 4})), Left(entry_of(1, epochs={0: 4})))
            await transport.hear(NEW, 0, layout_event(LAYOUT), HELD)
            return {each.worker_id for each in fleet.entries.values()}, fleet.index.score(*PROMPT)

    assert ({2, 3}, {NEW: 32}) == run_in_jumps(body())


def test_a_worker_whose_layout_is_refused_can_leave() -> None:
    async def body() -> tuple[set[int], list[Rank]]:
        async with fleet_of_two() as (fleet, _, registry):
            await registry.tell(Left(entry_of(2, epochs={0: 4}, rule=UNKNOWN_RULE)))
            ranks = [view.source.rank for view in fleet.subscriber.views()]
            return {each.worker_id for each in fleet.entries.values()}, ranks

    assert ({1}, [GOOD]) == run_in_jumps(body())


# -- a registry entry that no worker of ours writes --------------------------------------------------


class Watched:
    """A fleet that reads entries which are put into a directory by hand."""

    def __init__(self, directory: Path) -> None:
        self.transport = HandedIn()
        self.fleet = Fleet(self.transport, FileRegistry(directory, poll_s=0.01))  # type: ignore[arg-type]
        self._folder = directory / FOLDER
        self._marks = 100

    async def __aenter__(self) -> Watched:
        await self.fleet.start(5)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.fleet.stop()

    async def put(self, entry: Entry) -> None:
        draft = self._folder / "draft"
        draft.write_bytes(encode_entry(entry))
        draft.rename(self._folder / file_name(entry.key))
        await self.is_read()

    async def take_away(self, entry: Entry) -> None:
        (self._folder / file_name(entry.key)).unlink()
        await self.is_read()

    async def is_read(self) -> None:
        """Return once an entry that was written after all others is known."""
        self._marks += 1
        mark = entry_of(self._marks)
        (self._folder / file_name(mark.key)).write_bytes(encode_entry(mark))
        await eventually(lambda: mark.key in self.fleet.entries, "a later entry is seen", 1.5)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param({"namespace": "a.b"}, id="namespace"),
        pytest.param({"component": "b*"}, id="component"),
    ],
)
def test_workers_are_seen_after_one_with_an_odd_name_came_and_left(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    async def body() -> list[bool]:
        async with Watched(tmp_path) as watched:
            strange = entry_of(2, **odd)
            await watched.put(strange)
            await watched.take_away(strange)
            await watched.put(entry_of(3))
            return [entry_of(3).key in watched.fleet.entries, strange.key in watched.fleet.entries]

    assert [True, False] == asyncio.run(body())


def test_a_worker_is_followed_after_its_entry_named_an_epoch_that_does_not_fit_64_bits(
    tmp_path: Path,
) -> None:
    async def body() -> dict[Rank, int]:
        async with Watched(tmp_path) as watched:
            await watched.put(entry_of(3, epochs={0: 2**70}))
            await watched.put(entry_of(3, epochs={0: 5}))
            await watched.transport.hear(NEW, 0, layout_event(LAYOUT), HELD, epoch=6)
            return watched.fleet.index.score(*PROMPT)

    assert {NEW: 32} == asyncio.run(body())


# -- as a user meets it ------------------------------------------------------------------------------


def test_vswa_index_shows_every_worker_though_it_does_not_know_the_rule_of_one(
    brokers: Brokers, run: Run[Any], tmp_path: Path
) -> None:
    namespace = own_namespace("unknown-rule")
    workers = [Publishing(brokers.nats_server, Source(namespace, "b", number)) for number in (1, 2)]
    workers[1].residency.layout = msgspec.structs.replace(PUBLISHED, rule=UNKNOWN_RULE)
    program = Path(sys.executable).with_name("vswa")
    environment = {**os.environ, "NATS_SERVER": brokers.nats_server, "VSWA_REGISTRY": f"file:{tmp_path}"}

    async def body() -> tuple[str, str]:
        registries = [FileRegistry(tmp_path) for _ in workers]
        async with running(*workers):
            for registry, worker in zip(registries, workers, strict=True):
                layout = worker.residency.layout
                await registry.join(
                    entry_of(
                        worker.source.worker_id,
                        namespace=namespace,
                        component="b",
                        rule=layout.rule,
                        groups=layout.groups,
                        epochs={0: worker.publisher.ledger.epoch},
                    )
                )
            process = await asyncio.create_subprocess_exec(
                program,
                *("index", "--once", "--json", "--timeout", "2", "--namespace", namespace),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, errors = await asyncio.wait_for(process.communicate(), 20)
            for registry in registries:
                await registry.close()
        return out.decode(), errors.decode()

    out, errors = run(body())

    assert "Traceback" not in errors, errors[-2000:]
    shown = {each["source"]["worker_id"]: each["state"] for each in json.loads(out)["ranks"]}
    assert {"1": "live", "2": "unreadable"} == shown
