"""A message broker in memory, and connections with the shape of ``vswa_plugin.wire.transport.Transport``.

A message is delivered before ``publish`` returns, unless its receiver is still busy with an earlier one.
What a real broker refuses is refused: too large messages, and anything on a connection that is not open.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from vswa_plugin.errors import ConnectError
from vswa_plugin.wire.transport import Handler, Transport, Unsubscribe

__all__ = [
    "MemoryBroker",
    "MemoryTransport",
]

logger = logging.getLogger(__name__)


class MemoryBroker:
    """Where connections meet.

    :ivar running: set it to False and the broker is away: connections stay, and nothing gets through.
    """

    def __init__(self, max_payload: int = 1 << 20) -> None:
        self.max_payload = max_payload
        self.running = True
        self._subscriptions: list[_Subscription] = []
        self._servers: dict[str, tuple[MemoryTransport, Callable[[bytes], bytes]]] = {}

    def transport(self, *, echo: bool = True) -> MemoryTransport:
        """A connection, not open yet.

        :param echo: whether its own messages come back to its own subscriptions.
        """
        return MemoryTransport(self, echo=echo)


class MemoryTransport(Transport):
    """One connection to a :class:`MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, *, echo: bool = True) -> None:
        self._broker = broker
        self._echo = echo
        self._open = False

    @property
    def max_payload(self) -> int:
        return self._broker.max_payload

    @property
    def connected(self) -> bool:
        return self._open and self._broker.running

    @property
    def ready(self) -> bool:
        return self.connected

    async def connect(self, timeout: float = 10.0) -> None:
        if not self._broker.running:
            raise ConnectError("expected a broker in memory that runs, got one that is away")
        self._open = True

    async def publish(self, to_subject: str, payload: bytes) -> None:
        self._check(payload)
        for subscription in list(self._broker._subscriptions):
            if subscription.wants(to_subject, self, self._echo):
                await subscription.deliver(to_subject, payload)

    async def flush(self, timeout: float = 5.0) -> None:
        self._check()

    async def subscribe(self, to_subject: str, handler: Handler) -> Unsubscribe:
        self._check()
        made = _Subscription(self, to_subject, handler)
        self._broker._subscriptions.append(made)

        async def unsubscribe() -> None:
            if made in self._broker._subscriptions:
                self._broker._subscriptions.remove(made)

        return unsubscribe

    async def request(self, to_subject: str, payload: bytes, timeout: float) -> bytes:
        self._check(payload)
        if to_subject not in self._broker._servers:
            raise ConnectError(f"no answer on {to_subject} within {timeout:g} s: nobody serves it")
        reply = self._broker._servers[to_subject][1](payload)
        if len(reply) > self.max_payload:
            raise ConnectError(f"no answer on {to_subject} within {timeout:g} s: it has {len(reply)} bytes")
        return reply

    async def serve(self, on_subject: str, answer: Callable[[bytes], bytes]) -> Unsubscribe:
        self._check()
        served = self._broker._servers[on_subject] = (self, answer)

        async def unsubscribe() -> None:
            if self._broker._servers.get(on_subject) is served:
                del self._broker._servers[on_subject]

        return unsubscribe

    async def close(self) -> None:
        self._open = False
        broker = self._broker
        broker._subscriptions = [each for each in broker._subscriptions if each.owner is not self]
        broker._servers = {name: each for name, each in broker._servers.items() if each[0] is not self}

    def _check(self, payload: bytes = b"") -> None:
        if not self.connected:
            raise ConnectError("the broker in memory is away, or this connection is not open")
        if len(payload) > self.max_payload:
            raise ConnectError(f"expected at most {self.max_payload} bytes in a message, got {len(payload)}")


class _Subscription:
    """Messages for one handler: one at a time, in order."""

    def __init__(self, owner: MemoryTransport, pattern: str, handler: Handler) -> None:
        self.owner = owner
        self._pattern = pattern.split(".")
        self._handler = handler
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._busy = False

    def wants(self, subject: str, sender: MemoryTransport, echo: bool) -> bool:
        tokens = subject.split(".")
        if sender is self.owner and not echo:
            return False
        pairs = zip(self._pattern, tokens, strict=False)
        return len(tokens) == len(self._pattern) and all(want in ("*", token) for want, token in pairs)

    async def deliver(self, subject: str, payload: bytes) -> None:
        self._waiting.append((subject, payload))
        if self._busy:
            return
        self._busy = True
        try:
            while self._waiting:
                await self._handle(*self._waiting.popleft())
        finally:
            self._busy = False

    async def _handle(self, subject: str, payload: bytes) -> None:
        try:
            await self._handler(subject, payload)
        except Exception:  # as the client of NATS: it costs neither the sender nor later messages
            logger.exception("a handler of %s failed", subject)
