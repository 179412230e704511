"""Dynamo's discovery on Kubernetes: whether its API lists what is read there, and takes what is written.

Dynamo's runtime logs what the API answers, and goes on: a list that is refused it tries again without end, so
that a program would wait for ever; a worker whose object is refused would end, with its model loaded. So both
are tried before, and once more as the model is loaded: Dynamo's runtime serves an endpoint once or never.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any

from vswa_plugin.errors import ConnectError, one_line

logger = logging.getLogger(__name__)

_OBJECTS = "dynamoworkermetadatas.nvidia.com"
_ADVICE = (
    "Dynamo's lines above have the API's answer: at 401 or 403 the pod's service account lacks {lacks}; at "
    "404 the custom resource definitions of Dynamo's operator are not installed"
)
_LACKS_READ = f"get, list and watch of {_OBJECTS} and endpointslices.discovery.k8s.io"
_LACKS_WRITE = f"get, create and patch of {_OBJECTS}"


def on_kubernetes() -> bool:
    """Whether Dynamo's runtime finds its instances through the API of Kubernetes."""
    return os.environ.get("DYN_DISCOVERY_BACKEND") == "kubernetes"


async def reach_kubernetes(endpoint: Any, timeout_s: float, *, writes: bool) -> None:
    """Return once Dynamo's discovery on Kubernetes works, at once where it is another one.

    :param endpoint: Dynamo's endpoint; where its object is written, it is taken out again.
    :param writes: whether this process is found through it, as a worker is.
    :raises ConnectError: it does not within ``timeout_s``; says what may be missing.
    """
    if not on_kubernetes():
        return
    deadline = time.monotonic() + timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            await endpoint.client()  # returns with the first lists
    except TimeoutError as error:
        raise _no_answer(f"lists nothing within {timeout_s:g} s", _LACKS_READ) from error
    while writes:
        try:
            await endpoint.register_endpoint_instance()
            await endpoint.unregister_endpoint_instance()
            return
        except Exception as error:  # Dynamo raises plain Exception
            reason = f"does not take the object of this pod ({one_line(str(error))})"
            if time.monotonic() > deadline:
                raise _no_answer(reason, _LACKS_WRITE) from error
            logger.warning("the Kubernetes API %s; trying on", reason)
            await asyncio.sleep(1)


def _no_answer(what: str, lacks: str) -> ConnectError:
    return ConnectError(f"the Kubernetes API {what}; {_ADVICE.format(lacks=lacks)}")
