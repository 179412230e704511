"""Names that we share with NVIDIA Dynamo: environment, endpoints, options, router modes."""

from __future__ import annotations

import msgspec

from vswa_plugin.errors import ConfigError

#: What Dynamo reads its addresses from; ours are the same, so that one environment serves both.
NATS_ENV, ETCD_ENV = "NATS_SERVER", "ETCD_ENDPOINTS"
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
ROUTER_MODES = ("round-robin", "random", "kv", "direct")


class EndpointName(msgspec.Struct, frozen=True):
    """``dyn://namespace.component.endpoint``."""

    namespace: str
    component: str
    endpoint: str

    @classmethod
    def parse(cls, text: str) -> EndpointName:
        parts = text.removeprefix("dyn://").split(".")
        if len(parts) != 3 or not all(parts):
            raise ConfigError(f"--endpoint: expected dyn://namespace.component.endpoint, got {text!r}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.endpoint}"


#: Where the workers of each mode stand within a namespace, as those of Dynamo's own backends do.
COMPONENTS = {"agg": "backend", "prefill": "prefill", "decode": "backend"}
#: The same for routers of ours.
ROUTER_COMPONENT = "router"


def default_endpoint(mode: str, namespace: str = "dynamo") -> EndpointName:
    """The endpoint of workers of ``mode`` that were given none."""
    return EndpointName(namespace, COMPONENTS[mode], "generate")
