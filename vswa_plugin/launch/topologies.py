"""The deployments that one command starts, those of NVIDIA's guide "Gemma3 Sliding Window"; no I/O.

A further one is an entry of :data:`TOPOLOGIES`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.engine import ROUTERS
from vswa_plugin.errors import ConfigError, unknown_choice
from vswa_plugin.launch.logs import LOG_BYTES
from vswa_plugin.program.options import at_least_one

#: The guide's own variable; what workers are given is ``vswa_plugin.engine.ROUTER_ENV``.
GUIDE_ENV = "ROUTER"


class Topology(msgspec.Struct, frozen=True):
    """One deployment.

    :param modes: what kinds of workers it has, as ``--mode`` of a worker.
    :param routed: whether requests go where their prefix is cached.
    """

    name: str
    modes: tuple[str, ...]
    about: str
    routed: bool = False


_PHASES = ("prefill", "decode")
TOPOLOGIES: Mapping[str, Topology] = {
    each.name: each
    for each in (
        Topology("agg", ("agg",), "every worker does both phases"),
        Topology("agg_router", ("agg",), "the same, and requests go where their prefix is cached", True),
        Topology("disagg", _PHASES, "prefill workers hand their KV to decode workers"),
        Topology("disagg_router", _PHASES, "the same, and prompts go where their prefix is cached", True),
    )
}


class WorkerGroup(msgspec.Struct, frozen=True):
    """Workers that are started alike.

    :param engine_args: engine options: a YAML file, the name of one that this package has, or None.
    :param override: engine options laid over the file.
    :param gpus: CUDA_VISIBLE_DEVICES of each worker; empty: as that of the launcher.
    """

    mode: str = "agg"
    count: int = 1
    engine_args: str | None = None
    override: dict[str, Any] = {}
    gpus: tuple[str, ...] = ()


class Routing(msgspec.Struct, frozen=True):
    """:param router: one of ``ROUTERS``, or None.
    :param count: how many routers or pickers of ours stand side by side.
    """

    router: str | None = None
    count: int = 1


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-dir`` and ``--log-size``; :func:`log_bytes` reads the latter."""
    parser.add_argument(
        "--log-dir", metavar="DIR", help="a directory in which the logs of all processes are kept"
    )
    parser.add_argument(
        "--log-size",
        type=at_least_one,
        default=LOG_BYTES >> 20,
        metavar="MIB",
        help="about how large NAME.log of a process may grow; its content then becomes NAME.log.1, and "
        f"the former content of that is deleted ({LOG_BYTES >> 20})",
    )


def log_bytes(args: argparse.Namespace) -> int:
    """What ``--log-size`` asks for."""
    return int(args.log_size) << 20


def find_topology(name: str) -> Topology:
    """The topology called ``name``; raises ConfigError."""
    if name not in TOPOLOGIES:
        raise ConfigError(unknown_choice("topology", name, TOPOLOGIES))
    return TOPOLOGIES[name]


def add_router(parser: argparse.ArgumentParser) -> None:
    """Add ``--router`` and ``--routers``."""
    parser.add_argument(
        "--router",
        metavar="|".join(ROUTERS),
        help="agg_router, disagg_router: our router, by what every window holds; picker: the same choice "
        "beside an Envoy, so that answers do not pass it; stock: the router in Dynamo's frontend, by events "
        f"of our workers (default: {GUIDE_ENV}, else exact)",
    )
    parser.add_argument(
        "--routers",
        type=at_least_one,
        metavar="N",
        help="exact, picker: how many routers side by side (1)",
    )


def chosen_router(args: argparse.Namespace, topology: Topology, environ: Mapping[str, str]) -> Routing:
    """The kind of router, and how many of them; ``--router`` goes before ROUTER.

    :raises ConfigError: an unknown router, or one that the topology has no use for.
    """
    option, router = "--router", args.router
    if router is None:
        option, router = GUIDE_ENV, environ.get(GUIDE_ENV) or None
    if router is not None and router not in ROUTERS:
        raise ConfigError(f"{option}: {unknown_choice('router', router, ROUTERS)}")
    if router is not None and not topology.routed:
        raise ConfigError(
            f"{option}: topology {topology.name!r} routes by no cache, expected no router, got {router!r}; "
            f"{topology.name}_router has one"
        )
    if topology.routed and router is None:
        router = "exact"
    if args.routers is not None and router not in ("exact", "picker"):
        chosen = "none" if router is None else repr(router)
        raise ConfigError(
            f"--routers: only {GUIDE_ENV}=exact and {GUIDE_ENV}=picker have routers of ours, got {chosen}"
        )
    return Routing(router, args.routers or 1)


def add_worker_counts(parser: argparse.ArgumentParser, several: int) -> None:
    """Add an option per mode for the number of its workers.

    :param several: how many there are by default where requests can go to any of them.
    """
    parser.set_defaults(several=several)
    parser.add_argument(
        "--workers", type=at_least_one, metavar="N", help=f"agg: how many workers ({several})"
    )
    of_router = f", disagg_router {several}" if several > 1 else ""
    parser.add_argument(
        "--prefill-workers",
        type=at_least_one,
        metavar="N",
        help=f"disagg: how many prefill workers (1{of_router})",
    )
    parser.add_argument(
        "--decode-workers", type=at_least_one, metavar="N", help="disagg: how many decode workers (1)"
    )


def worker_counts(args: argparse.Namespace, topology: Topology) -> dict[str, int]:
    """How many workers of each of the topology's modes were asked for.

    :raises ConfigError: an option of another topology.
    """
    counts = {"agg": args.several, "prefill": args.several if topology.routed else 1, "decode": 1}
    for mode in counts:
        option = "--workers" if mode == "agg" else f"--{mode}-workers"
        count = getattr(args, option.removeprefix("--").replace("-", "_"))
        if count is None:
            continue
        if mode not in topology.modes:
            raise ConfigError(
                f"{option}: topology {topology.name!r} has {' and '.join(topology.modes)} workers only"
            )
        counts[mode] = count
    return {mode: counts[mode] for mode in topology.modes}
