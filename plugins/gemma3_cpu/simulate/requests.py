"""Cache managers without a model: workers that serve requests, and requests for them. Pure.

    manager = manager_for("trtllm_v2", groups, 32, 8192, max_chunk_tokens=256)
    worker = SimulatedWorker(manager, block_size=32, chunk_size=256)
    for request in islice(Workload(seed=0), 1000):
        cached_tokens = worker.serve(request.prompt, request.output_len)
        events = worker.take_events()

Nothing is computed. What is reused, stored, moved and evicted, and every event, is as in the engine.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from vswa_plugin.errors import ConfigError, InvalidRequest, InvariantError, unknown_choice

from ..cache.api import CacheManager, CacheSequence
from ..cache.spec import GroupSpec
from ..cache.v1 import CacheManagerV1
from ..cache.v2 import CacheManager as CacheManagerV2
from ..serving.options import RULES

#: One line of an engine trace.
Record: TypeAlias = dict[str, Any]

#: Token ids of made-up prompts and answers are below this.
VOCABULARY = 32_000


class Request(NamedTuple):
    """One request.

    :ivar prompt: token ids.
    :ivar output_len: tokens to generate, one at least.
    """

    prompt: tuple[int, ...]
    output_len: int


class WindowTotals(msgspec.Struct):
    """Counts of the events of one window, in blocks."""

    stored: int = 0
    removed: int = 0
    moved: int = 0


class Totals(msgspec.Struct):
    """Sums over all requests.

    :ivar windows: by ``window_size`` as events of TensorRT-LLM give it, or by vLLM's ``group_idx``.
    """

    requests: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    windows: dict[int, WindowTotals] = msgspec.field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Part of the prompt tokens that was reused."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def summary(self, seconds: float) -> dict[str, Any]:
        """For ``--json``; ``seconds`` is how long all of it took."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "hit_rate": round(self.hit_rate, 4),
            "requests_per_second": round(self.requests / seconds, 1),
        }

    def lines(self, seconds: float) -> list[str]:
        """The same for people."""
        return [
            f"requests       {self.requests:>12,}",
            f"prompt tokens  {self.prompt_tokens:>12,}",
            f"reused tokens  {self.reused_tokens:>12,}  {self.hit_rate:.1%}",
            f"requests/s     {self.summary(seconds)['requests_per_second']:>12,}",
        ]

    def count(self, event: dict[str, Any]) -> None:
        """Add one event, of TensorRT-LLM or of vLLM."""
        if "data" not in event:
            self._count_vllm(event)
            return
        window, data = self.windows.setdefault(event["window_size"], WindowTotals()), event["data"]
        match data["type"]:
            case "stored":
                window.stored += len(data["blocks"])
            case "removed":
                window.removed += len(data["block_hashes"])
            case "updated":
                window.moved += 1

    def _count_vllm(self, event: dict[str, Any]) -> None:
        group = self.windows.setdefault(event["group_idx"], WindowTotals())
        if event["type"] == "BlockStored":
            group.stored += len(event["block_hashes"])
        else:
            group.removed += len(event["block_hashes"])


def manager_for(
    rule: str, groups: Sequence[GroupSpec], block_size: int, max_seq_len: int, **options: Any
) -> CacheManager:
    """A cache manager by the name of its reuse rule.

    :param options: those of its class.
    :raises ConfigError: an unknown rule, or sizes that cannot work.
    """
    if rule not in RULES:
        raise ConfigError(unknown_choice("reuse rule", rule, RULES))
    v2, _, contiguous = RULES
    if rule == v2:
        return CacheManagerV2(groups, block_size, max_seq_len, **options)
    return CacheManagerV1(groups, block_size, max_seq_len, contiguous=rule == contiguous, **options)


def answer(prompt: Sequence[int], length: int) -> tuple[int, ...]:
    """The tokens with which every simulated worker answers ``prompt``, so that a next turn can hold them."""
    state = zlib.crc32(array("Q", prompt[-64:]).tobytes(), len(prompt))
    tokens = []
    for _ in range(length):
        state = (state * 1_103_515_245 + 12_345) % (1 << 31)
        tokens.append((state >> 8) % VOCABULARY)
    return tuple(tokens)


class Worker(Protocol):
    """Serves one request at a time."""

    def serve(self, prompt: Sequence[int], output_len: int) -> int:
        """Run one request to its end; how many tokens of its prompt were reused.

        :raises InvalidRequest: it can never run; the message gives the reason.
        """

    def take_events(self) -> Sequence[dict[str, Any]]:
        """The engine's own events since the last call, in order."""


class SimulatedWorker:
    """One engine rank that serves one request at a time.

    :param block_size: of ``manager``.
    :param chunk_size: prompt tokens that one step computes; not more than the manager's chunks.
    """

    def __init__(self, manager: CacheManager, block_size: int, chunk_size: int) -> None:
        self.manager = manager
        self._block_size = block_size
        self._chunk_size = chunk_size
        self._events = manager.flush_events()

    def serve(self, prompt: Sequence[int], output_len: int, cache_salt: str | None = None) -> int:
        """Run one request to its end; how many tokens of its prompt were reused.

        :raises InvalidRequest: it can never run; the message gives the reason.
        """
        sequence = self.manager.open(prompt, output_len, cache_salt)
        if sequence is None:
            raise InvariantError("a request that fits was not admitted though it is alone")
        self._compute(sequence, len(prompt), self._chunk_size)
        # The same pages are taken and given back in the same order as a token at a time: managers give some
        # back before the last token of a block, and take others before the first of the next one.
        last = len(prompt) + output_len - 1
        while sequence.computed_tokens < last:
            block_end = (sequence.computed_tokens // self._block_size + 1) * self._block_size
            last_token = block_end - 1 > sequence.computed_tokens
            self._compute(sequence, min(block_end - last_token, last), self._chunk_size)
        sequence.close(answer(prompt, output_len))
        self._events += self.manager.flush_events()
        return sequence.cached_tokens

    def take_events(self) -> list[dict[str, Any]]:
        """TensorRT-LLM event dicts since the last call, in order; the first ones announce the groups."""
        events, self._events = self._events, []
        return events

    def _compute(self, sequence: CacheSequence, upto: int, chunk_size: int) -> None:
        while sequence.computed_tokens < upto:
            step = min(chunk_size, upto - sequence.computed_tokens)
            sequence.reserve(sequence.computed_tokens + step)
            sequence.advance(step)
            self._events += self.manager.flush_events()


class Simulation:
    """Several workers that serve requests in turn.

    :param record: called with each line of an engine trace but its header: a request, then its events. With
        several workers a request has a ``dp_rank``, and events have what their manager was given.
    """

    def __init__(
        self, workers: Sequence[Worker], record: Callable[[Record], None] = lambda line: None
    ) -> None:
        self.workers = tuple(workers)
        self.totals = Totals()
        self._record = record
        for worker in self.workers:
            self._tell(worker)

    def run(self, requests: Iterable[Request]) -> Totals:
        """Serve ``requests``, the next one by the next worker.

        :raises InvalidRequest: one of them can never run; the message names it.
        """
        for request in requests:
            rank = self.totals.requests % len(self.workers)
            self._serve(rank, request)
        return self.totals

    def _serve(self, rank: int, request: Request) -> None:
        worker = self.workers[rank]
        try:
            cached = worker.serve(request.prompt, request.output_len)
        except InvalidRequest as error:
            raise InvalidRequest(f"request {self.totals.requests + 1}: {error}") from error
        self.totals.requests += 1
        self.totals.prompt_tokens += len(request.prompt)
        self.totals.reused_tokens += cached
        line: Record = {
            "type": "request",
            "token_ids": request.prompt,
            "output_len": request.output_len,
            "cached_tokens": cached,
        }
        if len(self.workers) > 1:
            line["dp_rank"] = rank
        self._record(line)
        self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        for event in worker.take_events():
            self.totals.count(event)
            self._record({"type": "event", "event": event})


class Workload:
    """Endless requests of people who talk about a few documents. The same seed gives the same requests.

    Of 100 requests about 45 are the next turn of a conversation, 25 begin one, 15 leave an earlier prompt
    somewhere and go on differently, and 15 are sent again as they were.

    :param mean_prompt_len: tokens, roughly; a conversation ends at three times as many.
    """

    def __init__(self, seed: int, mean_prompt_len: int = 1000) -> None:
        self._rng = random.Random(seed)
        self._mean = mean_prompt_len
        self._documents = [self._words(mean_prompt_len // 4, mean_prompt_len) for _ in range(12)]
        #: Prompts that were sent, with their answers; the oldest are forgotten.
        self._sent: list[tuple[Request, tuple[int, ...]]] = []

    def __iter__(self) -> Iterator[Request]:
        while True:
            request = Request(self._next_prompt()[: 3 * self._mean], self._rng.randint(8, 120))
            self._sent = [*self._sent[-63:], (request, answer(*request))]
            yield request

    def _next_prompt(self) -> tuple[int, ...]:
        kind = self._rng.random()
        if not self._sent or kind < 0.25:
            return self._rng.choice(self._documents) + self._words(10, self._mean // 4)
        (prompt, _), reply = self._rng.choice(self._sent)
        if kind < 0.70:
            if len(prompt) > 2 * self._mean:
                return self._rng.choice(self._documents) + self._words(10, self._mean // 4)
            return prompt + reply + self._words(10, self._mean // 8)
        if kind < 0.85:
            return prompt[: self._rng.randint(1, len(prompt))] + self._words(10, self._mean // 4)
        return prompt

    def _words(self, least: int, most: int) -> tuple[int, ...]:
        count = self._rng.randint(least, max(least, most))
        return tuple(self._rng.choices(range(VOCABULARY), k=count))
