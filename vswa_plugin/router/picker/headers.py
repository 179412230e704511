"""The headers by which Dynamo's frontend pins a request, and which of them a client must not send. Pure."""

from __future__ import annotations

from functools import lru_cache

from vswa_plugin.dynamo.names import HEADER_ALIASES, HEADERS_OF_CLIENTS, OWN_HEADERS

#: With a UUID in it, the request has this id at the worker, and so in the worker's report.
REQUEST_ID = "x-dynamo-request-id"
#: Where a gateway's implementation of an InferencePool sends the request; also a key of Envoy's metadata.
DESTINATION = "x-gateway-destination-endpoint"
#: The same metadata's list of endpoints that a picker may choose among.
SUBSET_NAMESPACE, SUBSET_KEY = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
LB_NAMESPACE = "envoy.lb"
#: Prefix of headers that workers and plugins see as metadata of the request.
METADATA = "x-dynamo-meta-"
SESSION = "x-dynamo-session-id"


@lru_cache(maxsize=4_096)
def is_routing(name: str) -> bool:
    """Whether a client's header of that name would route its request past the choice that is made for it."""
    if name.startswith(OWN_HEADERS):
        return not name.removeprefix(OWN_HEADERS).startswith(HEADERS_OF_CLIENTS)
    return name.startswith((DESTINATION, *HEADER_ALIASES))


def routing_patterns() -> list[str]:
    """Regular expressions for the names that :func:`is_routing` is true for, without look-ahead.

    Each is short: Envoy refuses long ones.
    """
    patterns = [f"{alias}.*" for alias in (*HEADER_ALIASES, DESTINATION)]
    firsts = "".join(sorted({word[0] for word in HEADERS_OF_CLIENTS}))
    patterns.append(f"{OWN_HEADERS}(?:[^{firsts}].*)?")
    for word in HEADERS_OF_CLIENTS:
        branches = [f"{word[:at]}(?:[^{word[at]}]|$)" for at in range(1, len(word))]
        patterns.append(f"{OWN_HEADERS}(?:{'|'.join(branches)}).*")
    return patterns
