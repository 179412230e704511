"""What vLLM's errors and its end mean for a request and for the worker."""

from __future__ import annotations

import logging
from typing import Any

from vswa_plugin.errors import InvalidRequest, RequestError

from .package import Api, one_line

logger = logging.getLogger(__name__)

#: What a request may be refused with by vLLM's own checks.
REFUSED = (ValueError, TypeError, NotImplementedError)


def refusal(error: BaseException) -> InvalidRequest:
    return InvalidRequest(f"vLLM refuses the request: {one_line(error)}")


def fault(error: BaseException, api: Api) -> RequestError:
    if isinstance(error, (*REFUSED, api.ClientError)):
        return refusal(error)
    logger.error("vLLM has met a fault in one request; the engine goes on", exc_info=error)
    return RequestError(f"vLLM could not serve the request: {type(error).__name__}: {error}")


def ending(llm: Any) -> str:
    """How the engine's processes have ended, as far as that can be seen."""
    try:
        processes = llm.engine_core.resources.engine_manager.processes
        ended = [
            f"{each.name} with exit code {each.exitcode}" for each in processes if each.exitcode is not None
        ]
    except AttributeError:
        ended = []
    return ", ".join(ended) or str(llm.dead_error)
