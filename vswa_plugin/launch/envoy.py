"""Envoy before Dynamo's frontend, with a picker of ours: its configuration, and its binary. No process here.

The binary is that of PATH, else the one in the extra ``gateway``.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vswa_plugin.dynamo.preprocess import PATHS
from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.router.picker.headers import routing_patterns

_TYPES = "type.googleapis.com/envoy"
_PICKER, _FRONTEND = "picker", "frontend"
#: Of a request's body, which is held until its worker is chosen; a larger one is refused with 413.
_BODY_BYTES = 64 << 20
#: Requests under way, connections and waiting requests of one cluster; Envoy's default is 1,024.
_MOST = 1_000_000


class Address(msgspec.Struct, frozen=True):
    host: str
    port: int

    @classmethod
    def parse(cls, option: str, text: str) -> Address:
        """``HOST:PORT``, with brackets around an IPv6 address; raises ConfigError."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise ConfigError(f"{option}: expected HOST:PORT, got {shown(text)}")
        return cls(host, int(port))


class EnvoySettings(msgspec.Struct, frozen=True):
    """:param listen: where clients come; ``frontends``: where they go; ``pickers``: who says to which worker.
        Without pickers, Envoy only passes on.
    :param closed: whether requests are refused while no picker answers; else the frontend's own mode decides.
    :param picker_timeout_s: how long a picker may take for an answer.
    """

    listen: Address
    frontends: tuple[Address, ...]
    pickers: tuple[Address, ...] = ()
    closed: bool = False
    picker_timeout_s: float = 10.0


def envoy_config(settings: EnvoySettings) -> dict[str, Any]:
    """Envoy's bootstrap configuration, version 3 of its API."""
    filters = [*([_picker_filter(settings)] if settings.pickers else []), _typed_filter("router", "Router")]
    manager = {
        "stat_prefix": "vswa",
        "http_filters": filters,
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": _routes(bool(settings.pickers))}]
        },
        "early_header_mutation_extensions": [_without_routing_headers()],
        # A model may think for long before its first token, and between two.
        "stream_idle_timeout": "0s",
    }
    listener = {
        "name": "clients",
        "address": _address(settings.listen),
        "per_connection_buffer_limit_bytes": _BODY_BYTES,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "http",
                        "typed_config": {
                            "@type": f"{_TYPES}.extensions.filters.network.http_connection_manager.v3"
                            ".HttpConnectionManager",
                            **manager,
                        },
                    }
                ]
            }
        ],
    }
    clusters = [_cluster(_FRONTEND, settings.frontends)]
    if settings.pickers:
        clusters.append(_cluster(_PICKER, settings.pickers) | _HTTP2)
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def find_envoy() -> str:
    """The path of Envoy's binary; raises ConfigError."""
    if (found := shutil.which("envoy")) is not None:
        return found
    spec = importlib.util.find_spec("envoy")
    path = Path(next(iter(spec.submodule_search_locations or ()))) / "_bin/envoy" if spec else None
    if path is None or not path.is_file():
        raise ConfigError(
            "expected Envoy on PATH, or out of the extra gateway, got neither; pip install "
            "'vswa-plugin[gateway]', or install Envoy 1.30 or later"
        )
    return str(path)


def _picker_filter(settings: EnvoySettings) -> dict[str, Any]:
    return {
        "name": "picker",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": _PICKER}},
            "failure_mode_allow": not settings.closed,
            "message_timeout": f"{settings.picker_timeout_s:g}s",
            "processing_mode": {
                "request_header_mode": "SEND",
                "request_body_mode": "BUFFERED",
                "request_trailer_mode": "SKIP",
                # They come with the first token, and no byte of the answer is sent to the picker.
                "response_header_mode": "SEND",
                "response_body_mode": "NONE",
                # There are none; but without this, the picker would not learn when an answer ends.
                "response_trailer_mode": "SEND",
            },
        },
    }


def _routes(picks: bool) -> list[dict[str, Any]]:
    """Only requests that generate are sent to the picker."""
    to_frontend = {"route": {"cluster": _FRONTEND, "timeout": "0s"}}
    others: dict[str, Any] = {"match": {"prefix": "/"}, **to_frontend}
    if not picks:
        return [others]
    off = {"@type": f"{_TYPES}.extensions.filters.http.ext_proc.v3.ExtProcPerRoute", "disabled": True}
    method = {"name": ":method", "string_match": {"exact": "POST"}}
    chosen = [{"match": {"path": path, "headers": [method]}, **to_frontend} for path in PATHS]
    return [*chosen, {**others, "typed_per_filter_config": {"picker": off}}]


def _without_routing_headers() -> dict[str, Any]:
    """What clients say about the way of their requests is removed before anybody reads it."""
    return {
        "name": "routing headers",
        "typed_config": {
            "@type": f"{_TYPES}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [
                {"remove_on_match": {"key_matcher": {"safe_regex": {"regex": pattern}}}}
                for pattern in routing_patterns()
            ],
        },
    }


def _typed_filter(name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "typed_config": {"@type": f"{_TYPES}.extensions.filters.http.{name}.v3.{kind}"},
    }


_HTTP2 = {
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
}


def _cluster(name: str, addresses: Sequence[Address]) -> dict[str, Any]:
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), _MOST)
    return {
        "name": name,
        "type": "STATIC" if all(_is_numeric(each.host) for each in addresses) else "STRICT_DNS",
        "connect_timeout": "2s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _address(each)}} for each in addresses]}
            ],
        },
    }


def _address(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
