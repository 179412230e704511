"""Pulls side by side: each is told its end exactly once, and nothing is stored after that."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vswa_plugins.gemma3_cpu.transfer import puller as puller_module
from vswa_plugins.gemma3_cpu.transfer.client import PullResult
from vswa_plugins.gemma3_cpu.transfer.errors import TransferError
from vswa_plugins.gemma3_cpu.transfer.puller import Puller

from tests.gemma3_transfer_helpers import OFFERED, PATIENT, Decode, Prefill, expected_blocks, read_offered
from vswa_plugin.errors import Unavailable

End = PullResult | TransferError


@contextmanager
def made(max_concurrent: int = 2) -> Iterator[Puller]:
    puller = Puller(max_concurrent, PATIENT)
    try:
        yield puller
    finally:
        puller.stop()


class Gate:
    """Reads that wait until they are let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.inside = 0
        self.most = 0
        self._lock = threading.Lock()

    def read(self, group: int, first: int, stop: int) -> bytes:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.open.wait(5)
        with self._lock:
            self.inside -= 1
        return bytes(read_offered(group, first, stop))


def ended(ends: queue.Queue[End]) -> End:
    return ends.get(timeout=5)


def cause(end: End) -> str:
    assert isinstance(end, TransferError)
    return end.cause


def test_a_pull_is_told_its_result_once() -> None:
    ends: queue.Queue[End] = queue.Queue()
    decode = Decode()
    with Prefill() as prefill:
        with made() as puller:
            pulling = puller.start(decode.request(prefill.server.address, prefill.offer()), ends.put)
            result = ended(ends)
            puller.cancel(pulling)

        assert isinstance(result, PullResult)
        assert expected_blocks(OFFERED) == decode.blocks
        assert ends.empty()


def test_a_failed_pull_is_told_its_error() -> None:
    ends: queue.Queue[End] = queue.Queue()
    with Prefill() as prefill, made() as puller:
        puller.start(Decode().request(prefill.server.address, "0" * 32), ends.put)

        assert "refused" == cause(ended(ends))


def test_only_so_many_pulls_run_at_a_time_and_all_get_their_turn() -> None:
    gate, ends = Gate(), queue.Queue[End]()
    with Prefill() as prefill, made(2) as puller:
        for _ in range(6):
            puller.start(Decode().request(prefill.server.address, prefill.offer(gate.read)), ends.put)
        assert gate.entered.acquire(timeout=5)
        assert gate.entered.acquire(timeout=5)
        gate.open.set()
        results = [ended(ends) for _ in range(6)]

    assert all(isinstance(result, PullResult) for result in results)
    assert 2 == gate.most


def test_a_running_pull_that_is_cancelled_is_told_so_and_stores_nothing_more() -> None:
    gate, ends = Gate(), queue.Queue[End]()
    decode = Decode()
    with Prefill() as prefill, made() as puller:
        pulling = puller.start(decode.request(prefill.server.address, prefill.offer(gate.read)), ends.put)
        assert gate.entered.acquire(timeout=5)
        puller.cancel(pulling)
        end = ended(ends)
        gate.open.set()
        prefill.released()

        assert "cancelled" == cause(end)
        assert {} == decode.blocks


def test_a_pull_that_waits_its_turn_is_cancelled_at_once_and_once() -> None:
    gate, running, waiting = Gate(), queue.Queue[End](), queue.Queue[End]()
    with Prefill() as prefill:
        with made(1) as puller:
            puller.start(Decode().request(prefill.server.address, prefill.offer(gate.read)), running.put)
            assert gate.entered.acquire(timeout=5)
            second = puller.start(Decode().request(prefill.server.address, prefill.offer()), waiting.put)
            puller.cancel(second)

            assert "cancelled" == cause(waiting.get_nowait())
            puller.cancel(second)
            gate.open.set()
            assert isinstance(ended(running), PullResult)
        assert waiting.empty()
        assert 1 == prefill.server.counts().taken


def test_stopping_ends_every_pull_and_takes_no_more() -> None:
    gate, ends = Gate(), queue.Queue[End]()
    with Prefill() as prefill, made(1) as puller:
        for _ in range(3):
            puller.start(Decode().request(prefill.server.address, prefill.offer(gate.read)), ends.put)
        assert gate.entered.acquire(timeout=5)
        puller.stop()
        puller.stop()
        gate.open.set()

        assert ["cancelled"] * 3 == [cause(ends.get_nowait()) for _ in range(3)]
        with pytest.raises(Unavailable, match="has stopped"):
            puller.start(Decode().request(prefill.server.address, "0" * 32), ends.put)
        assert ends.empty()


def test_a_callback_that_fails_costs_no_other_pull() -> None:
    ends: queue.Queue[End] = queue.Queue()

    def failing(end: End) -> None:
        ends.put(end)
        raise ZeroDivisionError

    with Prefill() as prefill, made(1) as puller:
        for _ in range(3):
            puller.start(Decode().request(prefill.server.address, prefill.offer()), failing)

        assert all(isinstance(ended(ends), PullResult) for _ in range(3))


def test_even_a_bug_ends_a_pull_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> PullResult:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(puller_module, "pull", broken)
    ends: queue.Queue[End] = queue.Queue()
    with made() as puller:
        puller.start(Decode().request(("127.0.0.1", 1), "0" * 32), ends.put)

        assert "bug" == cause(ended(ends))
