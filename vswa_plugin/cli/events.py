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

import msgspec

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError
from vswa_plugin.program.args import nats_server
from vswa_plugin.program.options import at_least_one
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
    parser.add_argument("--namespace", help="only workers of this Dynamo namespace")
    parser.add_argument("--component", help="only workers of this Dynamo component")
    parser.add_argument("--window", metavar="TOKENS|global", help="only this window")
    parser.add_argument("--heartbeats", action="store_true", help="show heartbeats too")
    parser.add_argument("--json", action="store_true", help="one JSON object per batch")
    parser.add_argument("--count", type=at_least_one, metavar="N", help="stop after N batches")


def run(args: argparse.Namespace) -> int:
    if args.window not in (None, "global") and not (args.window.isdecimal() and int(args.window)):
        raise ConfigError(f"--window: expected a number of tokens or 'global', got {args.window!r}")
    for option, name in (("--namespace", args.namespace), ("--component", args.component)):
        if name is not None:
            check_name(option, name)
    return asyncio.run(_follow(args))


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

    def lines(self, source: Source, batch: Batch) -> list[str]:
        """Readable lines for one batch; first, whether something was missed before it."""
        lines = []
        epoch, event_id = self.expected.get(source, (batch.epoch, batch.first_event_id))
        if epoch == batch.epoch and event_id < batch.first_event_id:
            lines.append(f"  gap: {batch.first_event_id - event_id} events were missed")
        self.expected[source] = (batch.epoch, batch.next_event_id)
        self.heartbeats[source] += not batch.events
        for event_id, event in enumerate(batch.events, batch.first_event_id):
            if isinstance(event, Layout):
                self.groups[source] = {group.group_id: group for group in event.groups}
            if self._wanted(source, event):
                lines.append(f"  {event_id:>6}  {self._describe(source, event)}")
        return lines

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
                parent = "the root" if event.parent_hash is None else f"{event.parent_hash:016x}"
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
    shown = " ".join(f"{value:016x}" for value in hashes[:3])
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
            sys.stderr.write(f"{source}: {error}\n")
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
    lines = follower.lines(source, batch)
    if not lines and not (args.heartbeats and not batch.events):
        return False
    if args.json:
        shown = {"source": msgspec.to_builtins(source), "batch": _as_json(batch)}
        print(json.dumps(shown), flush=True)
        return True
    lag_ms = (time.time_ns() - batch.published_at_ns) / 1e6
    clock = time.strftime("%H:%M:%S", time.localtime(batch.published_at_ns / 1e9))
    what = f"{len(batch.events)} events" if batch.events else "heartbeat"
    print(f"{clock} {source}: {what} from id {batch.first_event_id}, {lag_ms:.1f} ms ago", flush=True)
    for line in lines:
        print(line, flush=True)
    return True


def _as_json(batch: Batch) -> dict[str, object]:
    events = [
        {
            "type": type(event).__name__.lower(),
            **{k: msgspec.to_builtins(v) for k, v in msgspec.structs.asdict(event).items()},
        }
        for event in batch.events
    ]
    return {**msgspec.structs.asdict(batch), "events": events}


async def _learn_from_registry(follower: Follower) -> None:
    """Windows of workers that were there before us; without a registry, groups are shown by number."""
    from vswa_plugin.registry.opening import registry_from_env

    registry = registry_from_env()
    try:
        for entry in await registry.entries():
            follower.learn(entry)
    except ConnectError as error:
        sys.stderr.write(f"windows of running workers are unknown: {error}\n")
    finally:
        await registry.close()
