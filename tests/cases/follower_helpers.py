"""A router's view of the fleet without a broker: messages are handed in, and time jumps to the next timer."""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from types import FrameType
from typing import Any, TypeVar

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import ConnectError
from vswa_plugin.following.subscriber import Subscriber, SubscriberOptions
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Change, Entry
from vswa_plugin.wire import control
from vswa_plugin.wire.events import VERSION, Batch, Event, Rank, Source, Stored, encode, layout_event
from vswa_plugin.wire.subjects import subject

T = TypeVar("T")

GROUPS = (CacheGroup(0, None, 32),)
LAYOUT = CacheLayout(GROUPS, "trtllm_v2", "m")
#: No rule of this project, and none of an installed plugin.
UNKNOWN_RULE = "a_rule_of_nobody"
GOOD, STRANGE = Rank(1), Rank(2)
#: Two blocks of a prompt of 65 tokens; ranks in these tests hold the first one, which is 32 tokens.
PROMPT = ([11, 12], 65)
HELD = Stored(0, 0, None, (11,))


def source_of_worker(worker_id: int) -> Source:
    return Source("ns", "backend", worker_id)


def batch(first: int, *events: Event, epoch: int = 5) -> bytes:
    return encode(Batch(VERSION, epoch, first, time.time_ns(), events))


def entry_of(worker_id: int, **changes: Any) -> Entry:
    given = {
        "namespace": "ns",
        "component": "backend",
        "worker_id": worker_id,
        "mode": "agg",
        "engine": "standin",
        "served_model_name": "m",
        "model_path": "/m",
        "context_length": 1024,
        "block_size": 32,
        "rule": LAYOUT.rule,
        "hash_scheme": LAYOUT.hash_scheme,
        "groups": GROUPS,
        "epochs": {0: 5},
        "total_kv_blocks": 100,
        "host": "elsewhere",
    }
    return Entry(**{**given, **changes})


class HandedIn:
    """A transport into which messages are put by hand. As with NATS, a handler that raises ends nothing."""

    connected = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.raised: list[str] = []
        #: What a publisher answers; None: nobody is there.
        self.answer: Callable[[control.Request], control.Reply] | None = None
        self._handlers: list[Callable[[str, bytes], Coroutine[Any, Any, None]]] = []

    async def connect(self, timeout: float = 0) -> None: ...

    async def flush(self, timeout: float = 0) -> None: ...

    async def close(self) -> None: ...

    async def subscribe(self, to_subject: str, handler: Any) -> None:
        self._handlers.append(handler)

    async def request(self, to_subject: str, payload: bytes, timeout: float) -> bytes:
        request = control.decode_request(payload)
        self.asked.append(type(request).__name__)
        if self.answer is None:
            raise ConnectError("no process serves this subject")
        return control.encode(self.answer(request))

    async def deliver(self, to_subject: str, payload: bytes) -> None:
        for handler in self._handlers:
            try:
                await handler(to_subject, payload)
            except Exception as error:
                self.raised.append(f"{type(error).__name__}: {error}")

    async def hear(self, rank: Rank, first: int, *events: Event, epoch: int = 5) -> None:
        """One batch of the worker; without events: its heartbeat."""
        event_subject = subject(source_of_worker(rank.worker_id), "events")
        await self.deliver(event_subject, batch(first, *events, epoch=epoch))


class Told:
    """A registry that tells what is put into it."""

    def __init__(self, *changes: Change) -> None:
        self._changes: asyncio.Queue[Change] = asyncio.Queue()
        self._put(changes)

    def watch(self, namespace: str | None = None) -> Told:
        return self

    async def __aenter__(self) -> Told:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def __aiter__(self) -> Told:
        return self

    async def __anext__(self) -> Change:
        return await self._changes.get()

    async def close(self) -> None: ...

    async def tell(self, *changes: Change) -> None:
        self._put(changes)
        await asyncio.sleep(0.1)

    def _put(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._changes.put_nowait(change)


def snapshot(*events: Event, epoch: int = 5, next_event_id: int = 2) -> Callable[..., control.Reply]:
    """A publisher that answers each request with a snapshot of one part."""

    def answer(request: control.Request) -> control.Reply:
        if isinstance(request, control.SnapshotRequest):
            return control.SnapshotHead(epoch, 1, next_event_id, 1)
        return control.SnapshotPart(epoch, 1, 0, events)

    return answer


class Followed:
    """A subscriber and its index. ``GOOD`` is registered, live and holds one block, and says no more."""

    def __init__(self, options: SubscriberOptions | None = None) -> None:
        self.transport = HandedIn()
        self.index = WindowIndex()
        self.subscriber = Subscriber(self.transport, self.index, options=options)  # type: ignore[arg-type]

    async def __aenter__(self) -> Followed:
        await self.subscriber.start()
        await self.transport.hear(GOOD, 0, layout_event(LAYOUT), HELD)
        self.subscriber.announce(source_of_worker(GOOD.worker_id), 5)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.subscriber.stop()

    def score(self) -> dict[Rank, int]:
        return self.index.score(*PROMPT)

    def silent(self, rank: Rank) -> bool:
        view = self.subscriber.view(rank)
        return view is not None and view.silent


class _JumpingSelector(selectors.DefaultSelector):
    """Where it would wait for a timer, it adds that time to :attr:`jumped` instead."""

    jumped = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(timeout and 0)
        if not found and timeout:
            self.jumped += timeout
        return found


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while it works."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return 1000.0 + self._jumping.jumped


def run_in_jumps(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work`` on a loop on which a sleep of a minute takes no time."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work)


class Steps:
    """Counts lines of Python as they run in this thread, each turn of a comprehension too."""

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> Steps:
        self._before = sys.gettrace()
        sys.settrace(self._step)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        self.count += 1
        return self._step


def outcome(function: Callable[..., T], *arguments: Any) -> T | str:
    """What ``function`` returns, or the error that it raised as text."""
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
