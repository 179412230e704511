"""``vswa doctor``: what a deployment needs of this machine and of its brokers, looked at piece by piece."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

import msgspec

from vswa_plugin import __version__
from vswa_plugin.blocks.kernel import load_kernel
from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.dynamo.runtime import check_release
from vswa_plugin.engine.gpus import VISIBLE_ENV, visible_gpus
from vswa_plugin.errors import ConfigError, VswaError, one_line
from vswa_plugin.following.fleet import Fleet, RankStatus
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.index import WindowIndex
from vswa_plugin.launch.brokers import ETCD_BYTES
from vswa_plugin.program.addresses import check_address
from vswa_plugin.program.args import nats_server
from vswa_plugin.program.disk import require_room, temporary_folder
from vswa_plugin.program.options import port, seconds
from vswa_plugin.program.run import DONE, FAILED, TERMINATION_ENV, CommandLineRefused
from vswa_plugin.registry.opening import reach, reach_discovery, registry_from_env
from vswa_plugin.wire.transport import Transport
from vswa_plugin.worker import args as worker_args

OK, WARNING, FAULT = "ok", "warning", "fault"
#: Ages of messages, which are told by two clocks: beyond them one of the clocks is wrong, or the way is slow.
EARLIEST_MS, LATEST_MS = -100.0, 5_000.0
#: Each stream of a client and to a worker is a file.
FEW_FILES = 4_096
_ENGINES = ("tensorrt-llm", "vllm")

_EXAMPLES = """\
examples:
  vswa doctor                                        versions, brokers, workers, GPUs, disk, limits
  vswa doctor -- --model-path /models/gemma --engine-config gemma3/vswa_agg --status-port 9345
                                                     and what `vswa worker` with these options would refuse
  vswa doctor --json                                 for scripts

It reads NATS_SERVER, ETCD_ENDPOINTS and the other variables of the programs, and starts and changes nothing.
"""


class Finding(NamedTuple):
    """:param state: ``ok``, ``warning`` or ``fault``.
    :param text: what was looked at and found, and, unless it is ok, what to do.
    """

    what: str
    state: str
    text: str


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument(
        "--http-port", type=port, metavar="PORT", help="look whether a frontend could listen on this port"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=5.0, metavar="SECONDS", help="how long brokers may take (5)"
    )
    parser.add_argument(
        "worker_options", nargs="*", metavar="-- OPTION", help="options of a worker, which is not started"
    )


def run(args: argparse.Namespace) -> int:
    with _quiet(), load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        found = asyncio.run(_findings(args, host))
    if args.json:
        print(msgspec.json.encode([each._asdict() for each in found]).decode())
    else:
        for each in found:
            print(f"{each.state:<8} {each.what:<11} {each.text}")
    return FAILED if any(each.state == FAULT for each in found) else DONE


@contextmanager
def _quiet() -> Iterator[None]:
    """The findings say what warnings would, unless the log level asks for more."""
    logger = logging.getLogger("vswa_plugin")
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)


async def _findings(args: argparse.Namespace, host: PluginHost) -> list[Finding]:
    found = [
        _tried("versions", _versions),
        *_machine(),
        *_plugins(host),
    ]
    if args.http_port is not None:
        found.append(_tried("port", lambda: _free(args.http_port)))
    if args.worker_options:
        found.append(_tried("worker", lambda: _worker(args.worker_options, host)))
    return [*found, *await _brokers(args.timeout, host)]


def _tried(what: str, look: Callable[[], str]) -> Finding:
    """What ``look`` says; a fault where it raises what a user or an operator can correct."""
    try:
        return Finding(what, OK, look())
    except CommandLineRefused as refused:
        return Finding(what, FAULT, refused.message)
    except (VswaError, OSError) as error:
        return Finding(what, FAULT, one_line(str(error)))


def _versions() -> str:
    check_release()
    engines = [f"{name} {version}" for name in _ENGINES if (version := _installed(name))]
    index = "with the kernel" if load_kernel() is not None else "in pure Python"
    parts = [f"vswa {__version__}", f"Python {platform.python_version()}"]
    parts += [f"Dynamo {_installed('ai-dynamo-runtime')}", *engines, f"index {index}"]
    return ", ".join(parts)


def _installed(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _machine() -> Iterator[Finding]:
    yield _tried("disk", _room)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < FEW_FILES:
        advice = (
            f"{files} open files are allowed: raise it (`ulimit -n {FEW_FILES}`) for many streams at once"
        )
        yield Finding("limits", WARNING, advice)
    else:
        yield Finding("limits", OK, f"{files} open files are allowed")
    gpus = visible_gpus(os.environ)
    named = f" ({VISIBLE_ENV})" if VISIBLE_ENV in os.environ else ""
    shown = ", ".join(gpus) or "none: an engine that needs one does not start here, gemma3_cpu does"
    yield Finding("GPUs", OK, shown + named)
    if path := os.environ.get(TERMINATION_ENV):
        yield _tried("permissions", lambda: _can_write(path))


def _room() -> str:
    folder = temporary_folder()
    require_room(
        folder, ETCD_BYTES, "an embedded etcd", "name another disk with TMPDIR, or use your own etcd"
    )
    with tempfile.NamedTemporaryFile(dir=folder):
        return f"temporary files can be written in {folder}"


def _can_write(path: str) -> str:
    """As :func:`~vswa_plugin.program.run.record_end` writes it, but for the text."""
    try:
        with open(path, "a", encoding="utf-8"):
            return f"{TERMINATION_ENV}: {path} can be written"
    except OSError as error:
        raise ConfigError(
            f"{TERMINATION_ENV}: expected a file that can be written, got {path}: {error.strerror}"
        ) from error


def _plugins(host: PluginHost) -> Iterator[Finding]:
    rows = host.plugins()
    lost = [f"{row.name}: {row.reason}" for row in rows if row.state == "failed"]
    for each in lost:
        yield Finding("plugins", FAULT, f"{one_line(each)}; correct it, or switch it off with --no-plugin")
    if not lost:
        yield Finding("plugins", OK, ", ".join(row.name for row in rows if row.state == "loaded"))


def _free(number: int) -> str:
    check_address("127.0.0.1", number)
    return f"a frontend can listen on {number}"


def _worker(options: list[str], host: PluginHost) -> str:
    """What a worker checks before it connects to anything."""
    args = worker_args.parse(options)
    if args.status_port:
        check_address(
            args.status_host, args.status_port, host_option="--status-host", port_option="--status-port"
        )
    engine = host.engine(args.settings)
    info = engine.info
    host.event_adapter(engine.event_format, info.layout)
    windows = ", ".join(group.label for group in info.layout.groups)
    said = (
        f"{args.settings.engine or info.engine} would serve {args.settings.served_model_name!r} (mode "
        f"{args.settings.mode}): windows {windows}, block size {info.layout.block_size}, context "
        f"{info.context_length}, {info.total_kv_blocks} blocks"
    )
    obstacle = chat_obstacle(info.model_dir or args.settings.model_path)
    return said if obstacle is None else f"{said}; for completions alone, not for chat: {obstacle}"


async def _brokers(timeout: float, host: PluginHost) -> list[Finding]:
    """Of registry and NATS each by itself, and of the workers where both answer."""
    found = [await _asked("registry", _registry(timeout)), await _asked("NATS", _nats(timeout))]
    if any(each.state == FAULT for each in found):
        return found
    transport = Transport(nats_server(os.environ), "vswa doctor")
    index = WindowIndex(rules=host.reuse_rules())
    fleet = Fleet(transport, registry_from_env(), namespace=None, index=index)
    try:
        await fleet.start(timeout)
        await fleet.settled(timeout)
        return [*found, *_workers(fleet)]
    finally:
        await fleet.stop()


async def _asked(what: str, answer: Awaitable[str]) -> Finding:
    try:
        return Finding(what, OK, await answer)
    except (VswaError, OSError) as error:
        return Finding(what, FAULT, one_line(str(error)))


async def _registry(timeout: float) -> str:
    registry = registry_from_env()
    try:
        await reach(registry, timeout)
        await reach_discovery(timeout)
        return f"{registry} answers"
    finally:
        await registry.close()


async def _nats(timeout: float) -> str:
    transport = Transport(nats_server(os.environ), "vswa doctor")
    await transport.connect(timeout)
    try:
        await transport.flush()
        return f"{nats_server(os.environ)} answers"
    finally:
        await transport.close()


def _workers(fleet: Fleet) -> Iterator[Finding]:
    entries = list(fleet.entries.values())
    if not entries:
        yield Finding("workers", WARNING, "none is registered: start one, or is it another ETCD_ENDPOINTS?")
        return
    models = ", ".join(sorted({entry.served_model_name for entry in entries}))
    yield Finding("workers", OK, f"{len(entries)} in the registry, of {models}")
    others = sorted({entry.version for entry in entries} - {__version__})
    if others:
        beside = f"workers of vswa {', '.join(others)} beside {__version__} here"
        yield Finding("versions", WARNING, f"{beside}: fine during an update, not for long")
    yield from _streams(fleet.statuses(time.time_ns()))


def _streams(statuses: list[RankStatus]) -> Iterator[Finding]:
    """Whether the events of all ranks come, and by clocks that agree."""
    for status in statuses:
        rank = status.source.rank
        if status.state != "live":
            reason = f" ({status.reason})" if status.reason else ""
            advice = "can the worker reach NATS, and may this user read its events (docs/operations.md)?"
            yield Finding("events", FAULT, f"rank {rank} is {status.state}{reason}: {advice}")
        elif status.lag_ms is not None and not EARLIEST_MS <= status.lag_ms <= LATEST_MS:
            age = f"the last message of rank {rank} is {status.lag_ms:.0f} ms old"
            yield Finding("clock", FAULT, f"{age}: set the clocks of both machines (NTP)")
    live = [status for status in statuses if status.state == "live"]
    if live:
        yield Finding("events", OK, f"{len(live)} of {len(statuses)} ranks are known exactly")
