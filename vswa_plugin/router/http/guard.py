"""What protects the API: an optional token, and bounds on how long a client may take to send a request."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from aiohttp import web

from vswa_plugin.errors import ConfigError

#: The token that clients must send, where one is demanded.
TOKEN_ENV = "VSWA_HTTP_TOKEN"
#: For a request's headers, for its body, and for the next request on a connection. Then the connection ends.
READ_TIMEOUT_S = 10.0
#: What probes ask: they carry no secrets.
OPEN_PATHS = frozenset(("/health", "/ready", "/"))


def token_from(environ: Mapping[str, str]) -> str | None:
    """The token that VSWA_HTTP_TOKEN demands; None: anybody is answered.

    :raises ConfigError: no client could send it in a header.
    """
    token = environ.get(TOKEN_ENV) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(f"{TOKEN_ENV}: expected printable ASCII characters without blanks, got others")
    return token


def authorized(request: web.Request, token: str | None) -> bool:
    """Whether the request may be answered; takes as long whatever was sent."""
    if token is None or request.path in OPEN_PATHS:
        return True
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    # aiohttp keeps bytes that are no UTF-8 as surrogates.
    right = hmac.compare_digest(sent.encode("utf-8", "surrogateescape"), token.encode())
    return right and scheme.lower() == "bearer"


async def read_body(request: web.Request) -> bytes:
    """The whole body; raises HTTPRequestTimeout where it does not come in time."""
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
