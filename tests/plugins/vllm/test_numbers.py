"""What is counted of vLLM's statistics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vswa_plugins.vllm.numbers import TOTALS, TransferNumbers, stat_logger

from tests.vllm_connector import StatLoggerBase


def record(numbers: TransferNumbers, rank: int, usage: float, **connector: Any) -> None:
    """As vLLM does, which makes a logger for each rank."""
    stats = SimpleNamespace(kv_cache_usage=usage, kv_connector_stats=connector or None)
    stat_logger(StatLoggerBase, numbers)(None, rank).record(scheduler_stats=stats, iteration_stats=None)


def test_what_the_connector_says_is_added_up() -> None:
    numbers = TransferNumbers(1)
    record(
        numbers, 0, 0.1, bytes_transferred=[100, 50], transfer_duration=[0.5, 0.25], num_failed_transfers=[]
    )
    record(numbers, 0, 0.1, bytes_transferred=[1], num_failed_transfers=[1], num_failed_handshakes=[1])
    record(numbers, 0, 0.2, num_kv_expired_reqs=[1, 1])

    assert {
        "transfers": 3.0,
        "transfer_bytes": 151.0,
        "transfer_seconds": 0.75,
        "transfer_failures": 2.0,
        "transfers_expired": 2.0,
        "blocks_used": 200.0,
    } == numbers.stats(1_000)


def test_the_blocks_of_each_rank_are_its_own() -> None:
    numbers = TransferNumbers(2)
    record(numbers, 0, 0.5)
    record(numbers, 1, 0.25)
    stats = numbers.stats(100)

    assert (75, 50, 25) == (stats["blocks_used"], stats["blocks_used_rank_0"], stats["blocks_used_rank_1"])
    assert stats.keys() >= TOTALS


def test_what_a_release_does_not_say_stays_as_it_was() -> None:
    numbers = TransferNumbers(1)
    record(numbers, 0, 0.5, bytes_transferred=[7])
    for odd in (None, SimpleNamespace(), SimpleNamespace(kv_cache_usage=None, kv_connector_stats=[1])):
        numbers.record(0, odd)
    record(numbers, 0, 0.5, bytes_transferred=3, novelty=[1])

    assert (7.0, 5.0) == (numbers.stats(10)["transfer_bytes"], numbers.stats(10)["blocks_used"])
