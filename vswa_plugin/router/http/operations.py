"""The operations of the API. The server serves this list and openapi.py describes it: they cannot differ."""

from __future__ import annotations

from typing import Any

import msgspec

from vswa_plugin.router.http.messages import (
    ChoiceAnswer,
    DumpAnswer,
    ExplainQuery,
    ExplanationAnswer,
    HashQuery,
    HealthAnswer,
    Query,
    QueryAnswer,
    ReadyAnswer,
    Release,
    ReleaseAnswer,
    SelectAnswer,
    SelectionWish,
    SelectQuery,
    WorkerAnswer,
)
from vswa_plugin.router.http.overview import Overview

JSON, TEXT, HTML = "application/json", "text/plain", "text/html"
ERRORS = {
    400: "It can never be answered as it is.",
    401: "The token is missing or wrong.",
    404: "Unknown model or reservation, or this router has no such operation.",
    408: "The body did not come in time.",
    409: "The selection_id is in use.",
    413: "Larger than a limit.",
    500: "A fault of the router; its log says more.",
    503: "Not now.",
}


class Parameter(msgspec.Struct, frozen=True):
    """One of the query string.

    :param most: the largest number that is taken, where ``kind`` is ``integer``.
    """

    name: str
    kind: str
    text: str
    most: int = 2**64 - 1


class Operation(msgspec.Struct, frozen=True):
    """:param name: method of the server is ``_name``.
    :param body: what is posted; None: nothing.
    :param answer: what comes back with 200; None: text, or an object without a schema.
    :param unready: 503 comes with ``answer`` too.
    :param demand: what the struct of ``body`` cannot say, as JSON Schema.
    """

    method: str
    path: str
    name: str
    text: str
    body: Any = None
    answer: Any = None
    content: str = JSON
    parameters: tuple[Parameter, ...] = ()
    errors: tuple[int, ...] = ()
    unready: bool = False
    demand: dict[str, Any] = {}


def _given(name: str, kind: str = "array") -> dict[str, Any]:
    return {"required": [name], "properties": {name: {"type": kind}}}


_TEXT: dict[str, Any] = {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}}
_MODEL = Parameter("model_name", "string", "only workers of this model")
DUMP_PARAMETERS = (
    _MODEL,
    Parameter("worker_id", "integer", "only this worker"),
    Parameter("dp_rank", "integer", "only this data-parallel rank", 2**31),
    Parameter("group_id", "integer", "only this cache group, as named in its layout", 2**31),
)
_ASKED = (400, 404, 413)

OPERATIONS = (
    Operation(
        "POST",
        "/query",
        "query",
        "What every worker would reuse of a prompt.",
        Query,
        QueryAnswer,
        errors=_ASKED,
    ),
    Operation(
        "POST",
        "/query_by_hash",
        "query_by_hash",
        "The same of a prompt that is given as hashes.",
        HashQuery,
        QueryAnswer,
        errors=_ASKED,
        demand={"anyOf": [_given("block_hashes"), _given("sequence_hashes")]},
    ),
    Operation(
        "POST",
        "/explain",
        "explain",
        "Which blocks every rank holds, in each window, and which one spoilt the next boundary.",
        ExplainQuery,
        list[ExplanationAnswer],
        errors=_ASKED,
        demand={"anyOf": [_given("token_ids"), _given("prompt", "string")]},
    ),
    Operation(
        "POST",
        "/choice",
        "choice",
        "What every rank would cost a request with that prompt, and which would be chosen.",
        Query,
        list[ChoiceAnswer],
        errors=(400, 404, 413, 503),
    ),
    Operation(
        "POST",
        "/select",
        "select",
        "Choose the worker of a request, or one for each phase, and count it as their load. Of routers with "
        "--selector-only.",
        SelectQuery,
        SelectAnswer,
        errors=(400, 404, 409, 413, 503),
        demand={"oneOf": [_given("token_ids"), _given("messages"), _TEXT]},
    ),
    Operation(
        "POST",
        "/prefill_complete",
        "prefill_complete",
        "The prompt of a reserved request is computed: its first token is there.",
        SelectionWish,
        ReleaseAnswer,
        errors=_ASKED,
    ),
    Operation(
        "POST",
        "/release",
        "release",
        "A reserved request has ended.",
        Release,
        ReleaseAnswer,
        errors=_ASKED,
    ),
    Operation(
        "GET",
        "/workers",
        "workers",
        "All workers in the registry, and the state of their event streams.",
        answer=list[WorkerAnswer],
        parameters=(_MODEL,),
    ),
    Operation(
        "GET",
        "/dump",
        "dump",
        "Every block in the index, per rank and window. Sent piece by piece, one dump at a time.",
        answer=DumpAnswer,
        parameters=DUMP_PARAMETERS,
        errors=(400, 413, 503),
    ),
    Operation("GET", "/health", "health", "Whether the router works.", answer=HealthAnswer, unready=True),
    Operation(
        "GET",
        "/ready",
        "ready",
        "Whether requests can be routed: at least one worker is known exactly.",
        answer=ReadyAnswer,
        unready=True,
    ),
    Operation("GET", "/overview", "overview", "What the live page shows, bounded in size.", answer=Overview),
    Operation("GET", "/", "page", "The live page, for a browser.", content=HTML),
    Operation("GET", "/metrics", "metrics", "Everything that is counted, as Prometheus text.", content=TEXT),
    Operation("GET", "/openapi.json", "openapi", "This document."),
)
