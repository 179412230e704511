"""The preprocessor's models follow the workers in the registry."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
import pytest

from tests.router_http_helpers import entry_of
from vswa_plugin.dynamo.client import ModelCard
from vswa_plugin.registry import Entry
from vswa_plugin.router.models import RETRY_S
from vswa_plugin.router.picker.models import ShownModels
from vswa_plugin.router.pools import grouped


class Preprocessor:
    """Keeps what is shown; fails while it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.fails = False

    async def show(self, card: ModelCard) -> None:
        self.calls.append((card.name, card.tool_call_parser))
        if self.fails:
            raise Exception("no tokenizer")  # as Dynamo raises it

    async def hide(self, name: str) -> None:
        self.calls.append((name, "hidden"))


def test_models_come_change_and_go_with_their_workers_and_what_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    entries: list[Entry] = [entry_of(1, model_path=str(tmp_path))]
    preprocessor = Preprocessor()

    async def body() -> list[list[tuple[str, str | None]]]:
        models = ShownModels(preprocessor, lambda: grouped(entries))
        loop, passed = asyncio.get_running_loop(), 0.0
        time = loop.time
        monkeypatch.setattr(loop, "time", lambda: time() + passed)
        steps = []

        async def step() -> None:
            preprocessor.calls.clear()
            await models.update()
            await models.update()
            steps.append(list(preprocessor.calls))

        await step()
        entries.append(entry_of(2, model_path=str(tmp_path), total_kv_blocks=7))
        await step()  # more room changes nothing for clients
        entries[:] = [msgspec.structs.replace(each, tool_call_parser="hermes") for each in entries]
        preprocessor.fails = True
        await step()
        preprocessor.fails = False
        await step()
        passed = RETRY_S + 1
        await step()
        entries[:] = [entry_of(3, model="gone", model_path="/nowhere")]
        await step()
        return steps

    came, more, failed, waits, again, left = asyncio.run(body())

    assert [("m", None)] == came
    assert [] == more == waits
    assert [("m", "hermes")] == failed == again, "once each"
    assert [("m", "hidden")] == left
    assert "requests of model 'm' cannot be read, and go on without a choice: no tokenizer" in caplog.text
    assert "/nowhere" in caplog.text
