"""Child processes: started again when they fail, left alone when they should be, never left behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.e2e_helpers import eventually
from tests.launch_helpers import alive
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.processes import BackOff, Child, ChildDied, python_module


def test_pauses_double_up_to_thirty_seconds_and_begin_anew_after_a_long_life() -> None:
    back_off = BackOff()

    assert [back_off.pause(0.5) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [back_off.pause(lived) for lived in (59, 60, 5)] == [30, 1, 2]


#: Fails as often as the file says, with and without last words; then does what it is told.
_SCRIPT = """
import os, pathlib, sys, time
left = int(pathlib.Path({file!r}).read_text())
pathlib.Path({file!r}).write_text(str(left - 1))
print("attempt", left, flush=True)
if left == 2:
    print("vswa worker: failed: not to be read here", flush=True)
    pathlib.Path(os.environ["VSWA_TERMINATION_LOG"]).write_text("no more")
if left:
    sys.exit(1)
{then}
"""


async def kept(folder: Path, failures: int, then: str) -> tuple[Child, list[str]]:
    file = folder / "failures"
    file.write_text(str(failures))
    command = [sys.executable, "-c", _SCRIPT.format(file=str(file), then=then)]
    child = await Child.start("child", command, folder)
    said: list[str] = []
    child.keep(said.append, BackOff(0.01, 0.02))
    return child, said


def test_a_child_that_fails_is_started_again_and_each_time_its_reason_is_said(
    run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> tuple[list[str], int]:
        child, said = await kept(tmp_path, 2, "time.sleep(60)")
        await eventually(lambda: "attempt 0" in child.log(), "the third life")
        child.check()
        return said, await child.stop()

    said, code = run(body())

    assert said == [
        "child ended with exit code 1: no more; starting it again in 0.01 s",
        "child ended with exit code 1: attempt 1; starting it again in 0.02 s",
    ]
    assert code == -signal.SIGTERM


def test_what_the_user_must_correct_is_not_tried_again(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        reason = "pathlib.Path(os.environ['VSWA_TERMINATION_LOG']).write_text('expected a model\\nand more')"
        then = f"{reason}; sys.exit(2)"
        child, said = await kept(tmp_path, 0, then)
        with pytest.raises(ConfigError, match=r"^child: expected a model\nand more$"):
            await child.over()
        with pytest.raises(ConfigError):
            child.check()
        assert said == []
        await child.stop()

    run(body())


def test_a_command_line_that_argparse_refuses_is_the_reason_of_a_kept_child(
    run: Run[Any], tmp_path: Path
) -> None:
    async def body() -> None:
        command = python_module("vswa_plugin.worker", "--model-path", "/m", "--no-such-option")
        child = await Child.start("worker-0", command, tmp_path)
        child.keep(lambda _: None)
        with pytest.raises(ConfigError, match=r"^worker-0: unrecognized arguments: --no-such-option$"):
            await child.over()

    run(body())


def test_the_reason_of_an_earlier_life_is_not_that_of_a_later_one(run: Run[Any], tmp_path: Path) -> None:
    (tmp_path / "child.termination").write_text("long ago")

    async def body() -> str:
        child = await Child.start("child", [sys.executable, "-c", "print('it ends')"], tmp_path)
        await child.wait()
        return child.last_words()

    assert run(body()) == "it ends"


def test_a_child_that_somebody_stopped_stays_down(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> list[str]:
        child, said = await kept(tmp_path, 0, "")
        await child.over()
        with pytest.raises(ChildDied):
            child.check()
        return said

    assert run(body()) == ["child ended on request and is not started again"]


@pytest.mark.parametrize("attempt", range(5))
def test_a_child_that_is_stopped_while_it_is_started_again_leaves_no_process(
    run: Run[Any], tmp_path: Path, attempt: int
) -> None:
    async def body() -> None:
        child, said = await kept(tmp_path, 1, "time.sleep(60)")
        await eventually(lambda: said, "it fails")
        await asyncio.sleep(0.003 * attempt)  # around the start that follows after 10 ms
        await child.stop()
        assert not alive(child.pid)

    run(body())


def test_what_a_child_has_started_ends_with_it_before_it_is_started_again(
    run: Run[Any], tmp_path: Path
) -> None:
    """As the process of an engine, where the worker above it is killed."""
    executor = (
        "import subprocess as s, time; print(s.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    )

    async def body() -> tuple[list[bool], int]:
        child = await Child.start("worker", [sys.executable, "-c", executor], tmp_path)
        lives: list[bool] = []
        child.keep(lambda _: lives.append(alive(first)), BackOff(0.01, 0.02))
        await eventually(lambda: child.log().endswith("\n"), "it has started its own")
        first = int(child.log())
        worker = child.pid
        child.kill()
        await eventually(lambda: child.pid != worker and child.log().endswith("\n"), "the second life")
        second = int(child.log())
        await child.stop()
        return [*lives, alive(second)], second - first

    lived, apart = run(body())

    assert lived == [False, False]
    assert apart
