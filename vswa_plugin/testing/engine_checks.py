"""What the suite for engines does with one engine, and what it expects of answers and events."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.engine.contract import ChunkDict, Engine, EventAdapter, RawEvent, RequestDict
from vswa_plugin.errors import RequestError
from vswa_plugin.testing.adapter_checks import Rank

T = TypeVar("T")
#: How long threads of a stopped engine are waited for, and between two looks at its gauges, in seconds.
THREADS_S, POLL_S = 0.2, 0.001
#: How often gauges are looked at while a request runs, and after each of the requests that follow it.
READS_DURING, READS_AFTER, SHORT_REQUESTS = 500, 3, 6


class EngineLife:
    """One engine from its start to its stop, on one event loop, as a worker has it.

    Nothing waits longer than ``timeout_s``: what does not end is an AssertionError.

    :ivar events: by rank, all raw events in the order in which they came.
    """

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self.engine = engine
        self.events: dict[int, list[RawEvent]] = {}
        self._timeout_s = timeout_s
        self._runner = asyncio.Runner()
        self._threads = set(threading.enumerate())
        self._stops = self._stopped = True  # there is nothing to stop yet
        self._late: list[RawEvent] = []

    def start(self) -> None:
        """Start the engine in a thread."""
        self._stops = self._stopped = False
        _InThread("start()", lambda: self.engine.start(self._take)).wait(self._timeout_s)

    def stop(self) -> None:
        """Stop the engine in a thread, unless it has been."""
        if not self._stops:
            self._stops = True
            _InThread("stop()", self.engine.stop).wait(self._timeout_s)
            self._stopped = True

    def close(self) -> None:
        """Stop the engine and end the event loop."""
        try:
            self.stop()
        finally:
            self._runner.close()

    def answer(self, request: RequestDict) -> list[ChunkDict]:
        """All chunks of one request."""
        return self.answers([request])[0]

    def answers(self, requests: Iterable[RequestDict]) -> list[list[ChunkDict]]:
        """All chunks of each request; they run at the same time."""

        async def together() -> list[list[ChunkDict]]:
            return list(await asyncio.gather(*map(self._collect, requests)))

        return self._run("the requests", together())

    def gauges(self, beginnings: tuple[str, ...]) -> dict[str, float]:
        """The values of ``stats()`` whose names begin so."""
        return {name: value for name, value in self.engine.stats().items() if name.startswith(beginnings)}

    def interrupted(
        self,
        request: RequestDict,
        short: RequestDict,
        beginnings: tuple[str, ...],
        before: dict[str, float],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Close a request after its first chunk: the gauges while it ran, and when they were as ``before``.

        ``short`` requests follow, so that the engine has steps in which to count; where the gauges are never
        as before, the last ones. A long request that was not cancelled still runs when those have ended.
        """

        async def interrupt() -> tuple[dict[str, float], dict[str, float]]:
            async with aclosing(self._generate(request)) as chunks:
                await anext(chunks)
                during = await self._read(beginnings, lambda now: now != before, READS_DURING)
            for _ in range(SHORT_REQUESTS):
                await self._collect(short)
                after = await self._read(beginnings, lambda now: now == before, READS_AFTER)
                if after == before:
                    break
            return during, after

        return self._run("the interrupted request", interrupt(), 3 * self._timeout_s)

    def closed_early(self, request: RequestDict) -> None:
        """Close a request after its first chunk."""

        async def close() -> None:
            async with aclosing(self._generate(request)) as chunks:
                await anext(chunks)

        self._run("the closed request", close())

    def settled(self, beginnings: tuple[str, ...], expected: dict[str, float]) -> dict[str, float]:
        """The gauges as soon as they are as ``expected``; where they never are, the last ones."""
        deadline = time.monotonic() + self._timeout_s
        while (now := self.gauges(beginnings)) != expected and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return now

    def stopped_during(self, request: RequestDict) -> bool:
        """Stop the engine after a request's first chunk; whether the request ended, in whatever way."""

        stopping: list[_InThread] = []

        async def stop_during() -> bool:
            async with aclosing(self._generate(request)) as chunks:
                await anext(chunks)
                stopping.append(_InThread("stop()", self.stop))
                try:
                    async with asyncio.timeout(self._timeout_s):
                        async for _ in chunks:
                            pass
                except RequestError:
                    return True
                except TimeoutError:
                    return False
                return True

        ended = self._run("the request", stop_during(), 2 * self._timeout_s)
        for each in stopping:
            each.wait(2 * self._timeout_s)
        return ended

    def late_events(self) -> list[RawEvent]:
        """Events that came after the engine had stopped, once the threads that it left have ended."""
        deadline = time.monotonic() + THREADS_S
        for thread in set(threading.enumerate()) - self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self._late

    def _take(self, rank: int, events: Sequence[RawEvent]) -> None:
        if self._stopped:
            self._late += events
        self.events.setdefault(rank, []).extend(events)

    def _generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        # The contract says: an async generator.
        return cast("AsyncGenerator[ChunkDict, None]", self.engine.generate(request))

    async def _collect(self, request: RequestDict) -> list[ChunkDict]:
        async with aclosing(self._generate(request)) as chunks:
            return [chunk async for chunk in chunks]

    async def _read(
        self, beginnings: tuple[str, ...], enough: Callable[[dict[str, float]], bool], reads: int
    ) -> dict[str, float]:
        """The gauges, read a few times until they are ``enough``: an engine sets no event of ours."""
        for _ in range(reads):
            if enough(now := self.gauges(beginnings)):
                break
            await asyncio.sleep(POLL_S)
        return now

    def _run(self, what: str, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        async def limited() -> T:
            async with asyncio.timeout(limit):
                return await work

        limit = self._timeout_s if timeout_s is None else timeout_s
        try:
            return self._runner.run(limited())
        except TimeoutError:
            raise AssertionError(f"{what} did not end within {limit:g} s") from None


class _InThread:
    """A call in a thread, as a worker makes one that may block. One that hangs does not keep pytest."""

    def __init__(self, what: str, call: Callable[[], object]) -> None:
        self._what, self._call = what, call
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name=what, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Return once the call has returned; raise what it has raised."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise AssertionError(f"the engine's {self._what} did not end within {timeout_s:g} s")
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self._failed.append(error)


def plain_request(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """A request in Dynamo's shape for an answer of so many tokens."""
    stop = {"max_tokens": max_tokens, "ignore_eos": True}
    return {"model": "m", "token_ids": list(prompt), "stop_conditions": stop, "eos_token_ids": []}


def installed_adapter(engine: Engine) -> EventAdapter:
    """What the installed plugin for the format of an engine's events reads them with."""
    from vswa_plugin.host.loading import load_host

    return load_host(environ={}).event_adapter(engine.event_format, engine.info.layout)


def check_info(engine: Engine) -> None:
    """What an engine states can be used by a worker and a router."""
    info = engine.info
    info.layout.check()
    assert isinstance(engine.event_format, str) and engine.event_format, "event_format: expected a name"
    for name in ("context_length", "max_num_seqs", "max_num_batched_tokens", "total_kv_blocks"):
        value = getattr(info, name)
        assert isinstance(value, int) and value > 0, f"info.{name}: expected a positive number, got {value!r}"
    assert info.data_parallel_size >= 1, f"info.data_parallel_size: got {info.data_parallel_size}"


def check_answer(chunks: Sequence[ChunkDict], prompt_tokens: int, *, most: int, cold: bool = False) -> None:
    """A whole answer to a prompt of so many tokens, with at most ``most`` tokens.

    :param cold: whether the engine has never seen the prompt.
    """
    assert chunks, "expected chunks, got none"
    reasons = [chunk.get("finish_reason") for chunk in chunks]
    assert reasons[-1] and not any(reasons[:-1]), f"finish_reason: expected in the last chunk, got {reasons}"
    tokens = [token for chunk in chunks for token in chunk["token_ids"]]
    assert all(type(token) is int for token in tokens), "expected token ids as numbers"
    assert len(tokens) <= most, f"expected at most {most} tokens (max_tokens), got {len(tokens)}"
    usage = chunks[-1].get("completion_usage")
    assert usage, "expected completion_usage in the last chunk"
    expected = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(tokens),
        "total_tokens": prompt_tokens + len(tokens),
    }
    counted = {name: usage.get(name) for name in expected}
    assert expected == counted, f"completion_usage: expected {expected}, got {counted}"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    assert isinstance(cached, int), f"prompt_tokens_details.cached_tokens: expected a number, got {cached!r}"
    # The last token is always computed: its logits give the first token of the answer.
    assert 0 <= cached < prompt_tokens, f"cached_tokens: expected 0 to {prompt_tokens - 1}, got {cached}"
    assert not (cold and cached), f"cached_tokens: expected 0 for a prompt never seen, got {cached}"


def check_events(
    life: EngineLife, new_adapter: Callable[[Engine], EventAdapter], prompt: Sequence[int]
) -> None:
    """The events of a whole life are readable, of the declared groups, and say that the prompt is held."""
    info = life.engine.info
    ranks = {number: Rank(new_adapter(life.engine), info.layout) for number in life.events}
    assert ranks and ranks.keys() <= set(range(info.data_parallel_size)), (
        f"expected events of ranks below {info.data_parallel_size}, got those of {sorted(ranks)}"
    )
    for number, rank in ranks.items():
        for raw in life.events[number]:
            rank.takes(raw)
        assert [] == rank.refused, f"rank {number}: its adapter refused events: {rank.refused}"
        assert [] == rank.restarts, f"rank {number}: the view had to begin again: {rank.restarts}"
    for group in info.layout.groups:
        if group.window_size is None:
            names = set(sequence_hashes_of_tokens(prompt, group.block_size))
            held = [names & rank.residency.resident()[group.group_id] for rank in ranks.values()]
            assert names in held, (
                f"global group {group.group_id}: expected all {len(names)} full blocks of the prompt to be "
                f"held by one rank, got {list(map(len, held))}"
            )
