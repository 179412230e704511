"""The token of the API, and clients that take too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from tests.router_http_helpers import Api
from vswa_plugin.errors import ConfigError
from vswa_plugin.program import status
from vswa_plugin.program.status import Status, StatusServer
from vswa_plugin.router.http import guard, server
from vswa_plugin.router.http.guard import OPEN_PATHS, token_from
from vswa_plugin.router.http.operations import OPERATIONS

TOKEN = "s3cret-token"


async def status_of(url: str, method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
    async with aiohttp.ClientSession() as http, http.request(method, url, headers=headers) as answer:
        return answer.status, await answer.text(), answer.headers


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.path)
def test_all_but_probes_needs_the_token(operation: Any) -> None:
    async def body() -> tuple[tuple[int, Any, Any], int]:
        async with Api(token=TOKEN) as api:
            url = api.url + operation.path
            without = await status_of(url, operation.method)
            return without, (await status_of(url, operation.method, Authorization=f"Bearer {TOKEN}"))[0]

    (code, text, headers), with_token = asyncio.run(body())

    assert 401 != with_token
    if operation.path in OPEN_PATHS:
        assert 401 != code
    else:
        assert (401, "Bearer") == (code, headers["WWW-Authenticate"])
        assert "expected the header `Authorization: Bearer`" in json.loads(text)["error"]


@pytest.mark.parametrize(
    "sent", [f"bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer", "Bearer é"]
)
def test_a_wrong_token_is_refused(sent: str) -> None:
    async def body() -> int:
        async with Api(token=TOKEN) as api:
            return (await status_of(f"{api.url}/workers", Authorization=sent))[0]

    assert 401 == asyncio.run(body())


def test_a_token_of_any_bytes_is_refused() -> None:
    async def body() -> bytes:
        async with Api(token=TOKEN) as api:
            head = b"GET /workers HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            return await sent(int(api.url.rpartition(":")[2]), head + b"Authorization: Bearer \xff\r\n\r\n")

    assert asyncio.run(body()).startswith(b"HTTP/1.1 401")


def test_a_path_that_there_is_not_is_not_told_without_the_token() -> None:
    async def body() -> int:
        async with Api(token=TOKEN) as api:
            return (await status_of(f"{api.url}/nothing"))[0]

    assert 401 == asyncio.run(body())


def test_without_a_token_anybody_is_answered() -> None:
    async def body() -> tuple[int, Any, Any]:
        async with Api() as api:
            return await status_of(f"{api.url}/openapi.json")

    code, text, _ = asyncio.run(body())

    assert 200 == code
    assert "security" not in text


def test_the_description_of_the_api_has_the_token_where_it_is_demanded() -> None:
    async def body() -> Any:
        async with Api(token=TOKEN) as api:
            return await status_of(f"{api.url}/openapi.json", Authorization=f"Bearer {TOKEN}")

    document = json.loads(asyncio.run(body())[1])
    query, health = document["paths"]["/query"]["post"], document["paths"]["/health"]["get"]

    assert {"token": {"type": "http", "scheme": "bearer"}} == document["components"]["securitySchemes"]
    assert [{"token": []}] == query["security"] and "401" in query["responses"]
    assert "security" not in health and "401" not in health["responses"]


@pytest.mark.parametrize("value", ["with blank", "new\nline", "é"])
def test_a_token_that_no_header_holds_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="VSWA_HTTP_TOKEN: expected printable ASCII") as raised:
        token_from({"VSWA_HTTP_TOKEN": value})
    assert value not in str(raised.value)


def test_an_empty_token_is_none() -> None:
    assert token_from({"VSWA_HTTP_TOKEN": ""}) is token_from({}) is None


async def sent(port: int, data: bytes) -> bytes:
    """All that comes back until the server ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()


HEAD = b"POST /query HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(HEAD, b"", id="half of the headers"),
        pytest.param(HEAD + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408", id="half of the body"),
    ],
)
def test_a_client_that_sends_half_a_request_is_left(
    data: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server, "READ_TIMEOUT_S", 0.3)

    async def body() -> tuple[bytes, int]:
        async with Api() as api:
            came = await sent(int(api.url.rpartition(":")[2]), data)
            return came, (await status_of(f"{api.url}/health"))[0]

    came, healthy = asyncio.run(body())

    assert came.startswith(answer) and bool(came) == bool(answer)
    assert 200 == healthy


def test_a_status_server_leaves_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "IDLE_TIMEOUT_S", 0.3)

    async def body() -> bytes:
        async def nothing() -> str:
            return ""

        made = StatusServer(Status(), nothing)
        port = await made.start("127.0.0.1", 0)
        try:
            return await sent(port, b"GET /health HTTP/1.1\r\n")
        finally:
            await made.stop()

    assert b"" == asyncio.run(body())
