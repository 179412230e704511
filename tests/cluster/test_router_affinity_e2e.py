"""Sticky sessions through the whole front door: Dynamo's frontend, a router with the plugin, echo workers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, get
from tests.router_helpers import Echo, Stack, prompt_of
from vswa_plugin.launch.processes import free_port

OPTIONS = "affinity: {mode: hard, ttl_s: 600}\n"


def test_a_session_stays_on_its_busy_worker_until_that_is_gone(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    stack = Stack(tmp_path, brokers.env, model_dir, "affinity")
    (tmp_path / "options.yaml").write_text(OPTIONS)
    port = free_port()

    async def served_by(name: str, session: str = "") -> Echo:
        before = {echo: len(echo.said("request")) for echo in stack.echoes}
        assert 200 == (await stack.ask(prompt_of(name, 40), session=session))[0]
        (server,) = (echo for echo in stack.echoes if len(echo.said("request")) > before[echo])
        return server

    async def body() -> tuple[Echo, list[Echo], list[Echo], list[Echo], str]:
        options = ("--plugin-options", str(tmp_path / "options.yaml"), "--http-port", str(port))
        await asyncio.gather(stack.start(*options), stack.echo(), stack.echo())
        await stack.shows("gemma")
        for echo in stack.echoes:
            await stack.used(lambda echo=echo: bool(echo.said("request")))  # type: ignore[misc]
        first = await served_by("turn", "conversation")
        count = len(first.said("request"))
        hanging = asyncio.create_task(stack.ask(prompt_of("long"), "hang", session="conversation"))
        await eventually(lambda: len(first.said("request")) > count, "the session's worker is busy")
        kept = [await served_by(f"turn{turn}-", "conversation") for turn in range(4)]
        others = [await served_by(f"other{turn}-") for turn in range(4)]
        hanging.cancel()
        with suppress(asyncio.CancelledError):
            await hanging
        await eventually(lambda: bool(first.said("stopped")), "the long request has ended")
        await first.child.stop()
        moved = [await served_by(f"later{turn}-", "conversation") for turn in range(2)]
        return first, kept, others, moved, (await get(f"http://127.0.0.1:{port}/metrics"))[1]

    try:
        first, kept, others, moved, page = run(body())
    finally:
        codes = run(stack.stop())
    (second,) = (echo for echo in stack.echoes if echo is not first)

    assert [first] * 4 == kept
    assert [second] * 4 == others
    assert [second] * 2 == moved
    for outcome, count in (("new", 1), ("kept", 6), ("moved", 0), ("lost", 1)):
        assert f'vswa_affinity_choices_total{{outcome="{outcome}"}} {count}' in page.splitlines()
    assert "vswa_affinity_sessions 1" in page.splitlines()
    assert {0} == set(codes.values()), codes
