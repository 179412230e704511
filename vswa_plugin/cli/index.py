"""``vswa index``: what every rank holds, per window, live."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any

import msgspec

from vswa_plugin.errors import ConfigError, one_line, shown
from vswa_plugin.following.fleet import Fleet, RankStatus
from vswa_plugin.host.loading import load_host
from vswa_plugin.index import WindowIndex
from vswa_plugin.program.args import nats_server
from vswa_plugin.program.life import Life, Program
from vswa_plugin.program.options import excludes, port, requires, seconds
from vswa_plugin.program.status import StatusServer
from vswa_plugin.registry.opening import registry_from_env
from vswa_plugin.tasks import Tasks
from vswa_plugin.wire.events import source_as_json
from vswa_plugin.wire.subjects import check_name
from vswa_plugin.wire.transport import Transport

_EXAMPLES = """\
examples:
  vswa index                     a table that keeps up, until Ctrl-C
  vswa index --once              the table once, when every rank is known exactly
  vswa index --once --json       the same for scripts
  vswa index --status-port 9091  also serve /health, /ready and /metrics of reader and index
  vswa index --router http://127.0.0.1:8090   also how many promises that router kept

Of each rank and window: the blocks that it holds (device, + slower tiers) and how full it is; events a
second; of workers with a status port their load and the share of prompt tokens that was reused (hit).
Green is right, yellow is out of date, red gets no requests. NO_COLOR=1 turns colours off.

Where there is no worker, or the registry cannot be read, it says so and ends with exit code 1; with
--status-port it waits.
NATS_SERVER and ETCD_ENDPOINTS (or VSWA_REGISTRY) say where the deployment is.
"""


#: Between two looks of the live display.
REFRESH_S = 1.0
#: Columns of a table that goes to no terminal, which need not fit a window.
_FILE_WIDTH = 200


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--namespace", help="show only workers of this Dynamo namespace")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    parser.add_argument(
        "--check", action="store_true", help="with --once: verify every invariant of the index"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long NATS and the registry may take to answer, and with --once every rank (10)",
    )
    parser.add_argument(
        "--router", metavar="URL", help="also show the promises that this router kept, by its HTTP API"
    )
    parser.add_argument(
        "--status-port", type=port, metavar="PORT", help="serve /health, /ready and /metrics, not with --once"
    )


def run(args: argparse.Namespace) -> int:
    check_namespace(args)
    requires("--json", args.json, "--once", args.once)
    requires("--check", args.check, "--once", args.once)
    excludes("--status-port", args.status_port, "--once", args.once)
    excludes("--router", args.router, "--once", args.once)
    if args.router is not None and not args.router.startswith(("http://", "https://")):
        raise ConfigError(f"--router: expected a URL such as http://127.0.0.1:8090, got {shown(args.router)}")
    return asyncio.run(_run(args))


def check_namespace(args: argparse.Namespace) -> None:
    """Raise ConfigError where ``--namespace`` cannot be one."""
    if args.namespace is not None:
        check_name("--namespace", args.namespace)


def fleet_for(args: argparse.Namespace, tasks: Tasks | None = None) -> Fleet:
    """A fleet of the brokers that the environment names, with the plugins' reuse rules; not connected yet.

    :param tasks: where its long-lived tasks are watched.
    """
    transport = Transport(nats_server(os.environ), "vswa index")
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        index = WindowIndex(rules=host.reuse_rules())
    return Fleet(transport, registry_from_env(), namespace=args.namespace, index=index, tasks=tasks)


async def _run(args: argparse.Namespace) -> int:
    if not args.once:
        life = Life("vswa index")
        return await life.run(_Live(args, life))
    fleet = fleet_for(args)
    try:
        await fleet.start(args.timeout)
        return await _once(fleet, args)
    finally:
        await fleet.stop()


async def _once(fleet: Fleet, args: argparse.Namespace) -> int:
    fleet.check_found()
    exact = await fleet.settled(args.timeout)
    if args.check:
        fleet.index.check()
    statuses, stats = fleet.statuses(time.time_ns()), fleet.index.stats()
    if args.json:
        report = {"exact": exact, "ranks": [_as_json(status) for status in statuses], "index": stats}
        print(msgspec.json.encode(report).decode())
    else:
        from rich.console import Console

        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, _FILE_WIDTH)
        console.print(_table(statuses, stats, terminal=console.is_terminal))
    return 0 if exact else 1


def _as_json(status: RankStatus) -> dict[str, Any]:
    source = source_as_json(status.source)
    return {**msgspec.structs.asdict(status), "source": source}


class _Live(Program):
    """A table that keeps up, until a signal."""

    def __init__(self, args: argparse.Namespace, life: Life) -> None:
        from vswa_plugin.following.metrics import fleet_families
        from vswa_plugin.program.metrics import About, Page

        self._args = args
        self._tasks = life.tasks
        self._fleet = fleet_for(args, life.tasks)
        self._server = StatusServer(
            life.status, Page(lambda: About("index"), lambda: fleet_families(self._fleet)).render
        )

    async def start(self) -> None:
        await self._fleet.start(self._args.timeout)
        if self._args.status_port is not None:
            await self._server.start("127.0.0.1", self._args.status_port)

    async def serve(self) -> None:
        from rich.console import Console
        from rich.live import Live

        from vswa_plugin.cli.pages import Pages
        from vswa_plugin.cli.top import Rates, display

        fleet, console = self._fleet, Console(highlight=False)
        pages, rates = Pages(fleet.entries, self._args.router), Rates()
        if self._args.status_port is None:  # a program that is scraped waits for its deployment
            fleet.check_found()
        reading = self._tasks.start(pages.follow(), "read status pages")
        try:
            with Live(console=console, auto_refresh=False, transient=False) as live:
                while True:
                    statuses, stats = fleet.statuses(time.time_ns()), fleet.index.stats()
                    now = rates.of(statuses)
                    content = display(statuses, stats, fleet.entries, now, pages.workers, pages.kept)
                    live.update(content, refresh=True)
                    await asyncio.sleep(REFRESH_S)
        finally:
            await self._tasks.stop([reading])

    async def end(self) -> None:
        await self._server.stop()
        await self._fleet.stop()


def _table(statuses: list[RankStatus], stats: Any, *, terminal: bool) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kernel = "compiled kernel" if stats.kernel else "pure Python"
    left_out = f", {stats.left_out} blocks left out for lack of room" if stats.left_out else ""
    caption = f"{stats.ranks} ranks, {stats.nbytes / 1e6:.1f} MB, {kernel}{left_out}"
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, caption=caption)
    for heading in (
        "rank",
        "model",
        "state",
        "window",
        "blocks",
        "tiers",
        "lag",
        "epoch",
        "next id",
    ):
        table.add_column(heading, justify="right" if heading in ("blocks", "lag", "next id") else "left")
    # Ids of one deployment differ in their last digits only: never shorten them.
    table.columns[0].min_width = max((len(str(each.source.rank)) for each in statuses), default=0)
    for status in statuses:
        for number, (window, tiers) in enumerate(status.blocks.items() or [("-", {})]):
            first = number == 0
            lag = "" if status.lag_ms is None else f"{status.lag_ms:.0f} ms"
            slow = one_line(" ".join(f"{tier} {count}" for tier, count in tiers.items() if count))
            model = Text(one_line(status.model))  # others name it: no markup, and nothing for the terminal
            whose = (str(status.source.rank), model, status.state)
            stream = (lag, str(status.epoch), str(status.next_event_id))
            table.add_row(
                *(whose if first else [""] * 3),
                window,
                str(sum(tiers.values())),
                Text(slow),
                *(stream if first else [""] * 3),
            )
    return table
