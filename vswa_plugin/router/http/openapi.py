"""The OpenAPI document of the router's HTTP API, made from its operations and their structs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec

from vswa_plugin import __version__
from vswa_plugin.router.http.guard import OPEN_PATHS
from vswa_plugin.router.http.messages import ErrorAnswer
from vswa_plugin.router.http.operations import ERRORS, JSON, OPERATIONS, Operation, Parameter

_ABOUT = (
    "What every worker would reuse of a prompt, exactly, per cache group, and which worker should serve it. "
    "Names follow Dynamo's standalone indexer and selection service; all counts are tokens where not said "
    "otherwise. Unknown fields are ignored. Hashes are unsigned 64-bit integers."
)


def document(with_token: bool = False) -> dict[str, Any]:
    """The whole document, OpenAPI 3.1, as built-in types.

    :param with_token: whether the router demands a token.
    """
    kinds = list(_kinds())
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_kind = {str(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(
            operation, by_kind, with_token and operation.path not in OPEN_PATHS
        )
    root: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "vswa router", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": _tidied(components)},
    }
    if with_token:
        root["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return root


def _kinds() -> Iterator[Any]:
    yield ErrorAnswer
    for operation in OPERATIONS:
        yield from (kind for kind in (operation.body, operation.answer) if kind is not None)


def _described(operation: Operation, schemas: dict[str, Any], with_token: bool) -> dict[str, Any]:
    error = {JSON: {"schema": schemas[str(ErrorAnswer)]}}
    answer: dict[str, Any] = {"schema": {"type": "object"}}
    if operation.content != JSON:
        answer = {"schema": {"type": "string"}}
    elif operation.answer is not None:
        answer = {"schema": schemas[str(operation.answer)]}
    content = {operation.content: answer}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    guarded = (*([401] if with_token else []), *([408] if operation.body is not None else []))
    for status in (*guarded, *operation.errors, 500):
        responses[str(status)] = {"description": ERRORS[status], "content": error}
    if operation.unready:
        responses["503"] = {"description": "No, and why.", "content": content}
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.text,
        "responses": responses,
    }
    if with_token:
        described["security"] = [{"token": []}]
    if operation.parameters:
        described["parameters"] = [
            {
                "name": each.name,
                "in": "query",
                "required": False,
                "description": each.text,
                "schema": {"type": each.kind} | _limits(each),
            }
            for each in operation.parameters
        ]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": schemas[str(operation.body)] | operation.demand}},
        }
    return described


def _limits(parameter: Parameter) -> dict[str, int]:
    return {"minimum": 0, "maximum": parameter.most} if parameter.kind == "integer" else {}


def _tidied(components: dict[str, Any]) -> dict[str, Any]:
    """Descriptions without the indentation of docstrings."""
    for schema in components.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return components
