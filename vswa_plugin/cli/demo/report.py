"""What ``vswa demo`` counts, shows and judges."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.cli.events import Follower
from vswa_plugin.errors import ConnectError
from vswa_plugin.wire.events import Batch, Removed, Source, Stored

_ENGINE = "vswa_engine_"


@dataclass(frozen=True)
class Choice:
    """Who was chosen to compute a prompt.

    :param promised: tokens that the router expected to be cached there.
    :param alone: tokens that the global window alone would have promised, by worker id.
    """

    worker_id: int
    promised: int
    alone: Mapping[int, int]

    def best_alone(self) -> tuple[int, int]:
        """Worker and tokens of the highest such promise; of equals the worker that was chosen."""
        worker_id = max(self.alone, key=lambda each: (self.alone[each], each == self.worker_id), default=0)
        return worker_id, self.alone.get(worker_id, 0)


@dataclass
class Answer:
    """One streamed answer as the client saw it."""

    status: int
    request_id: str = ""
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_token_s: float = 0.0
    #: Tokens that global blocks alone would have promised and the engine computed again.
    overpromise: int = 0
    #: Disaggregated: bytes that went to the decode worker, by window, and what a full cache would have sent.
    moved: Mapping[str, float] = field(default_factory=dict)
    full: Mapping[str, float] = field(default_factory=dict)
    #: What Dynamo's frontend adds.
    nvext: dict[str, Any] = field(default_factory=dict)
    choice: Choice | None = None


@dataclass
class Tally:
    """Blocks per (worker, window), counted from the wire."""

    follower: Follower = field(default_factory=Follower)
    stored: Counter[tuple[int, str]] = field(default_factory=Counter)
    removed: Counter[tuple[int, str]] = field(default_factory=Counter)
    resident: defaultdict[tuple[int, str], set[int]] = field(default_factory=lambda: defaultdict(set))
    #: Tokens stored again for a sliding window while the global window held the same blocks, by component.
    recomputed: Counter[str] = field(default_factory=Counter)
    #: Parent of each block.
    parents: dict[int, int | None] = field(default_factory=dict)
    #: (component, position, block) of what was stored, for whoever clears it.
    newly_stored: list[tuple[str, int, int]] = field(default_factory=list)
    gaps: int = 0

    def add(self, source: Source, batch: Batch) -> None:
        self.gaps += self.follower.read(source, batch).missed > 0
        for event in batch.events:
            if not isinstance(event, Stored | Removed):
                continue
            key = (source.worker_id, self.follower.label(source, event.group_id))
            if isinstance(event, Stored):
                self._count_recomputed(source, event)
                self._link(source, event)
                self.stored[key] += len(event.sequence_hashes)
                self.resident[key].update(event.sequence_hashes)
            else:
                self.removed[key] += len(event.sequence_hashes)
                self.resident[key].difference_update(event.sequence_hashes)

    def _count_recomputed(self, source: Source, event: Stored) -> None:
        """A sliding group announces its blocks before the global one does: what is global already was so."""
        group = self.follower.groups[source][event.group_id]
        if group.window_size is not None:
            held = self.resident[source.worker_id, "window global"].intersection(event.sequence_hashes)
            self.recomputed[source.component] += len(held) * group.block_size

    def _link(self, source: Source, event: Stored) -> None:
        parent = event.parent_hash
        for position, each in enumerate(event.sequence_hashes, event.position):
            self.parents[each] = parent
            self.newly_stored.append((source.component, position, each))
            parent = each

    def path_of_newest(self, component: str) -> list[int]:
        """From its root, the path to the deepest block that ``component`` has newly stored."""
        newest = max((each for each in self.newly_stored if each[0] == component), default=None)
        path: list[int] = []
        block = newest[2] if newest is not None else None
        while block is not None:
            path.append(block)
            block = self.parents.get(block)
        return path[::-1]

    def held_globally(self, component: str) -> dict[int, frozenset[int]]:
        """Blocks of the global window now, by worker id."""
        workers = {source.worker_id for source in self.follower.groups if source.component == component}
        return {each: frozenset(self.resident[each, "window global"]) for each in workers}

    def windows(self) -> set[str]:
        return {window for _, window in self.stored}

    async def settled(self) -> None:
        """Return once each worker has sent two more heartbeats: what came before has then been counted."""
        beats = self.follower.heartbeats
        target = {source: seen + 2 for source, seen in beats.items()}
        deadline = time.monotonic() + 10
        while any(beats[source] < count for source, count in target.items()):
            if time.monotonic() > deadline:
                raise ConnectError("expected heartbeats of each worker within 10 s, got none")
            await asyncio.sleep(0.01)


class Transfers:
    """What decode workers fetched from prefill workers, from the engines' numbers in their /metrics.

    :param decode: status URLs of the decode workers; of the prefill workers in ``prefill``.
    :param groups: cache groups of the workers.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], groups: Sequence[CacheGroup]) -> None:
        self._prefill, self._decode, self._groups = prefill, decode, groups
        self._before: defaultdict[str, float] = defaultdict(float)
        self._block_bytes: dict[str, float] = {}

    async def begin(self) -> None:
        """Count from here on."""
        self._before = await _numbers(self._decode)

    async def take(self, prompt_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
        """Bytes moved by window since the last call, and those of a cache that keeps every layer whole.

        The first prompt after :meth:`begin` must be new to the decode worker: it tells the size of a block.
        """
        now = await _numbers(self._decode)
        names = {group.label: f"transfer_bytes_{group.label}" for group in self._groups}
        moved = {label: now[name] - self._before[name] for label, name in names.items()}
        self._before = now
        if not self._block_bytes:
            self._block_bytes = {g.label: moved[g.label] / _seen(g, prompt_tokens) for g in self._groups}
        whole = next(group.label for group in self._groups if group.window_size is None)
        blocks = moved[whole] / self._block_bytes[whole] if self._block_bytes[whole] else 0.0
        return moved, {label: blocks * size for label, size in self._block_bytes.items()}

    async def failures(self) -> float:
        return (await _numbers(self._decode))["transfer_failures"]

    async def held(self) -> float:
        """Prompts that prefill workers still hold."""
        return (await _numbers(self._prefill))["transfers_held"]


def _seen(group: CacheGroup, prompt_tokens: int) -> int:
    """Blocks that the token after a prompt can see."""
    first = 0 if group.window_size is None else (prompt_tokens + 1 - group.window_size) // group.block_size
    return -(-prompt_tokens // group.block_size) - max(0, first)


async def pages_of(urls: Iterable[str]) -> list[str]:
    """/metrics of each worker or router."""
    pages = []
    async with aiohttp.ClientSession() as session:
        for url in urls:
            async with session.get(f"{url}/metrics") as response:
                pages.append(await response.text())
    return pages


async def _numbers(urls: Iterable[str]) -> defaultdict[str, float]:
    """The engines' numbers by name and window, summed over workers and ranks."""
    total: defaultdict[str, float] = defaultdict(float)
    for page in await pages_of(urls):
        for family in text_string_to_metric_families(page):
            for sample in family.samples if family.name.startswith(_ENGINE) else ():
                window = sample.labels.get("window")
                name = family.name.removeprefix(_ENGINE) + (f"_{window}" if window else "")
                total[name] += sample.value
    return total


def show_answer(number: int, name: str, answer: Answer) -> None:
    reuse = f"{answer.cached_tokens:4d} of {answer.prompt_tokens} prompt tokens reused"
    first = f"first token after {answer.first_token_s * 1000:4.0f} ms"
    print(f"  {number:2d}. {name:8} {reuse}, {first}  {answer.text[:40]!r}", flush=True)
    if answer.moved:
        parts = (
            f"window {label}: {_kb(count)} kB (a full cache {_kb(answer.full[label])})"
            for label, count in answer.moved.items()
        )
        print(f"      moved to the decode worker, {', '.join(parts)}", flush=True)
    if answer.overpromise:
        print(
            f"      ^ the global layers still held {answer.overpromise} of these tokens, and a router that\n"
            "        counts them alone would have promised a hit; the sliding layers' blocks had gone",
            flush=True,
        )


def show_windows(tally: Tally, names: Mapping[int, str]) -> None:
    """A line per worker and window; ``names`` by worker id, where their kinds differ."""
    wide = 30 if names else 22  # an id has up to 20 digits
    print("\nper worker and window, from the events on NATS:")
    print(f"  {'worker':{wide}}{'window':16}{'stored':>8}{'removed':>9}{'resident':>10}")
    for worker_id, window in sorted(tally.stored):
        stored, removed = tally.stored[worker_id, window], tally.removed[worker_id, window]
        worker = f"{names[worker_id]:8}{worker_id}" if names else f"{worker_id}"
        print(f"  {worker:{wide}}{window:16}{stored:8d}{removed:9d}{stored - removed:10d}")


def show_moved(answers: Sequence[Answer]) -> None:
    """Per window what prefill workers sent to decode workers in all, beside a full cache."""
    print("\nKV that went from prefill to decode workers, from their /metrics:")
    print(f"  {'window':10}{'moved':>10}{'a full cache':>16}")
    for label in answers[0].moved if answers else ():
        moved, full = sum(a.moved[label] for a in answers), sum(a.full[label] for a in answers)
        print(f"  {label:10}{_kb(moved):>7} kB{_kb(full):>13} kB")


def _kb(count: float) -> str:
    return f"{count / 1000:.0f}"


def checks_of_all(
    answers: Sequence[Answer], asked: int, tally: Tally, codes: Mapping[str, int]
) -> dict[str, bool]:
    """What must hold in every topology, by its description."""
    return {
        "every request was answered": len(answers) == asked
        and all(a.status == 200 and a.text for a in answers),
        "prompts are longer than 1,000 tokens": all(a.prompt_tokens > 1000 for a in answers),
        "prefixes were reused": sum(a.cached_tokens for a in answers) > 0,
        "events of both windows arrived": len(tally.windows()) >= 2,
        "no event was missed": tally.gaps == 0,
        "everything stopped cleanly": not any(
            code for name, code in codes.items() if name.startswith(("worker", "prefill", "decode"))
        ),
    }


def checks_of_transfers(
    answers: Sequence[Answer], modes: Mapping[int, str], tally: Tally, failures: float, held: float
) -> dict[str, bool]:
    """What must hold besides where prefill and decode run apart; ``modes`` by worker id."""
    with_events = {modes[worker_id] for worker_id, _ in tally.stored}
    labels = set().union(*(a.moved for a in answers))
    return {
        "prefill and decode workers announced blocks": with_events == {"prefill", "decode"},
        "KV of every window was moved": bool(labels)
        and all(sum(a.moved.get(label, 0) for a in answers) > 0 for label in labels),
        "sliding windows moved less than a full cache would have": all(
            sum(a.moved[label] for a in answers) < sum(a.full[label] for a in answers)
            for label in labels - {"global"}
        ),
        "no transfer failed": failures == 0,
        "nothing is held any more": held == 0,
    }


def verdict(checks: Mapping[str, bool], took_s: float) -> int:
    """Say what held and what did not; the exit code."""
    print()
    for what, held in checks.items():
        print(f"  {'ok  ' if held else 'FAIL'}  {what}")
    good = all(checks.values())
    print(f"\n{'demo passed' if good else 'demo FAILED'} in {took_s:.1f} s", flush=True)
    if not good:
        sys.stderr.write("run it again with --log-dir DIR to keep the logs of all processes\n")
    return 0 if good else 1
