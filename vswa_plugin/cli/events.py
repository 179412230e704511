"""``vswa events``: follow what workers publish, per window, readable."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError, one_line, plain, shown
from vswa_plugin.program.args import nats_server
from vswa_plugin.program.options import at_least_one, whole_number
from vswa_plugin.registry import Entry
from vswa_plugin.wire.events import (
    Batch,
    Cleared,
    Event,
    Layout,
    Moved,
    Removed,
    Source,
    Stored,
    Unknown,
    decode,
    hash_text,
    source_as_json,
)
from vswa_plugin.wire.subjects import check_name, events_of, source_of
from vswa_plugin.wire.transport import Transport

_EXAMPLES = """\
examples:
  vswa events                          everything, until Ctrl-C
  vswa events --window 512             one window only
  vswa events --json | jq .events      one JSON object per batch
  NATS_SERVER=nats://host:4222 vswa events --namespace prod

The windows of a worker are known from its first batch or, for one that ran before, from the registry
(ETCD_ENDPOINTS or VSWA_REGISTRY).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--namespace", help="follow only workers of this Dynamo namespace")
    parser.add_argument("--component", help="follow only workers of this Dynamo component")
    parser.add_argument(
        "--window",
        metavar="TOKENS|global",
        help="show only events of this window, and those that are about all windows",
    )
    parser.add_argument("--heartbeats", action="store_true", help="show heartbeats too")
    parser.add_argument("--json", action="store_true", help="print one JSON object per batch")
    parser.add_argument("--count", type=at_least_one, metavar="N", help="stop after N batches")


def run(args: argparse.Namespace) -> int:
    if args.window not in (None, "global") and not whole_number(args.window):
        raise ConfigError(f"--window: expected a number of tokens or 'global', got {shown(args.window)}")
    for option, name in (("--namespace", args.namespace), ("--component", args.component)):
        if name is not None:
            check_name(option, name)
    return asyncio.run(_follow(args))


class Seen(NamedTuple):
    """What is to be shown of one batch.

    :param missed: how many events were missed before it.
    :param events: those of the window that is followed, and those that are about all windows, with their ids.
    """

    missed: int
    events: list[tuple[int, Event | Unknown]]


@dataclass
class Follower:
    """What has been seen of each rank: its windows, and which event id comes next."""

    window: str | None = None
    groups: dict[Source, dict[int, CacheGroup]] = field(default_factory=dict)
    expected: dict[Source, tuple[int, int]] = field(default_factory=dict)
    heartbeats: Counter[Source] = field(default_factory=Counter)

    def learn(self, entry: Entry) -> None:
        """Take the windows of a worker from its registry entry."""
        for rank in entry.epochs:
            source = Source(entry.namespace, entry.component, entry.worker_id, rank)
            self.groups.setdefault(source, {group.group_id: group for group in entry.groups})

    def read(self, source: Source, batch: Batch) -> Seen:
        """Take one batch in."""
        missed, shown = 0, []
        epoch, event_id = self.expected.get(source, (batch.epoch, batch.first_event_id))
        if epoch == batch.epoch and event_id < batch.first_event_id:
            missed = batch.first_event_id - event_id
        self.expected[source] = (batch.epoch, batch.next_event_id)
        self.heartbeats[source] += not batch.events
        for event_id, event in enumerate(batch.events, batch.first_event_id):
            if isinstance(event, Layout):
                self.groups[source] = {group.group_id: group for group in event.groups}
            if self._wanted(source, event):
                shown.append((event_id, event))
        return Seen(missed, shown)

    def lines(self, source: Source, seen: Seen) -> list[str]:
        """Readable lines; first, whether something was missed before it."""
        gap = [f"  gap: {seen.missed} events were missed"] if seen.missed else []
        described = [(event_id, plain(self._describe(source, event))) for event_id, event in seen.events]
        return gap + [f"  {event_id:>6}  {' '.join(what.splitlines())}" for event_id, what in described]

    def label(self, source: Source, group_id: int | None) -> str:
        if group_id is None:
            return "all windows"
        group = self.groups.get(source, {}).get(group_id)
        return f"group {group_id}" if group is None else f"window {group.label}"

    def _wanted(self, source: Source, event: Event | Unknown) -> bool:
        group_id = getattr(event, "group_id", None)
        if self.window is None or group_id is None:
            return True
        return self.label(source, group_id) == f"window {self.window}"

    def _describe(self, source: Source, event: Event | Unknown) -> str:
        match event:
            case Layout():
                groups = ", ".join(
                    f"{g.group_id}: window {g.label} in blocks of {g.block_size}" for g in event.groups
                )
                return f"layout   {event.model}, rule {event.rule}, {groups}"
            case Stored():
                last = event.position + len(event.sequence_hashes) - 1
                where = self.label(source, event.group_id)
                parent = "the root" if event.parent_hash is None else hash_text(event.parent_hash)
                return f"stored   {where:<13} blocks {event.position}..{last} after {parent} on {event.tier}"
            case Removed():
                return f"removed  {self.label(source, event.group_id):<13} {_hashes(event.sequence_hashes)}"
            case Moved():
                where = self.label(source, event.group_id)
                return f"moved    {where:<13} {_hashes(event.sequence_hashes)} to {event.tier}"
            case Cleared():
                return f"cleared  {self.label(source, event.group_id)}"
            case Unknown():
                return f"unknown  event {event.tag!r} of a later version: update this program"


def _hashes(hashes: tuple[int, ...]) -> str:
    shown = " ".join(hash_text(value) for value in hashes[:3])
    return f"{len(hashes)} block{'s' if len(hashes) != 1 else ''}: {shown}{' ...' if len(hashes) > 3 else ''}"


async def _follow(args: argparse.Namespace) -> int:
    follower = Follower(args.window)
    await _learn_from_registry(follower)
    transport = Transport(nats_server(os.environ), "vswa events")
    await transport.connect()
    left = args.count if args.count is not None else -1
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def show(event_subject: str, payload: bytes) -> None:
        nonlocal left
        if done.done():
            return
        source = source_of(event_subject)
        try:
            batch = decode(payload)
        except ProtocolError as error:
            sys.stderr.write(f"{source}: {one_line(str(error))}\n")
            return
        try:
            left -= _print(follower, source, batch, args)
        except BrokenPipeError as error:  # the client of NATS would only log it
            done.set_exception(error)
        else:
            if left == 0:
                done.set_result(None)

    await transport.subscribe(events_of(args.namespace, args.component), show)
    sys.stderr.write("following; Ctrl-C ends\n")
    try:
        await done
    finally:
        await transport.close()
    return 0


def _print(follower: Follower, source: Source, batch: Batch, args: argparse.Namespace) -> bool:
    """Show one batch; False where there was nothing to show."""
    seen = follower.read(source, batch)
    if not (seen.missed or seen.events) and not (args.heartbeats and not batch.events):
        return False
    if args.json:
        shown = {"source": source_as_json(source), "missed": seen.missed, "batch": _as_json(batch, seen)}
        print(json.dumps(shown), flush=True)
        return True
    lag_ms = (time.time_ns() - batch.published_at_ns) / 1e6
    clock = time.strftime("%H:%M:%S", time.localtime(batch.published_at_ns / 1e9))
    what = f"{len(seen.events)} events" if batch.events else "heartbeat"
    print(f"{clock} {source}: {what} from id {batch.first_event_id}, {lag_ms:.1f} ms ago", flush=True)
    for line in follower.lines(source, seen):
        print(line, flush=True)
    return True


def _as_json(batch: Batch, seen: Seen) -> dict[str, object]:
    events = [{"event_id": event_id, **_event_as_json(event)} for event_id, event in seen.events]
    return {**msgspec.structs.asdict(batch), "events": events}


def _event_as_json(event: Event | Unknown) -> dict[str, object]:
    """The fields of an event, its hashes as text in the spelling of the lines."""
    fields: dict[str, Any] = {
        name: msgspec.to_builtins(value) for name, value in msgspec.structs.asdict(event).items()
    }
    if fields.get("parent_hash") is not None:
        fields["parent_hash"] = hash_text(fields["parent_hash"])
    if "sequence_hashes" in fields:
        fields["sequence_hashes"] = [hash_text(value) for value in fields["sequence_hashes"]]
    return {"type": type(event).__name__.lower(), **fields}


async def _learn_from_registry(follower: Follower) -> None:
    """Windows of workers that were there before us; without a registry, groups are shown by number."""
    from vswa_plugin.registry.opening import registry_from_env

    registry = registry_from_env()
    try:
        entries = await registry.entries()
        for entry in entries:
            follower.learn(entry)
        if not entries:
            sys.stderr.write(f"no worker is registered in {registry} yet: waiting for the events of one\n")
    except ConnectError as error:
        sys.stderr.write(f"windows of running workers are unknown: {error}\n")
    finally:
        await registry.close()
