"""One life for all programs: signals, watched tasks, draining, and what the exit code says."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from typing import Any

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.program.life import Failed, Life, Program
from vswa_plugin.tasks import Tasks


class Recorded(Program):
    """A program that notes what it is asked to do; each part can be replaced."""

    def __init__(self, **parts: Any) -> None:
        self.life = Life("test")
        self.parts = parts
        self.did: list[str] = []
        self.requests = 0

    @property
    def in_flight(self) -> int:
        return self.requests

    async def _do(self, part: str) -> None:
        self.did.append(part)
        if part in self.parts:
            await self.parts[part]()

    async def start(self) -> None:
        await self._do("start")

    async def serve(self) -> None:
        self.did.append(f"serve, ready {self.life.status.ready}")
        await self.parts.get("serve", super().serve)()

    async def leave(self) -> None:
        await self._do(f"leave, ready {self.life.status.ready}")

    async def drain(self) -> None:
        await self._do("drain")
        self.did.append("drained")

    async def give_up(self, reason: str) -> None:
        self.did.append(f"give up: {reason}")

    def hurry(self) -> None:
        self.did.append("hurry")

    async def end(self) -> None:
        await self._do("end")

    def run(self) -> int:
        return asyncio.run(self.life.run(self))


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


async def forever() -> None:
    await asyncio.Event().wait()


async def after_a_turn(number: signal.Signals = signal.SIGTERM) -> None:
    """A signal to ourselves, then for ever."""
    send(number)
    await forever()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_serving_with_0(number: signal.Signals) -> None:
    program = Recorded(serve=lambda: after_a_turn(number))

    assert 0 == program.run()
    assert number is program.life.stopped_by
    assert ["start", "serve, ready True", "leave, ready False", "drain", "drained", "end"] == program.did


def test_the_end_of_the_terminal_does_not_end_what_nohup_has_started() -> None:
    async def serve() -> None:
        send(signal.SIGHUP)
        await asyncio.sleep(0)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = Recorded(serve=serve)
        assert 0 == program.run()
        assert (None, signal.SIG_IGN) == (program.life.stopped_by, signal.getsignal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_end_that_fails_leaves_no_task_and_gives_the_signals_back() -> None:
    async def fails() -> None:
        raise BrokenPipeError

    async def body() -> bool:
        program.life.tasks.start(forever(), "publish")
        with pytest.raises(BrokenPipeError):
            await program.life.run(program)
        return asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    program = Recorded(serve=after_a_turn, end=fails)

    assert (False, []) == (asyncio.run(body()), program.life.tasks.names)


def test_a_signal_during_the_start_ends_it_without_draining() -> None:
    program = Recorded(start=after_a_turn)

    assert 0 == program.run()
    assert ["start", "end"] == program.did


def test_work_that_is_done_ends_the_program_with_0() -> None:
    async def nothing() -> None: ...

    assert 0 == Recorded(serve=nothing).run()


def test_a_start_that_fails_raises_what_it_raised() -> None:
    async def refused() -> None:
        raise ConfigError("expected a model")

    program = Recorded(start=refused)
    with pytest.raises(ConfigError, match="expected a model"):
        program.run()

    assert ["start", "end"] == program.did


def test_work_that_fails_gives_up_and_raises_its_reason() -> None:
    async def hangs() -> None:
        raise Failed("the engine hangs")

    async def ends() -> None:
        watchdogs.extend(thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))

    watchdogs: list[threading.Timer] = []
    program = Recorded(serve=hangs, end=ends)
    with pytest.raises(Failed, match="the engine hangs"):
        program.run()

    assert ["start", "serve, ready True", "give up: the engine hangs", "end"] == program.did
    (watchdog,) = watchdogs
    assert watchdog.finished.is_set(), "an end that has come needs no watchdog"
    assert "the engine hangs" == program.life.status.failure
    assert not program.life.status.ready


@pytest.mark.parametrize(
    ("ends", "why"),
    [(ValueError("a bug"), "ValueError: a bug"), (None, "no error given"), ("cancelled", "cancelled")],
)
def test_a_watched_task_that_ends_unasked_ends_the_process_with_its_reason(ends: Any, why: str) -> None:
    async def dies() -> None:
        if isinstance(ends, Exception):
            raise ends
        if ends == "cancelled":
            raise asyncio.CancelledError

    async def starts() -> None:
        program.life.tasks.watch(asyncio.create_task(dies(), name="watch the fleet"), "was etcd away?")

    program = Recorded(start=starts)
    with pytest.raises(Failed) as caught:
        program.run()

    assert f"watch the fleet ended unexpectedly ({why}); was etcd away?" == str(caught.value)
    assert program.did[-2:] == [f"give up: {caught.value}", "end"]


def test_a_watched_task_that_finds_a_setting_wrong_ends_the_process_with_that_refusal() -> None:
    async def refused() -> None:
        raise ConfigError("--http-port: expected a free port")

    program = Recorded()
    program.parts["start"] = lambda: asyncio.sleep(0, program.life.tasks.start(refused(), "listen"))
    with pytest.raises(ConfigError, match="--http-port: expected a free port"):
        program.run()

    assert ["give up: --http-port: expected a free port", "end"] == program.did[-2:]


def test_a_task_that_dies_during_the_start_ends_it() -> None:
    async def dies() -> None:
        raise ValueError("a bug")

    async def starts() -> None:
        program.life.tasks.start(dies(), "publish")
        await forever()

    program = Recorded(start=starts)
    with pytest.raises(Failed, match="publish ended unexpectedly"):
        program.run()

    assert ["start", "end"] == program.did


def test_a_second_signal_ends_the_draining(caplog: pytest.LogCaptureFixture) -> None:
    program = Recorded(serve=after_a_turn, drain=after_a_turn)
    program.requests = 2

    assert 0 == program.run()
    assert "hurry" in program.did
    assert "drained" not in program.did
    assert "end" == program.did[-1]
    assert "2 requests are cancelled: not done in time" in caplog.text


def test_tasks_that_end_with_the_program_are_no_failure() -> None:
    async def body() -> None:
        stopped = asyncio.Event()
        program.life.tasks.start(stopped.wait(), "serve_endpoint")
        program.parts["end"] = lambda: asyncio.sleep(0, stopped.set())

    program = Recorded(start=body, serve=after_a_turn)

    assert 0 == program.run()
    assert [] == program.life.tasks.names


def test_what_is_left_running_is_cancelled_at_the_end() -> None:
    ended: list[str] = []

    async def stubborn() -> None:
        try:
            await forever()
        finally:
            ended.append("cancelled")

    async def starts() -> None:
        program.life.tasks.start(stubborn(), "left behind")

    async def body() -> list[str]:
        await program.life.run(program)
        return list(ended)

    program = Recorded(start=starts, serve=after_a_turn)

    assert ["cancelled"] == asyncio.run(body())


def test_a_drain_that_fails_raises_what_it_raised() -> None:
    async def fails() -> None:
        raise ValueError("a bug")

    program = Recorded(serve=after_a_turn, drain=fails)
    with pytest.raises(ValueError, match="a bug"):
        program.run()

    assert "end" == program.did[-1]


def test_a_task_that_dies_while_the_program_drains_is_named(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> None:
        raise ValueError("a bug")

    async def drains() -> None:
        program.life.tasks.start(dies(), "publish")
        await asyncio.sleep(0.01)

    program = Recorded(serve=after_a_turn, drain=drains)

    assert 0 == program.run()
    assert "while draining, publish ended unexpectedly (ValueError: a bug)" in caplog.text


def test_the_signals_are_given_back() -> None:
    async def body() -> list[bool]:
        program = Recorded(serve=after_a_turn)
        await program.life.run(program)
        loop = asyncio.get_running_loop()
        return [
            loop.remove_signal_handler(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        ]

    assert [False, False, False] == asyncio.run(body())


# -- tasks -----------------------------------------------------------------------------------------


def test_health_names_the_tasks_that_run() -> None:
    async def body() -> list[list[str]]:
        life = Life("test")
        first = life.tasks.start(forever(), "watch the registry")
        life.tasks.start(forever(), "publish")
        before = life.status.tasks()
        await life.tasks.stop([first])
        after = life.status.tasks()
        await life.tasks.stop()
        return [before, after, life.status.tasks()]

    assert [["publish", "watch the registry"], ["publish"], []] == asyncio.run(body())


def test_a_stopped_task_is_no_failure_and_its_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def odd() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise ValueError("as it was stopped") from None

    async def body() -> Tasks:
        tasks = Tasks()
        task = tasks.start(odd(), "odd")
        await asyncio.sleep(0)
        await tasks.stop([task])
        return tasks

    assert asyncio.run(body()).ended is None
    assert "as it was stopped" in caplog.text


def test_the_first_failure_is_the_one_that_counts() -> None:
    async def dies(of: str) -> None:
        raise ValueError(of)

    async def body() -> list[str]:
        tasks = Tasks()
        waiting = asyncio.create_task(tasks.failed())
        await asyncio.sleep(0)
        tasks.start(dies("the first"), "one")
        await asyncio.sleep(0)
        tasks.start(dies("the second"), "two")
        seen = [str(await waiting), str(await tasks.failed())]
        await asyncio.sleep(0.01)
        return [*seen, str(tasks.ended)]

    assert ["one ended unexpectedly (ValueError: the first)"] * 3 == asyncio.run(body())
