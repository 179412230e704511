"""What a cluster is asked to start, and the command lines that come of it; no process is started here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from vswa_plugin.dynamo.names import DEFAULT_NAMESPACE, ROUTER_COMPONENT, EndpointName, default_endpoint
from vswa_plugin.engine import ROUTER_ENV
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.envoy import find_envoy
from vswa_plugin.launch.gpus import gpus_needed, with_gpus
from vswa_plugin.launch.logs import LOG_BYTES
from vswa_plugin.launch.topologies import Routing, WorkerGroup
from vswa_plugin.router import args as router_args
from vswa_plugin.router.picker import args as picker_args
from vswa_plugin.router.pools import slug_of
from vswa_plugin.worker import args as worker_args
from vswa_plugin.worker.engine_args import CONFIG_OPTION, FILE_OPTION, shipped_configs

MAX_PORT = 65_535


class ClusterSettings(msgspec.Struct, frozen=True):
    """What to start.

    :param groups: the workers; see topologies.py.
    :param engine: as ``--engine`` of a worker; empty: the default of the plugins, whatever VSWA_ENGINE says.
    :param namespace: of everything that is started, whatever DYN_NAMESPACE says.
    :param http_port: port of the frontend; 0 for a free one.
    :param routing: ``exact``: routers of ours in front of hidden workers; ``picker``: Envoy before the
        frontend, and pickers of ours that choose for it; ``stock``: the frontend's own, fed with the workers'
        blocks. Neither: the frontend chooses by ``router_mode``.
    :param worker_options: added to the command line of every worker; ``router_options``: of every router.
    :param keep: start frontend, routers and workers again when they fail, and wait for them without end.
    :param log_bytes: about how large the log of a process may grow while it runs; see logs.py.
    """

    model_path: str
    served_model_name: str
    groups: tuple[WorkerGroup, ...] = (WorkerGroup(),)
    engine: str = ""
    namespace: str = DEFAULT_NAMESPACE
    http_host: str = "127.0.0.1"
    http_port: int = 0
    router_mode: str = "round-robin"
    routing: Routing = Routing()
    worker_options: tuple[str, ...] = ()
    router_options: tuple[str, ...] = ()
    keep: bool = False
    log_bytes: int = LOG_BYTES


def worker_arguments(settings: ClusterSettings, group: WorkerGroup) -> list[str]:
    """The command line of a worker of ``group``."""
    arguments = ["--mode", group.mode, "--engine", settings.engine, "--model-path", settings.model_path]
    arguments += ["--served-model-name", settings.served_model_name]
    arguments += ["--endpoint", f"dyn://{default_endpoint(group.mode, settings.namespace)}"]
    if group.engine_args:
        shipped = group.engine_args in shipped_configs() and not Path(group.engine_args).is_file()
        arguments += [CONFIG_OPTION if shipped else FILE_OPTION, group.engine_args]
    if group.override:
        arguments += ["--override-engine-args", json.dumps(group.override)]
    return [*arguments, *settings.worker_options]


def status_port(settings: ClusterSettings, number: int) -> int | None:
    """The port of the ``number``-th worker's status, from 0: the one that the workers' command line has for
    the first, and those after it for the others; 0: any, each time that the worker starts; None: not stated.
    """
    first = _parsed(settings)[0].status_port
    return first + number if first else first


def settings_with_gpus(
    settings: ClusterSettings, environ: Mapping[str, str], say: Callable[[str], None]
) -> ClusterSettings:
    """``settings`` with the GPUs of each worker; raises ConfigError where they do not suffice."""
    needs = [gpus_needed(workers.settings.options) for workers in _parsed(settings)]
    groups = with_gpus(settings.groups, needs, environ, say)
    return msgspec.structs.replace(settings, groups=groups)


def router_endpoint(settings: ClusterSettings) -> EndpointName:
    """Where all routers of the model stand, and those of no other."""
    model = slug_of(settings.served_model_name)
    return EndpointName(settings.namespace, ROUTER_COMPONENT, f"generate-{model}")


def router_arguments(settings: ClusterSettings) -> list[str]:
    """The command line of a router or picker of ours, each of which stands for all the others."""
    arguments = ["--namespace", settings.namespace]
    if settings.routing.router != "picker":
        arguments += ["--endpoint", f"dyn://{router_endpoint(settings)}"]
        arguments += ["--served-model-name", settings.served_model_name]
    workers = _parsed(settings)[0]
    arguments += ["--heartbeat", f"{workers.heartbeat_s:g}"]
    if workers.registry:
        arguments += ["--registry", workers.registry]
    for option, names in (("--plugin", workers.plugin), ("--no-plugin", workers.no_plugin)):
        for name in names:
            arguments += [option, name]
    return [*arguments, *settings.router_options]


def named_registry(settings: ClusterSettings) -> str | None:
    """The registry that the workers' command lines name; None: that of the environment."""
    return _parsed(settings)[0].registry


def router_address(settings: ClusterSettings) -> tuple[str, int]:
    """Host and port of a router's HTTP API; port 0: a free one."""
    http = _parsed_router(settings).http
    return http.host, http.port or 0


def _parsed_router(settings: ClusterSettings) -> router_args.RouterArgs:
    arguments = router_arguments(settings)
    if settings.routing.router == "picker":
        return picker_args.parse_picker(arguments)[0]
    return router_args.parse(arguments)


def routing_environment(routing: Routing) -> dict[str, str]:
    """The variables by which workers learn which router they work behind, in place of our own.

    What a plugin makes of it, such as events for Dynamo's own router, is the plugin's affair.
    """
    return {ROUTER_ENV: routing.router or ""}


def check_settings(settings: ClusterSettings) -> None:
    """Raise ConfigError for whatever can be found wrong without starting a process."""
    hidden = settings.routing.router == "exact"
    for workers in _parsed(settings):
        if workers.showing.visible == hidden:
            raise ConfigError(
                f"--register ({workers.showing.reason}): "
                + (
                    "expected hidden workers behind our router, else the frontend sends requests past it"
                    if hidden
                    else "expected workers that the frontend can see, nothing else sends them requests"
                )
                + "; leave it at auto"
            )
    count = sum(group.count for group in settings.groups)
    if (last := status_port(settings, count - 1)) is not None and last > MAX_PORT:
        raise ConfigError(
            f"--status-port: expected room for {count} workers, each with a port of its own, got "
            f"{last - count + 1} for the first, which makes {last} the last"
        )
    if settings.routing.router == "picker":
        find_envoy()
    if settings.routing.router in ("exact", "picker"):
        _parsed_router(settings)


def _parsed(settings: ClusterSettings) -> list[worker_args.WorkerArgs]:
    """The workers' command lines, as a worker of each group reads its own."""
    environ = {**os.environ, **routing_environment(settings.routing)}
    return [worker_args.parse(worker_arguments(settings, group), environ) for group in settings.groups]
