"""A broker and connections to it, as NATS has them, over links that fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vswa_plugin.errors import ConnectError
from vswa_plugin.wire.transport import Handler

#: One way of a message over a link that is whole.
DELAY_S = 0.002
#: The longest way over one that is not.
MAX_DELAY_S = 0.6


class Weather(NamedTuple):
    """What becomes of messages on a link: shares of them, and seconds of delay at most."""

    lost: float = 0.0
    repeated: float = 0.0
    spoiled: float = 0.0
    delayed_s: float = 0.0


CALM = Weather()


@dataclass
class Link:
    """One machine's way to the broker.

    :ivar cut: how many faults keep it cut.
    :ivar connected: what the client believes, which notices a cut late.
    """

    weather: Weather = CALM
    cut: int = 0
    connected: bool = True

    @property
    def up(self) -> bool:
        return self.cut == 0


@dataclass(eq=False)
class _Subscription:
    owner: Connection
    pattern: list[str]
    handler: Handler

    def wants(self, subject: str) -> bool:
        tokens = subject.split(".")
        return len(tokens) == len(self.pattern) and all(
            want in ("*", token) for want, token in zip(self.pattern, tokens, strict=True)
        )


@dataclass
class Network:
    """:ivar failures: what a handler raised, which costs a real client nothing but a log line."""

    rng: random.Random
    links: dict[str, Link] = field(default_factory=dict)
    subscriptions: list[_Subscription] = field(default_factory=list)
    servers: dict[str, list[tuple[Connection, Callable[[bytes], bytes]]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def connection(self, machine: str, *, echo: bool = True) -> Connection:
        """A new client on that machine."""
        return Connection(self, self.links.setdefault(machine, Link()), echo)

    def cut(self, machine: str, seconds: float) -> None:
        """Nothing passes for so long; the client notices after a while, and again when it is back."""
        loop = asyncio.get_running_loop()
        link = self.links.setdefault(machine, Link())
        link.cut += 1

        def restore() -> None:
            link.cut -= 1
            loop.call_later(0.2, notice)

        def notice() -> None:
            link.connected = link.up

        loop.call_later(self.rng.uniform(0.1, 2.5), notice)
        loop.call_later(seconds, restore)

    def pass_over(self, link: Link, payload: bytes) -> list[tuple[float, bytes]]:
        """What comes out at the other end of a link, and after how many seconds."""
        if not link.up:
            return []
        weather, rng = link.weather, self.rng
        if weather == CALM:
            return [(DELAY_S, payload)]
        if rng.random() < weather.lost:
            return []
        if rng.random() < weather.spoiled:
            payload = b"\xc1" + payload[1:]  # what no MessagePack begins with: TCP lets no smaller fault pass
        times = 2 if rng.random() < weather.repeated else 1
        return [(DELAY_S + rng.random() * weather.delayed_s, payload) for _ in range(times)]


class Connection:
    """One client, with the shape of ``vswa_plugin.wire.transport.Transport``."""

    max_payload = 1 << 20

    def __init__(self, network: Network, link: Link, echo: bool) -> None:
        self.network = network
        self.link = link
        self._echo = echo
        self._open = False

    @property
    def connected(self) -> bool:
        return self._open and self.link.connected

    @property
    def ready(self) -> bool:
        return self.connected

    async def connect(self, timeout: float = 10.0) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not (self.link.up and self.link.connected):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise ConnectError("the simulated broker is away") from None
        self._open = True

    async def flush(self, timeout: float = 5.0) -> None:
        self._check()

    async def publish(self, to_subject: str, payload: bytes) -> None:
        self._check()
        loop = asyncio.get_running_loop()
        for delay, sent in self.network.pass_over(self.link, payload):
            loop.call_later(delay, self._distribute, to_subject, sent)

    def _distribute(self, to_subject: str, payload: bytes) -> None:
        """The broker has it."""
        loop = asyncio.get_running_loop()
        for each in self.network.subscriptions:
            if each.wants(to_subject) and (each.owner is not self or self._echo):
                for delay, came in self.network.pass_over(each.owner.link, payload):
                    loop.call_later(delay, each.owner._deliver, each, to_subject, came)

    def _deliver(self, subscription: _Subscription, subject: str, payload: bytes) -> None:
        if not self._open or not self.link.up:
            return
        work = subscription.handler(subject, payload)
        try:
            work.send(None)  # type: ignore[attr-defined]
        except StopIteration:
            return
        except Exception as error:
            self.network.failures.append(f"{type(error).__name__}: {error}")
            return
        raise RuntimeError("expected a handler that never waits")

    async def subscribe(self, to_subject: str, handler: Handler) -> Callable[[], None]:
        self._check()
        made = _Subscription(self, to_subject.split("."), handler)
        self.network.subscriptions.append(made)
        return lambda: self.network.subscriptions.remove(made)

    async def serve(self, on_subject: str, answer: Callable[[bytes], bytes]) -> None:
        self._check()
        self.network.servers.setdefault(on_subject, []).append((self, answer))

    async def request(self, to_subject: str, payload: bytes, timeout: float) -> bytes:
        self._check()
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[bytes] = loop.create_future()
        for delay, sent in self.network.pass_over(self.link, payload):
            loop.call_later(delay, self._ask, to_subject, sent, answered)
        try:
            async with asyncio.timeout(timeout):
                return await answered
        except TimeoutError:
            raise ConnectError(f"no answer on {to_subject} within {timeout:g} s") from None

    def _ask(self, subject: str, payload: bytes, answered: asyncio.Future[bytes]) -> None:
        """The broker has the request: each who serves the subject gets it, and the first answer counts."""
        loop = asyncio.get_running_loop()
        servers = self.network.servers.get(subject, [])
        if not servers and not answered.done():
            answered.set_exception(ConnectError(f"no process serves {subject}"))
        for server, answer in servers:
            for delay, sent in self.network.pass_over(server.link, payload):
                loop.call_later(delay, self._answer, server, answer, sent, answered)

    def _answer(
        self, server: Connection, answer: Callable[[bytes], bytes], payload: bytes, to: asyncio.Future[bytes]
    ) -> None:
        if not server._open:
            return
        loop = asyncio.get_running_loop()
        for delay, reply in self.network.pass_over(server.link, answer(payload)):
            for more, came in self.network.pass_over(self.link, reply):
                loop.call_later(delay + more, lambda came=came: to.done() or to.set_result(came))

    async def close(self) -> None:
        self._open = False
        network = self.network
        network.subscriptions = [each for each in network.subscriptions if each.owner is not self]
        for subject, servers in list(network.servers.items()):
            network.servers[subject] = [each for each in servers if each[0] is not self]
            if not network.servers[subject]:
                del network.servers[subject]

    def _check(self) -> None:
        if not self.connected:
            raise ConnectError("the simulated broker is away")
