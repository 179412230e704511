"""Names that we share with NVIDIA Dynamo: environment, endpoints, options, router modes."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vswa_plugin.errors import ConfigError, shown
from vswa_plugin.wire.subjects import check_name

#: What Dynamo reads its addresses from; ours are the same, so that one environment serves both.
NATS_ENV, ETCD_ENV = "NATS_SERVER", "ETCD_ENDPOINTS"
#: The namespace of a deployment; what is appended to it for one of several sets of workers; what the
#: namespaces begin with of which a frontend shows models.
NAMESPACE_ENV, SUFFIX_ENV = "DYN_NAMESPACE", "DYN_NAMESPACE_WORKER_SUFFIX"
PREFIX_ENV = "DYN_NAMESPACE_PREFIX"
ENDPOINT_ENV = "DYN_ENDPOINT"
DEFAULT_NAMESPACE = "dynamo"
DEFAULT_ETCD = "http://127.0.0.1:2379"
#: Keeps every socket of Dynamo on this machine: for demos and tests.
LOOPBACK_ENV = {
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
    "DYN_EVENT_PLANE_HOST": "127.0.0.1",
    # The other one, ZeroMQ, listens on all addresses whatever the host above.
    "DYN_EVENT_PLANE": "nats",
    "DYN_SELF_HOST_METADATA": "0",
}
#: Options of Dynamo's own workers.
TOOL_CALL_PARSER, REASONING_PARSER = "--dyn-tool-call-parser", "--dyn-reasoning-parser"
#: How Dynamo's frontend chooses workers -> the name of that in its ``RouterMode``.
ROUTER_MODES = {"round-robin": "RoundRobin", "random": "Random", "kv": "KV", "direct": "Direct"}

#: What the headers begin with that Dynamo's frontend reads for itself; behind that, those that say something
#: of the request and not of its way; and the names without that prefix that it still takes.
OWN_HEADERS, HEADERS_OF_CLIENTS = "x-dynamo-", ("meta-", "session-")
HEADER_ALIASES = ("x-worker-", "x-prefill-", "x-dp-", "x-data-parallel-")

#: Key of a request that is none: a router returns to a prefill worker the ``disaggregated_params`` of a
#: prompt that no decode worker will fetch. Dynamo's frontend never sends it, whatever a client writes.
RELEASE = "vswa_release"


class EndpointName(msgspec.Struct, frozen=True):
    """``dyn://namespace.component.endpoint``."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, text: str, where: str = "--endpoint") -> EndpointName:
        """Raises ConfigError that names ``where``."""
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(parts):
            raise ConfigError(f"{where}: expected dyn://namespace.component.endpoint, got {shown(text)}")
        for what, part in zip(cls.__struct_fields__, parts, strict=True):
            check_name(f"{where}, {what}", part)
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"


#: Where the workers of each mode stand within a namespace, as those of Dynamo's own backends do.
COMPONENTS = {"agg": "backend", "prefill": "prefill", "decode": "backend"}
#: The same for routers of ours.
ROUTER_COMPONENT = "router"


def named_namespace(environ: Mapping[str, str], default: str = DEFAULT_NAMESPACE) -> str:
    """The namespace that DYN_NAMESPACE names, else ``default``; raises ConfigError."""
    return check_name(NAMESPACE_ENV, environ.get(NAMESPACE_ENV) or default)


def worker_namespace(environ: Mapping[str, str], namespace: str | None = None) -> str:
    """``namespace``, else that of DYN_NAMESPACE, with DYN_NAMESPACE_WORKER_SUFFIX behind a hyphen.

    So do Dynamo's own workers compose it, for several sets of workers of one model, as in a rolling update.

    :raises ConfigError: names the variable that is wrong.
    """
    base = named_namespace(environ) if namespace is None else namespace
    suffix = environ.get(SUFFIX_ENV)
    return f"{base}-{check_name(SUFFIX_ENV, suffix)}" if suffix else base


def default_endpoint(mode: str, namespace: str = DEFAULT_NAMESPACE) -> EndpointName:
    """The endpoint of workers of ``mode`` that were given none."""
    return EndpointName(namespace, COMPONENTS[mode], "generate")
