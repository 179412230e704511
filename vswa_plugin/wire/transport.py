"""The connection to NATS. The only module that imports nats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import nats
import nats.errors

from vswa_plugin.errors import ConfigError, ConnectError, shown
from vswa_plugin.wire.login import connect_options

logger = logging.getLogger(__name__)

_SCHEMES = ("", "nats", "tls", "ws", "wss")
DEFAULT_SERVER = "nats://127.0.0.1:4222"
#: Well below the 2 MiB at which the client makes callers wait.
_READY_BYTES = 256 << 10

#: Called with (subject, payload) for each message.
Handler = Callable[[str, bytes], Awaitable[None]]
#: Ends one subscription; does nothing where the connection is closed already.
Unsubscribe = Callable[[], Awaitable[None]]


def _checked(server: str) -> str:
    """``server``, which the client can use; raises ConfigError. The client would try any text, for ever."""
    try:
        parts = urlsplit(server if "://" in server else f"//{server}")
        fits = bool(parts.hostname) and (parts.port is None or parts.port > 0) and parts.scheme in _SCHEMES
    except ValueError:  # the port is none
        fits = False
    if not fits:
        shown_server = shown(server.rpartition("@")[2])  # what stands before may be a password
        raise ConfigError(
            f"NATS_SERVER: expected nats://host:port, with a port from 1 to 65535, got {shown_server}"
        )
    return server


class Transport:
    """One connection to NATS. Reconnects by itself for as long as the process lives.

    :param servers: URLs, separated by commas.
    :param echo: whether our own messages come back to our own subscriptions.
    :param environ: where the login is read from, see login.py; ``os.environ`` unless given.
    :raises ConfigError: the login cannot be used.
    """

    def __init__(
        self,
        servers: str = DEFAULT_SERVER,
        name: str = "vswa",
        *,
        echo: bool = True,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._servers = [_checked(server.strip()) for server in servers.split(",") if server.strip()]
        if not self._servers:  # the client would try nothing, for ever
            raise ConfigError(f"NATS_SERVER: expected servers with commas between, got {servers!r}")
        self._options: dict[str, Any] = {"name": name, "no_echo": not echo}
        self._options |= connect_options(os.environ if environ is None else environ)
        self._client: Any = None
        #: Different errors since we were last connected, in order: the first often says more than the last.
        self._errors: list[str] = []

    @property
    def max_payload(self) -> int:
        """Bytes the broker takes in one message."""
        return int(self._client.max_payload)

    @property
    def connected(self) -> bool:
        return self._client is not None and bool(self._client.is_connected)

    @property
    def ready(self) -> bool:
        """Whether :meth:`publish` returns at once: connected, and little is waiting to be written."""
        return self.connected and self._client.pending_data_size < _READY_BYTES

    async def connect(self, timeout: float = 10.0) -> None:
        """Connect, trying for ``timeout`` seconds; raises ConnectError that names the servers."""
        attempt = nats.connect(
            self._servers,
            **self._options,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.2,
            connect_timeout=2,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            reconnected_cb=self._on_reconnected,
        )
        try:
            async with asyncio.timeout(timeout):
                self._client = await attempt
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise ConnectError(
                f"expected a NATS server at {', '.join(self._servers)} (NATS_SERVER), got "
                f"{'; '.join(self._errors) or 'no answer'} for {timeout:g} s; is it running and reachable?"
            ) from error

    async def publish(self, to_subject: str, payload: bytes) -> None:
        """Hand one message to the client, which writes it soon; raises ConnectError while it cannot."""
        try:
            await self._client.publish(to_subject, payload)
        except nats.errors.Error as error:
            raise ConnectError(f"NATS did not take a message of {len(payload)} bytes: {error}") from error

    async def flush(self, timeout: float = 5.0) -> None:
        """Return once the broker has all that was published; raises ConnectError after ``timeout`` s."""
        try:
            await self._client.flush(max(1, round(timeout)))
        except (TimeoutError, OSError, nats.errors.Error) as error:
            raise ConnectError(f"NATS did not confirm within {timeout:g} s: {error}") from error

    async def subscribe(self, to_subject: str, handler: Handler) -> Unsubscribe:
        """Call ``handler`` for each message, one at a time, in order, until :meth:`close`, or until what is
        returned is called."""

        async def deliver(message: Any) -> None:
            await handler(message.subject, message.data)

        return _ending(await self._client.subscribe(to_subject, cb=deliver))

    async def request(self, to_subject: str, payload: bytes, timeout: float) -> bytes:
        """The answer to one request; raises ConnectError where none comes within ``timeout`` seconds."""
        try:
            reply = await self._client.request(to_subject, payload, timeout=timeout)
        except (OSError, nats.errors.Error, TimeoutError) as error:
            unserved = isinstance(error, nats.errors.NoRespondersError)
            reason = "no process serves this subject" if unserved else error
            raise ConnectError(f"no answer on {to_subject} within {timeout:g} s: {reason}") from error
        return bytes(reply.data)

    async def serve(self, on_subject: str, answer: Callable[[bytes], bytes]) -> Unsubscribe:
        """Answer each request with what ``answer`` returns, as long as :meth:`subscribe` calls."""

        async def respond(message: Any) -> None:
            if message.reply:
                await self._client.publish(message.reply, answer(message.data))

        return _ending(await self._client.subscribe(on_subject, cb=respond))

    async def close(self) -> None:
        """Write what is pending and disconnect. Never raises."""
        client, self._client = self._client, None
        if client is None:
            return
        try:
            async with asyncio.timeout(5):
                await (client.drain() if client.is_connected else client.close())
        except (TimeoutError, OSError, nats.errors.Error) as error:
            logger.warning("NATS: not all pending messages were written: %s", error or type(error).__name__)

    async def _on_error(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if text not in self._errors:  # nats-py reports each failed attempt
            logger.warning("NATS %s: %s", ", ".join(self._servers), text)
            self._errors.append(text)

    async def _on_disconnected(self) -> None:
        if self._client is not None:
            logger.warning("NATS connection lost; reconnecting")

    async def _on_reconnected(self) -> None:
        self._errors.clear()
        logger.info("NATS connected again")


def _ending(subscription: Any) -> Unsubscribe:
    async def unsubscribe() -> None:
        with contextlib.suppress(nats.errors.Error):  # the connection is closed, or was while it was away
            await subscription.unsubscribe()

    return unsubscribe
