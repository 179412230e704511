"""The live display of ``vswa index``: one line for each rank and window, in 80 columns, trouble first."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vswa_plugin.cli.pages import WorkerNumbers
from vswa_plugin.errors import one_line
from vswa_plugin.following.fleet import RankStatus
from vswa_plugin.index import IndexStats
from vswa_plugin.registry import Entry
from vswa_plugin.router.http.overview import windows_of
from vswa_plugin.wire.events import Rank

#: State -> how its name is shown. Red: no request goes there; yellow: it may be wrong for a while.
_STYLES = {
    "live": "green",
    "waiting": "yellow",
    "stale": "bold yellow",
    "silent": "bold white on red",
    "unreadable": "bold white on red",
}
_TROUBLE_FIRST = ("unreadable", "silent", "stale", "waiting", "live")
#: Shares of promises kept below which the number is yellow, and red.
_FEW, _VERY_FEW = 0.9, 0.7


class Rates:
    """Events a second of each rank, between two looks. ``clock``: a monotonic one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[Rank, tuple[float, int, int]] = {}

    def of(self, statuses: Sequence[RankStatus]) -> dict[Rank, float]:
        """Also remembers this look; a rank that is new, or in a new epoch, has no rate yet."""
        now, rates = self._clock(), {}
        for each in statuses:
            rank = each.source.rank
            at, epoch, next_id = self._seen.get(rank, (now, -1, 0))
            if epoch == each.epoch and now > at and each.next_event_id >= next_id:
                rates[rank] = (each.next_event_id - next_id) / (now - at)
        self._seen = {each.source.rank: (now, each.epoch, each.next_event_id) for each in statuses}
        return rates


def display(
    statuses: Sequence[RankStatus],
    stats: IndexStats,
    entries: Mapping[str, Entry],
    rates: Mapping[Rank, float],
    workers: Mapping[int, WorkerNumbers],
    kept: Mapping[Rank, float],
) -> Any:
    """What is shown, for a rich console.

    :param rates: events a second; ``workers``, ``kept``: what is known beside the streams, see pages.py.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_rank = {Rank(each.worker_id, dp): each for each in entries.values() for dp in each.epochs}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for heading in ("rank", "state", "window", "blocks", "full", "ev/s", "load", "hit", "kept"):
        right = heading not in ("rank", "state", "window")
        # Ids of one deployment differ in their last digits only: never shorten them.
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "rank")
    previous = None
    for status in sorted(statuses, key=_trouble_first):
        rank = status.source.rank
        entry = by_rank.get(rank)
        if len({each.model for each in statuses}) > 1 and status.model != previous:
            table.add_row(Text(one_line(status.model) or "no model known", style="bold"))
            previous = status.model
        lines = list(_lines(status, entry)) or [("-", "-", "-")]
        numbers = workers.get(rank.worker_id, WorkerNumbers())
        load = "-" if numbers.load is None else str(numbers.load)
        more = (_rate(rates.get(rank)), load, _percent(numbers.hit), _kept(kept.get(rank)))
        for at, (window, blocks, full) in enumerate(lines):
            first = (str(rank), _state(status.state)) if at == 0 else ("", "")
            table.add_row(*first, window, blocks, full, *(more if at == 0 else [""] * 4))
    reasons = [
        Text(one_line(f"{each.source.rank}: {each.reason}"), style="yellow")
        for each in statuses
        if each.reason
    ]
    return Group(_heading(statuses, stats), table, *reasons)


def _heading(statuses: Sequence[RankStatus], stats: IndexStats) -> Any:
    from rich.text import Text

    counted = Counter(each.state for each in statuses)
    states = [
        Text(f"{counted[each]} {each}", style=_STYLES[each]) for each in _TROUBLE_FIRST if counted[each]
    ]
    kernel = "" if stats.kernel else ", pure Python"
    left_out = f", {stats.left_out} blocks left out for lack of room" if stats.left_out else ""
    size = Text(f"{stats.nbytes / 1e6:.1f} MB{kernel}{left_out}", style="dim")
    return Text("   ").join([Text(f"{len(statuses)} ranks", style="bold"), *states, size])


def _trouble_first(status: RankStatus) -> tuple[str, int, Rank]:
    return status.model, _TROUBLE_FIRST.index(status.state), status.source.rank


def _lines(status: RankStatus, entry: Entry | None) -> Iterator[tuple[str, str, str]]:
    """Window, blocks, and how full; a line of its own for a pool that all windows share."""
    if entry is None:
        for window, tiers in status.blocks.items():
            yield window, _blocks(tiers), "-"
        return
    windows, pool = windows_of(entry, status.blocks)
    for each in windows:
        device = each.resident.get("device", 0)
        yield each.window, _blocks(each.resident), _percent(device / each.capacity if each.capacity else None)
    if pool:
        device = sum(each.resident.get("device", 0) for each in windows)
        yield "pool", str(device), _percent(device / pool)


def _blocks(tiers: Mapping[str, int]) -> str:
    """On the device, and in slower tiers where some are there."""
    slower = sum(count for tier, count in tiers.items() if tier != "device")
    return f"{tiers.get('device', 0)}" + (f"+{slower}" if slower else "")


def _state(state: str) -> Any:
    """Also to be seen without colours."""
    from rich.text import Text

    return Text(state if state in ("live", "waiting") else f"!{state}", style=_STYLES[state])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}"


def _kept(share: float | None) -> Any:
    from rich.text import Text

    style = "" if share is None or share >= _FEW else "yellow" if share >= _VERY_FEW else "bold red"
    return Text(_percent(share), style=style)
