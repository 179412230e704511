"""One request: choose its workers, pass the chunks on, keep the load book, compare what was promised."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection

import msgspec

from vswa_plugin.dynamo.client import Call, Unreached
from vswa_plugin.engine.contract import ChunkDict, RequestDict
from vswa_plugin.engine.outcomes import CANCELLED, FAILED, outcome_of, outcome_of_error
from vswa_plugin.errors import InvalidRequest, RequestError, Unavailable, unknown_choice
from vswa_plugin.router.avoided import AvoidedWorkers
from vswa_plugin.router.counts import RequestCounts
from vswa_plugin.router.decide import Decider, Decision
from vswa_plugin.router.disagg import (
    DECODE_TRIES,
    PREFILL_TRIES,
    PrefillAnswer,
    addressed,
    cached_tokens_of,
    decode_request,
    prefill_request,
    set_cached_tokens,
)
from vswa_plugin.router.pools import Model, Pool
from vswa_plugin.router.promises import Promises
from vswa_plugin.router.releases import Releases
from vswa_plugin.router.spans import RequestSpans
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: Finish reasons of a request that its engine did not finish.
_UNFINISHED = ("cancelled", "error")


class Services(msgspec.Struct, frozen=True):
    """What each request of a router is served with.

    :param live: whether the view of a rank is live.
    """

    decider: Decider
    promises: Promises
    avoided: AvoidedWorkers
    counts: RequestCounts
    releases: Releases
    live: Callable[[Rank], bool]


#: What Dynamo's frontend calls the model in a request that it makes itself, to have a prompt computed ahead.
SPECULATIVE_PREFILL = "speculative_prefill"


class Forwarder:
    """Serves the requests of all models until :meth:`drain`. Event loop only.

    :param live: whether the view of a rank is live.
    """

    def __init__(self, decider: Decider, promises: Promises, live: Callable[[Rank], bool]) -> None:
        #: By the name that clients use; kept by models.py.
        self.models: dict[str, Model] = {}
        counts = RequestCounts()
        self._services = Services(decider, promises, AvoidedWorkers(), counts, Releases(counts), live)
        self._draining = False

    @property
    def counts(self) -> RequestCounts:
        return self._services.counts

    @property
    def in_flight(self) -> int:
        return self._services.counts.under_way

    def forward(self, request: RequestDict, call: Call, shown: str | None = None) -> AsyncIterator[ChunkDict]:
        """The request's chunks, see :meth:`Forwarding.chunks`.

        :param shown: the model of the endpoint at which it came. The frontend prepares a client's next turn
            (``nvext.agent_hints.speculative_prefill``) with requests that name a model that nobody serves.
        :raises RequestError: no such model, or the router drains.
        """
        name = str(request.get("model"))
        if name == SPECULATIVE_PREFILL and shown is not None:
            name = shown
        model = self.models.get(name)
        try:
            if self._draining:
                raise Unavailable("the router is stopping; another one can serve this")
            if model is None:
                raise InvalidRequest(unknown_choice("model", name, self.models))
        except RequestError as error:
            self.counts.turned_away(None if model is None else name, error)
            raise
        return Forwarding(self._services, model, request, call).chunks()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those under way; False if some still were after the time-out."""
        self._draining = True
        idle = await self._services.counts.idle(timeout_s)
        await self._services.releases.settled()
        return idle

    def forget(self, worker_id: int) -> None:
        """The worker has gone."""
        self._services.promises.drop(worker_id)
        self._services.avoided.forget(worker_id)


class Forwarding:
    """One request on its way, from the choice of its workers to the end of its answer.

    It is in the load book at one rank at most, and in no book any more when it ends or when its client goes:
    Dynamo stops asking for chunks when a client goes, without closing the generator, whose ``finally`` may
    come late, and the load must not stay until then.
    """

    def __init__(self, services: Services, model: Model, request: RequestDict, call: Call) -> None:
        self._services = services
        self._model = model
        self._request = request
        self._call = call
        self._book = model.pool.book
        self._tracks_output = services.decider.tracks_output
        #: The last choice; its request may have left the load book already.
        self._decision: Decision | None = None
        #: Of the last choice: whether the rank's view was live, and whether its first token is still to come.
        self._live = self._waiting = True
        self._prefilled: PrefillAnswer | None = None
        #: How it has ended, from when that is known; None where its answer is left before its end.
        self._outcome: str | None = None
        self._ended = False
        self._spans = RequestSpans(model.name)
        self._error: str | None = None

    async def chunks(self) -> AsyncIterator[ChunkDict]:
        """Chunks of the chosen worker, as they come; those of a burst come joined (bursts.py).

        Where prefill and decode workers are apart, the prompt is computed before the decode worker is chosen.

        :raises RequestError: no worker can serve it, or the worker's own refusal. Unavailable: the worker was
            lost, and the frontend goes on with another one.
        """
        departure = asyncio.ensure_future(self._call.gone())
        departure.add_done_callback(self._client_gone)
        self._services.counts.began(self._model.name)
        try:
            if self._model.apart():
                self._prefilled = await self._prefill()
                if self._ended or not self._prefilled.complete:
                    self._let_go()
                    return  # the client has gone
                if (chunk := self._prefilled.whole) is not None:
                    self._outcome = outcome_of(self._prefilled.finish_reason)
                    yield chunk
                    return
            async for chunk in self._generated():
                yield chunk
            if not self._call.stopped():  # and so a stream without a last chunk
                self._fail(FAILED)
        except Exception as error:
            self._fail(outcome_of_error(error))
            self._error = str(error)
            if isinstance(error, RequestError) and not isinstance(error, Unavailable):
                logger.info("request %s refused: %s", self._call.request_id, error)
            raise
        finally:
            departure.cancel()
            self._end()

    async def _generated(self) -> AsyncIterator[ChunkDict]:
        """Chunks of the worker that generates; of another one where the first could not be called."""
        choice: tuple[Rank, RequestDict] | None = self._choose_generating()
        tried: set[int] = set()
        while choice is not None:
            rank, addressed_request = choice
            choice = None
            try:
                with self._services.avoided.if_lost(rank.worker_id):
                    async for chunk in self._call_worker(rank, addressed_request):
                        self._saw(chunk)
                        yield chunk
            except Unreached as error:
                tried.add(rank.worker_id)
                choice = self._another_decode_worker(tried, error)

    # -- the prompt, where prefill workers compute it ------------------------------------------------

    async def _prefill(self) -> PrefillAnswer:
        """Have the prompt computed, by another worker where one is lost; incomplete: the client has gone.

        :raises RequestError: as :meth:`chunks`.
        """
        rank = self._choose(self._model.prefill)
        tried: set[int] = set()
        while True:
            try:
                return await self._prefill_on(rank)
            except Unavailable as error:
                tried.add(rank.worker_id)
                if len(tried) == PREFILL_TRIES or self._ended:
                    raise
                try:
                    rank = self._choose(self._model.prefill, tried)
                except RequestError:  # there is no other: what happened is the better answer
                    raise error from None
                self._services.counts.prefill_retried(self._model.name)

    async def _prefill_on(self, rank: Rank) -> PrefillAnswer:
        answer = PrefillAnswer(rank)
        try:
            with self._services.avoided.if_lost(rank.worker_id):
                # To the end of the stream: one that is left behind looks like a cancelled request.
                async for chunk in self._call_worker(rank, prefill_request(self._request, rank)):
                    if answer.saw(chunk):
                        self._compare(answer.finish_reason, answer.cached_tokens)
                        self._leave()
                if not answer.complete and not self._call.stopped():
                    raise Unavailable(f"prefill worker {rank.worker_id} ended without a last chunk")
        except Unavailable:
            if not answer.complete:
                raise
        return answer

    # -- choosing and calling ------------------------------------------------------------------------

    def _choose_generating(self, tried: Collection[int] = ()) -> tuple[Rank, RequestDict]:
        """Choose the rank that generates, but of no worker in ``tried``; also the request that it gets."""
        answer = self._prefilled
        if answer is None:
            rank = self._choose(self._model.pool)
            return rank, addressed(self._request, rank)
        rank = self._choose(self._model.decode, tried)
        return rank, decode_request(self._request, rank, answer)

    def _another_decode_worker(self, tried: set[int], error: Unreached) -> tuple[Rank, RequestDict]:
        """As :meth:`_choose_generating`: none of ``tried`` got the request, so that the prompt is still held.

        :raises Unreached: ``error``, where there is no prompt to go on from, or no other worker.
        """
        if self._prefilled is None or self._ended or len(tried) == DECODE_TRIES:
            raise error
        try:
            choice = self._choose_generating(tried)
        except RequestError:  # there is no other: what happened is the better answer
            raise error from None
        self._services.counts.decode_retried(self._model.name)
        return choice

    def _choose(self, pool: Pool, tried: Collection[int] = ()) -> Rank:
        """Choose a rank, but of no worker in ``tried``; book the request there, and nowhere else any more."""
        self._leave()
        services, model, call, before = self._services, self._model, self._call, self._decision
        decision = self._decision = services.decider.decide(
            pool,
            self._request,
            reachable=model.reachable().difference(tried),
            avoided=services.avoided.now(),
            prompt=before.prompt if before is not None else None,  # not hashed again
            own_id=model.endpoint.instance_id if model.endpoint is not None else None,
            request_id=call.request_id,
            metadata=call.metadata if services.decider.hooked else None,
        )
        logger.debug(
            "request %s: %s rank %s at cost %.2f, promises %d of %d tokens",
            call.request_id,
            pool.phase,
            decision.rank,
            decision.cost,
            decision.cached_tokens,
            decision.prompt_len,
        )
        self._spans.chose(decision, pool.phase)
        self._live = services.live(decision.rank)
        self._waiting = True
        return decision.rank

    def _call_worker(self, rank: Rank, request: RequestDict) -> AsyncIterator[ChunkDict]:
        return self._model.clients[rank.worker_id].generate(request, rank.worker_id, self._call)

    # -- chunks as they come -------------------------------------------------------------------------

    def _saw(self, chunk: ChunkDict) -> None:
        """A chunk for the client has come."""
        if (self._waiting or self._tracks_output) and (tokens := chunk.get("token_ids")):
            self._count(len(tokens))
        reason = chunk.get("finish_reason")
        if reason and self._outcome is None:
            self._outcome = outcome_of(str(reason))
            if self._prefilled is None:
                self._compare(str(reason), cached_tokens_of(chunk.get("completion_usage") or {}))
            elif self._prefilled.cached_tokens is not None:
                set_cached_tokens(chunk, self._prefilled.cached_tokens)
            # Before the client can have seen the end: its next request must not meet the load of this one.
            self._leave()

    def _count(self, tokens: int) -> None:
        assert self._decision is not None
        if self._waiting:
            self._waiting = False
            self._spans.first_token()
            self._book.first_token(self._decision.key)
        if self._tracks_output:
            self._book.output(self._decision.key, tokens)

    def _compare(self, finish_reason: str, cached_tokens: int | None) -> None:
        """The engine that computed the prompt has finished and reported what it reused; None: no report."""
        assert self._decision is not None
        if finish_reason not in _UNFINISHED:
            size = self._model.pool.block_size
            self._services.promises.compare(self._decision, size, self._live, cached_tokens)

    # -- the end -------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Take the request out of the load book."""
        if self._decision is not None:
            self._book.free(self._decision.key)

    def _fail(self, outcome: str) -> None:
        """The request has ended so, unless its last chunk has come before."""
        if self._outcome is None:
            self._outcome = outcome

    def _end(self) -> None:
        """The request has ended, in whatever way. A second call does nothing."""
        if not self._ended:
            self._ended = True
            self._leave()
            self._let_go()
            outcome = self._outcome or CANCELLED
            self._services.counts.end(self._model.name, outcome)
            self._spans.end(outcome, self._error)

    def _let_go(self) -> None:
        """Have the prefill worker free the prompt if no decode worker can have fetched it: none will."""
        if (answer := self._prefilled) is None or not self._waiting or (params := answer.held) is None:
            return
        if (client := self._model.clients.get(answer.rank.worker_id)) is not None:
            self._services.releases.start(self._model.name, client, answer.rank.worker_id, params)

    def _client_gone(self, departure: asyncio.Future[bool]) -> None:
        if not departure.cancelled() and not self._ended:
            departure.exception()  # asyncio need not report it
            self._end()
