"""Phases apart: the prompts that a prefill worker keeps until they are fetched, and a decode worker's part.

Each belongs to one rank. What the transfer's threads report is posted to the rank's own thread, which alone
touches caches and counters.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from vswa_plugin.errors import Unavailable

from ..cache.api import CacheSequence
from ..model.sampling import Sampled
from ..transfer.client import PullRequest, PullResult
from ..transfer.errors import TransferError
from ..transfer.params import TransferParams
from ..transfer.puller import Puller, Pulling
from ..transfer.server import TransferServer
from ..transfer.serving import Offer
from ..transfer.tickets import Outcome
from .contract import Contract
from .generation import Generation

logger = logging.getLogger(__name__)

#: From any thread: run this on the rank's own, before its next step.
Post: TypeAlias = Callable[[Callable[[], None]], None]

_EVERY_ADDRESS = ("0.0.0.0", "::")


class TransferCounters:
    """Totals of one rank since the start; by their names in ``stats``.

    ``transfers`` brought all their blocks. ``transfer_seconds`` they took: on a decode worker from the
    connection to the last block, on a prefill worker as long as their blocks were held. Prompts that nobody
    fetched are ``transfers_expired`` at their deadline, ``transfers_released`` where a router said that
    nobody would, and ``transfers_displaced`` where others needed their blocks.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)
        self._bytes = [0] * len(self._labels)
        self.transfers = 0
        self.failures = 0
        self.expired = 0
        self.released = 0
        self.displaced = 0
        self._seconds = 0.0

    def complete(self, bytes_per_group: Sequence[int], seconds: float) -> None:
        self.transfers += 1
        self._seconds += seconds
        for group, count in enumerate(bytes_per_group):
            self._bytes[group] += count

    def as_gauges(self) -> dict[str, float]:
        gauges = {f"transfer_bytes_{label}": 0.0 for label in self._labels}
        for label, count in zip(self._labels, self._bytes, strict=True):
            gauges[f"transfer_bytes_{label}"] += count
        return gauges | {
            "transfers": float(self.transfers),
            "transfer_failures": float(self.failures),
            "transfers_expired": float(self.expired),
            "transfers_released": float(self.released),
            "transfers_displaced": float(self.displaced),
            "transfer_seconds": self._seconds,
        }


@dataclass(slots=True, eq=False)
class _HeldPrompt:
    """A finished prompt, its blocks held."""

    cache: CacheSequence
    output: list[int]
    since: float
    ticket: str = ""


class KeptPrompts:
    """Of a prefill rank: what its scheduler hands finished prompts to.

    :param timeout_s: how long a prompt waits to be fetched before it is freed.
    :param patience_s: how long, where others need its blocks.
    """

    def __init__(
        self,
        server: TransferServer,
        contract: Contract,
        post: Post,
        dp_rank: int,
        timeout_s: float,
        patience_s: float,
    ) -> None:
        self._server = server
        self._contract = contract
        self._post = post
        self._dp_rank = dp_rank
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        #: In the order in which they were finished.
        self._kept: dict[_HeldPrompt, None] = {}
        #: When a prompt was last fetched.
        self._fetched_at = -math.inf
        self._counters = TransferCounters([group.label for group in contract.groups])

    def keep(self, generation: Generation, first: Sampled) -> dict[str, Any]:
        """Offer the finished prompt; its cache sequence is ours until it was fetched or is too old.

        :raises Unavailable: the engine is stopping; the sequence stays the caller's.
        """
        cache, prompt_len = generation.opened, len(generation.request.prompt)
        held = _HeldPrompt(cache, list(generation.output), time.monotonic())
        # A copy: while this prompt is held its pages stay, and the lists are the cache manager's.
        tables = [list(table) for table in cache.tables]
        offer = Offer(
            self._contract.fingerprint,
            self._contract.blocks(self._contract.visible(prompt_len)),
            partial(self._contract.read, tables),
            lambda _, outcome, sent: self._post(partial(self._released, held, outcome, sent)),
        )
        ticket = held.ticket = self._server.offer(offer, self._timeout_s)
        self._kept[held] = None
        generation.cache = None
        generation.finished = True
        host, port = _reachable(self._server.address)
        return TransferParams(
            host=host,
            port=port,
            ticket=ticket,
            fingerprint=self._contract.fingerprint,
            prompt_len=prompt_len,
            cached_tokens=cache.cached_tokens,
            first_token=first.token,
            first_logprob=first.logprob,
            first_top=first.top,
            prefill_dp_rank=self._dp_rank,
        ).to_json()

    def make_room(self) -> float | None:
        """Others need blocks: displace the prompt that has waited longest, if it has waited long enough.

        While prompts are fetched, the decode workers are there and the others get their turn: a busy decode
        worker is no reason to have it compute the prompts as well. Where none has been fetched for
        ``patience_s``, the call of the decode worker has probably failed.

        :returns: after how many seconds to try again; None: not before one is freed.
        """
        now = time.monotonic()
        for held in self._kept:
            wait_s = max(held.since, self._fetched_at) + self._patience_s - now
            if wait_s > 0:
                return wait_s
            if self._server.withdraw(held.ticket, Outcome.DISPLACED):
                return None
        return None  # all are being fetched, or are about to be freed

    def close_all(self) -> None:
        for held in self._kept:
            held.cache.close(held.output)
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def as_gauges(self) -> dict[str, float]:
        """The counters, and ``transfers_held``: prompts whose blocks are held now."""
        return {**self._counters.as_gauges(), "transfers_held": float(len(self))}

    def _released(self, held: _HeldPrompt, outcome: Outcome, sent: tuple[int, ...]) -> None:
        if held not in self._kept:
            return
        del self._kept[held]
        held.cache.close(held.output)
        if outcome is Outcome.ACKNOWLEDGED:
            self._fetched_at = time.monotonic()
            # Nothing sent: the decode worker needed no blocks.
            if any(sent):
                self._counters.complete(sent, time.monotonic() - held.since)
        elif outcome is Outcome.EXPIRED:
            self._counters.expired += 1
        elif outcome is Outcome.RELEASED:
            self._counters.released += 1
        elif outcome is Outcome.DISPLACED:
            self._counters.displaced += 1
            logger.warning(
                "a prompt that no decode worker has fetched for %.1f s is given up: others need its blocks",
                time.monotonic() - held.since,
            )
        elif outcome is Outcome.FAILED:
            self._counters.failures += 1


class FetchedPrompts:
    """Of a decode rank: what fetches prompts for its scheduler."""

    def __init__(self, puller: Puller, contract: Contract, post: Post) -> None:
        self._puller = puller
        self._contract = contract
        self._post = post
        self._under_way: dict[Generation, Pulling] = {}
        self._landed: list[tuple[Generation, bool]] = []
        self._counters = TransferCounters([group.label for group in contract.groups])

    def accepts(self, generation: Generation) -> bool:
        """Whether what a prefill worker computed can be used here; the log has the reason if not."""
        params = _params(generation)
        expected, actual = len(generation.request.prompt), params.prompt_len
        if expected != actual:
            problem = f"expected a prompt of {expected} tokens, got one of {actual}"
        elif params.fingerprint != self._contract.fingerprint:
            problem = (
                f"expected fingerprint {self._contract.fingerprint!r}, got {params.fingerprint!r}; run the "
                "same model and cache options on prefill and decode workers"
            )
        else:
            return True
        self.decline(generation)
        self._failed(f"{params.host}:{params.port} computed something else: {problem}")
        return False

    def begin(self, generation: Generation) -> None:
        """Fetch what the request's cache, just opened, lacks of the prompt.

        :raises Unavailable: the engine is stopping.
        """
        cache = generation.opened
        lacking = self._contract.blocks(cache.reserve_transfer())
        tables = [list(table) for table in cache.tables]
        params = _params(generation)
        request = PullRequest(
            (params.host, params.port),
            params.ticket,
            params.fingerprint,
            lacking,
            partial(self._contract.write, tables),
        )
        self._under_way[generation] = self._puller.start(
            request, lambda result: self._post(partial(self._ended, generation, result))
        )

    def decline(self, generation: Generation) -> None:
        """Nothing of it is needed: the prefill worker may free it."""
        params = _params(generation)
        nothing = self._contract.blocks([range(0)] * len(self._contract.groups))
        address = (params.host, params.port)
        request = PullRequest(address, params.ticket, params.fingerprint, nothing, _write_nothing)
        try:
            self._puller.start(request, _ignore)
        except Unavailable:
            logger.debug("the engine is stopping; the prefill worker frees the blocks after its deadline")

    def landed(self) -> list[tuple[Generation, bool]]:
        """Requests whose transfer has ended since the last call, and whether it brought everything."""
        for generation, pulling in self._under_way.items():
            if generation.cancelled:
                # Its pages are the transfer's until that has ended.
                self._puller.cancel(pulling)
        landed, self._landed = self._landed, []
        return landed

    def close_all(self) -> list[Generation]:
        """Their requests are the caller's to end; transfers under way end with the puller."""
        unfinished = [*self._under_way, *(generation for generation, _ in self._landed)]
        self._under_way.clear()
        self._landed.clear()
        return unfinished

    def __len__(self) -> int:
        return len(self._under_way) + len(self._landed)

    def as_gauges(self) -> dict[str, float]:
        """The counters, and ``transfers_held``: prompts that are under way now."""
        return {**self._counters.as_gauges(), "transfers_held": float(len(self))}

    def _ended(self, generation: Generation, result: PullResult | TransferError) -> None:
        if self._under_way.pop(generation, None) is None:
            return
        complete = isinstance(result, PullResult)
        if isinstance(result, PullResult):
            self._counters.complete(result.bytes_per_group, result.seconds)
            generation.transfer_s = result.seconds
        elif generation.cancelled:
            # It may have ended before it sent anything: then this informs the prefill worker.
            self.decline(generation)
        else:
            self._failed(str(result))
        self._landed.append((generation, complete))

    def _failed(self, reason: str) -> None:
        self._counters.failures += 1
        logger.warning("a prompt is computed here that a prefill worker has computed: %s", reason)


def _params(generation: Generation) -> TransferParams:
    assert generation.handover is not None
    return generation.handover


def _reachable(address: tuple[str, int]) -> tuple[str, int]:
    """Where others find a server that listens on every address: under this machine's name."""
    host, port = address
    return (socket.gethostname() if host in _EVERY_ADDRESS else host), port


def _write_nothing(group: int, first: int, data: memoryview, /) -> None:
    """Do nothing: the pull requests no blocks."""


def _ignore(result: PullResult | TransferError) -> None:
    """Do nothing: if the message was lost, the prefill worker's deadline frees the blocks."""
