"""What a request under way has in the books, and what is learnt from its chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import TYPE_CHECKING

from vswa_plugin.dynamo.client import Call
from vswa_plugin.engine.contract import ChunkDict, RequestDict
from vswa_plugin.router.decide import Decision
from vswa_plugin.router.disagg import PrefillAnswer, cached_tokens_of, tell_cached_tokens
from vswa_plugin.router.pools import Pool
from vswa_plugin.wire.events import Rank

if TYPE_CHECKING:
    from vswa_plugin.router.forward import Forwarder
    from vswa_plugin.router.pools import Model

#: Engines end so a request that they did not finish.
_UNFINISHED = ("cancelled", "error")


class UnderWay:
    """The books of one request, closed exactly once: at its end, or when its client goes.

    Dynamo stops asking for chunks when a client goes, without closing the generator: its ``finally`` may come
    late, and the load must not stay until then.
    """

    def __init__(self, forwarder: Forwarder, model: Model, call: Call) -> None:
        self.model = model
        self.call = call
        self.finished = self.ended = False
        self._forwarder = forwarder
        self._book = model.pool.book
        self._outputs = forwarder.tracks_output()
        self._decision: Decision | None = None
        self._live = self._waiting = True
        self._gone = asyncio.ensure_future(call.gone())
        self._gone.add_done_callback(self._client_gone)
        forwarder.began()

    def choose(self, pool: Pool, request: RequestDict, tried: Collection[int] = ()) -> Rank:
        """Choose a rank and book the request there, and nowhere else any more; see Forwarder.choose."""
        self._leave()
        before = self._decision
        self._decision = self._forwarder.choose(self.model, pool, request, self.call, tried, before)
        self._live = self._forwarder.is_live(self._decision.rank)
        self._waiting = True
        return self._decision.rank

    def computed(self, answer: PrefillAnswer) -> None:
        """A prefill worker is done with the prompt."""
        self._compare(answer.finish_reason, answer.cached_tokens)
        self._leave()

    def saw(self, chunk: ChunkDict, answer: PrefillAnswer | None) -> None:
        """A chunk for the client has come; ``answer``: what was computed for it before, elsewhere."""
        if (self._waiting or self._outputs) and (tokens := chunk.get("token_ids")):
            self._tokens(len(tokens))
        reason = chunk.get("finish_reason")
        if reason and not self.finished:
            self.finished = True
            if answer is None:
                self._compare(str(reason), cached_tokens_of(chunk.get("completion_usage") or {}))
            elif answer.cached_tokens is not None:
                tell_cached_tokens(chunk, answer.cached_tokens)
            # Before the client can have seen the end: its next request must not meet the load of this one.
            self._leave()

    def end(self) -> None:
        """It has ended, however; again: nothing."""
        if self.ended:
            return
        self.ended = True
        self._gone.cancel()
        self._leave()
        self._forwarder.ended(self.finished)

    def _tokens(self, count: int) -> None:
        assert self._decision is not None
        if self._waiting:
            self._waiting = False
            self._book.first_token(self._decision.key)
        if self._outputs:
            self._book.output(self._decision.key, count)

    def _compare(self, finish_reason: str, cached_tokens: int | None) -> None:
        assert self._decision is not None
        if finish_reason not in _UNFINISHED:
            size = self.model.pool.block_size
            self._forwarder.compare(self._decision, size, self._live, cached_tokens)

    def _leave(self) -> None:
        if self._decision is not None:
            self._book.free(self._decision.key)

    def _client_gone(self, gone: asyncio.Future[bool]) -> None:
        if not gone.cancelled() and not self.ended:
            gone.exception()
            self._forwarder.stats.cancelled += not self.finished
            self.end()
