"""Connection to etcd: fail-over, credentials, errors, watch streams. The only user of the package etcd3.

etcd3's client is synchronous, so its calls run in a thread of ours. Its watcher is not used: after a
server restart it is dead but for a thread that spins, it hides that a watch was cancelled, and closing
it ends in a traceback. :class:`WatchStream` is one stream with one thread, both gone when closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.registry import _etcd3_compat
from vswa_plugin.registry.etcd_settings import CA, PASSWORD, USERNAME, Endpoint, EtcdSecurity
from vswa_plugin.registry.threads import SerialThread

import etcd3  # isort: skip  (after the compatibility module)
import etcd3.etcdrpc  # isort: skip
import etcd3.exceptions  # isort: skip
import etcd3.utils  # isort: skip

assert _etcd3_compat is not None

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # a new client starts without the back-off of the old one
    ("grpc.max_receive_message_length", -1),
    # A peer that vanished without a word is noticed though nothing is sent; etcd allows one ping in 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
_ABOUT_CREDENTIALS = ("auth", "user", "permission", "password", "token")
#: What a call may raise: all that is not a bug of ours.
FAILURES = (etcd3.exceptions.Etcd3Exception, grpc.RpcError, OSError)
T = TypeVar("T")


class _Client(etcd3.Etcd3Client):  # type: ignore[misc]  # untyped upstream
    """etcd3's client with certificates from memory, and nothing left behind when it cannot be made."""

    def __init__(self, endpoint: Endpoint, security: EtcdSecurity) -> None:
        self._security = security
        tls = security.uses_tls(endpoint)
        try:
            super().__init__(
                host=endpoint.host,
                port=endpoint.port,
                ca_cert=True if tls else None,  # only whether it is None is looked at, see below
                user=security.username,
                password=security.password,
                timeout=CALL_TIMEOUT_S,
                grpc_options=_OPTIONS,
            )
        except BaseException:
            self.close()
            raise
        # The token travels as metadata already; gRPC refuses call credentials on a plain connection.
        self.call_credentials = None

    def _get_secure_creds(self, *_: object) -> grpc.ChannelCredentials:
        security = self._security
        return grpc.ssl_channel_credentials(security.ca, security.client_key, security.client_cert)

    def list_prefix(self, prefix: str) -> Listing:
        response = self.get_prefix_response(prefix)
        content = {pair.key.decode("utf-8", "replace"): pair.value for pair in response.kvs}
        return Listing(response.header.revision, content)


@dataclass(frozen=True)
class Listing:
    """Keys and values under a prefix as they were at ``revision``."""

    revision: int
    content: dict[str, bytes]


class Connection:
    """One client at a time, to one of ``endpoints``. Constructing it connects to nothing."""

    def __init__(self, endpoints: Sequence[Endpoint], security: EtcdSecurity) -> None:
        for endpoint in endpoints:
            security.uses_tls(endpoint)  # refused now rather than when its turn comes
        self._endpoints = list(endpoints)
        self._security = security
        self._client: Any = None
        self._thread = SerialThread("vswa-etcd")
        self._busy = asyncio.Lock()  # one call at a time: a failing one swaps the client

    def __str__(self) -> str:
        return "etcd at " + ", ".join(sorted(str(endpoint) for endpoint in self._endpoints))

    async def call(self, use: Callable[[Any], T]) -> T:
        """Run ``use`` with a client in the thread; where that fails, with the next endpoint, each once.

        :raises ConnectError: none of them answers.
        :raises ConfigError: they refuse our credentials.
        """
        async with self._busy:
            for _ in range(1 + len(self._endpoints)):
                try:
                    return await self._thread.run(lambda: use(self._connected()))
                except FAILURES as error:
                    last = error
                    await self._next_endpoint()
        raise self._failure(last) from last

    async def close(self) -> None:
        """End connection and thread; watch streams end too. It may be used again."""
        async with self._busy:
            await self._drop()
            await self._thread.close()

    def _connected(self) -> Any:
        if self._client is None:
            self._client = _Client(self._endpoints[0], self._security)
        return self._client

    async def _next_endpoint(self) -> None:
        self._endpoints.append(self._endpoints.pop(0))
        await self._drop()

    async def _drop(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await self._thread.run(client.close)

    def _failure(self, error: Exception) -> Exception:
        code, details = explain(error)
        reason = f"{code}: {details}" if details else code
        if code in _REFUSALS and any(word in details for word in _ABOUT_CREDENTIALS):
            return ConfigError(f"expected {self} to accept {USERNAME} and {PASSWORD}, got {reason}")
        hint = "is it running and reachable?"
        if "handshake" in details.lower() or "certificate" in details.lower():
            hint = f"do http or https and {CA} fit the server?"
        return ConnectError(f"expected {self} (ETCD_ENDPOINTS), got {reason}; {hint}")


def explain(error: BaseException) -> tuple[str, str]:
    """gRPC's code and details, which etcd3 hides behind exceptions of its own."""
    rpc: Any = error if isinstance(error, grpc.RpcError) else error.__context__
    if not isinstance(rpc, grpc.Call):
        return type(error).__name__, str(error)
    code = rpc.code()
    return code.name if code is not None else "no status", rpc.details() or ""


def is_lost_lease(error: BaseException) -> bool:
    """Whether a put failed because its lease is gone."""
    code, details = explain(error)
    return code == "NOT_FOUND" and "lease" in details


@dataclass(frozen=True)
class Put:
    key: str
    value: bytes


@dataclass(frozen=True)
class Deleted:
    key: str


@dataclass(frozen=True)
class Batch:
    """One response of a watch: ``events`` in the order in which they happened, all up to ``revision``."""

    revision: int
    events: tuple[Put | Deleted, ...]


@dataclass(frozen=True)
class Ended:
    """The stream ended, from either side; nothing comes after it."""

    reason: str


class WatchStream:
    """The events of a prefix from ``first_revision`` on, handed to ``deliver`` on the event loop."""

    def __init__(
        self,
        client: Any,
        prefix: str,
        first_revision: int,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[Batch | Ended], None],
    ) -> None:
        self._loop = loop
        self._deliver = deliver
        self._closed = threading.Event()
        create = etcd3.etcdrpc.WatchCreateRequest(
            key=prefix.encode(),
            range_end=etcd3.utils.increment_last_byte(prefix.encode()),
            start_revision=first_revision,
        )
        self._responses = etcd3.etcdrpc.WatchStub(client.channel).Watch(
            self._requests(create), metadata=client.metadata
        )
        self._thread = threading.Thread(target=self._read, name="vswa-etcd-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End stream and thread; both wake at once."""
        self._closed.set()
        self._responses.cancel()
        self._thread.join(CALL_TIMEOUT_S)

    def _requests(self, create: Any) -> Iterator[Any]:
        """gRPC reads this in a thread of its own: not ending it keeps our side of the stream open."""
        yield etcd3.etcdrpc.WatchRequest(create_request=create)
        self._closed.wait()

    def _read(self) -> None:
        reason = "the server ended it"
        try:
            for response in self._responses:
                if response.canceled:
                    reason = response.cancel_reason or f"compacted at {response.compact_revision}"
                    break
                self._hop(_batch(response))
        except grpc.RpcError as error:
            reason = ": ".join(explain(error))
        finally:
            self._closed.set()
            self._responses.cancel()
        self._hop(Ended(reason))

    def _hop(self, item: Batch | Ended) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits any more
            self._loop.call_soon_threadsafe(self._deliver, item)


def _batch(response: Any) -> Batch:
    events: list[Put | Deleted] = []
    revision = 0
    for event in response.events:
        key = event.kv.key.decode("utf-8", "replace")
        events.append(Deleted(key) if event.type == event.DELETE else Put(key, event.kv.value))
        revision = event.kv.mod_revision
    return Batch(revision, tuple(events))
