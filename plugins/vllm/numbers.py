"""What vLLM's engine core counts while it hands over blocks, taken from its statistics of each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Our totals, named as those of other engines -> the connector's lists of one entry per event, and whether
#: the entries are added up or counted.
_COUNTED: dict[str, tuple[tuple[str, ...], Callable[[Sequence[float]], float]]] = {
    "transfers": (("bytes_transferred",), len),
    "transfer_bytes": (("bytes_transferred",), sum),
    "transfer_seconds": (("transfer_duration",), sum),
    "transfer_failures": (("num_failed_transfers", "num_failed_handshakes"), sum),
    "transfers_expired": (("num_kv_expired_reqs",), sum),
}
TOTALS = frozenset(_COUNTED)


class TransferNumbers:
    """Totals of the connector, and the pool's used blocks, of all ranks. Written on the worker's event loop.

    :param ranks: data-parallel ranks.
    """

    def __init__(self, ranks: int) -> None:
        self._totals = dict.fromkeys(sorted(TOTALS), 0.0)
        self._usage = [0.0] * ranks

    def record(self, rank: int, scheduler_stats: Any) -> None:
        """Take in the statistics of one step; what a release does not have stays as it was."""
        usage = getattr(scheduler_stats, "kv_cache_usage", None)
        if isinstance(usage, int | float) and rank < len(self._usage):
            self._usage[rank] = float(usage)
        connector = getattr(scheduler_stats, "kv_connector_stats", None)
        if isinstance(connector, Mapping):
            self._add(connector)

    def _add(self, connector: Mapping[str, Any]) -> None:
        for total, (names, measure) in _COUNTED.items():
            lists = [values for name in names if isinstance(values := connector.get(name), list)]
            self._totals[total] += float(sum(map(measure, lists)))

    def stats(self, blocks: int) -> dict[str, float]:
        """By name. :param blocks: of each rank's pool."""
        used = [round(usage * blocks) for usage in self._usage]
        stats = {**self._totals, "blocks_used": float(sum(used))}
        if len(used) > 1:
            stats |= {f"blocks_used_rank_{rank}": float(count) for rank, count in enumerate(used)}
        return stats


def stat_logger(base: type[Any], numbers: TransferNumbers) -> Callable[[Any, int], Any]:
    """What vLLM calls for each rank, to make the object that gets its statistics.

    :param base: vLLM's ``StatLoggerBase``, whose methods may be more in other releases.
    """

    class Logger(base):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(self, scheduler_stats: Any = None, *_: Any, **__: Any) -> None:
            numbers.record(self._rank, scheduler_stats)

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    return Logger
