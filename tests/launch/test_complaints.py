"""What a frontend complains of reaches whoever waits for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.e2e_helpers import eventually
from vswa_plugin.errors import ConnectError
from vswa_plugin.launch.complaints import Complaints, complaint_in
from vswa_plugin.launch.processes import Child

#: As Dynamo 1.6.1 writes it, with and without colours.
LINE = (
    "\x1b[2m2026-11-30T15:20:51.529338Z\x1b[0m \x1b[33m WARN\x1b[0m "
    "\x1b[2mdynamo_llm::discovery::controller\x1b[0m\x1b[2m:\x1b[0m Model materialization failed; scheduling "
    'retry \x1b[3mgroup\x1b[0m\x1b[2m=\x1b[0m["{model}","[\\"ns\\",\\"backend\\",\\"generate\\"]"] '
    "\x1b[3mattempt\x1b[0m\x1b[2m=\x1b[0m3 \x1b[3mretry_ms\x1b[0m\x1b[2m=\x1b[0m4000 "
    '\x1b[3merror\x1b[0m\x1b[2m=\x1b[0m"{reason}"\n'
)


def line(model: str, reason: str) -> str:
    return LINE.replace("{model}", model).replace("{reason}", reason)


def test_the_last_reason_that_a_log_gives_for_the_model_is_the_complaint() -> None:
    log = (
        line("gemma", "the first") + line("gemma", "no prompt formatter") + line("other", "its own") + "end\n"
    )

    assert "no prompt formatter" == complaint_in(log, "gemma")
    assert "its own" == complaint_in(log, "other")
    assert complaint_in(log, "gemm") is None
    assert complaint_in("", "gemma") is None


def test_a_line_of_another_form_is_shown_as_it_is() -> None:
    assert 'Model materialization failed ["gemma"' == complaint_in(
        'Model materialization failed ["gemma"', "gemma"
    )


async def complaining(folder: Path) -> Child:
    """A frontend that has written its complaint."""
    script = f"import time; print({line('gemma', 'no prompt formatter')!r}, flush=True); time.sleep(600)"
    frontend = await Child.start("frontend", [sys.executable, "-c", script], folder)
    await eventually(lambda: complaint_in(frontend.log(), "gemma") is not None, "it complains")
    return frontend


def test_a_complaint_is_passed_on_once_while_it_is_waited_for(run: Run[Any], tmp_path: Path) -> None:
    said: list[str] = []

    async def body() -> None:
        frontend = await complaining(tmp_path)
        answers = iter([False, False, False, True])

        async def serves() -> bool:
            return next(answers)

        try:
            await Complaints(frontend, "gemma", said.append).until(serves, 60.0)
        finally:
            await frontend.stop()

    run(body())

    assert ["the frontend does not serve gemma yet: no prompt formatter"] == said


def test_the_error_of_the_time_out_ends_with_the_complaint(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> str:
        frontend = await complaining(tmp_path)

        async def serves() -> bool:
            return False

        try:
            with pytest.raises(ConnectError) as refused:
                await Complaints(frontend, "gemma", lambda _: None).until(serves, 0.0)
        finally:
            await frontend.stop()
        return str(refused.value)

    message = run(body())

    assert message.startswith("frontend: not serving gemma after 0 s")
    assert message.endswith("; the frontend says: no prompt formatter")
