"""The end of a relay: each worker ends once and in order, whatever comes at the same moment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.engine import SourceState
from vswa_plugin.program.life import Life
from vswa_plugin.relay import app
from vswa_plugin.relay.worker import _Watch


@pytest.mark.parametrize("turns", range(5))
def test_a_worker_is_stopped_also_as_its_source_changes(turns: int) -> None:
    """``turns`` of the loop after the source has woken it: the wake-up is on its way."""

    async def body() -> None:
        async def is_listed() -> str | None:
            return None

        source, changed = SimpleNamespace(state=SourceState), asyncio.Event()
        watch = _Watch(source, SimpleNamespace(failure=None), changed, is_listed)  # type: ignore[arg-type]
        waiting = asyncio.create_task(watch.until(lambda: False))
        await asyncio.sleep(0)
        changed.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        ended, _ = await asyncio.wait({waiting}, timeout=10)
        assert ended and waiting.cancelled(), "it runs on"

    asyncio.run(body())


class Ending:
    """A worker of which the end takes until :attr:`may_end`."""

    def __init__(self) -> None:
        self.runs, self.ends, self.may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.has_ended = False

    async def run(self) -> None:
        self.runs.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ends.set()
            await self.may_end.wait()
            self.has_ended = True


class Lists:
    """Dynamo's instances."""

    def __init__(self) -> None:
        self.found: dict[int, str] = {7: "10.0.0.7"}

    async def at(self, _: EndpointName) -> Mapping[int, str]:
        return self.found


def test_a_worker_whose_instance_has_just_gone_ends_in_order_as_the_relay_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        worker, lists, life = Ending(), Lists(), Life("vswa relay")
        monkeypatch.setattr(app, "RelayedWorker", lambda *_: worker)
        args: Any = SimpleNamespace(nats_server="nats://127.0.0.1:4222")
        relay = app.Relay(args, SimpleNamespace(metrics=None), life)  # type: ignore[arg-type]
        relay._shared = SimpleNamespace(instances=lists)  # type: ignore[assignment]
        every: Any = SimpleNamespace(
            endpoint=EndpointName("n", "c", "e"), of_instance=lambda *_: SimpleNamespace(name="one")
        )
        relay._following.append(life.tasks.start(relay._follow(every), "follow"))
        await worker.runs.wait()
        lists.found = {}
        await worker.ends.wait()
        leaving = asyncio.create_task(relay.leave())
        await asyncio.sleep(0)
        assert not leaving.done()
        worker.may_end.set()
        await leaving
        assert worker.has_ended
        assert [] == life.tasks.names

    asyncio.run(body())
