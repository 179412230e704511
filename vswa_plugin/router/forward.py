"""One request: choose its workers, pass the chunks on, keep the load book, compare what was promised."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from vswa_plugin.dynamo.client import Call
from vswa_plugin.engine.contract import ChunkDict, RequestDict
from vswa_plugin.errors import InvalidRequest, RequestError, Unavailable, unknown_choice
from vswa_plugin.router.decide import Decider, Decision
from vswa_plugin.router.disagg import (
    PREFILL_TRIES,
    PrefillAnswer,
    addressed,
    decode_request,
    prefill_request,
)
from vswa_plugin.router.pools import Model, Pool
from vswa_plugin.router.promises import Accuracy, Outcome
from vswa_plugin.router.under_way import UnderWay
from vswa_plugin.wire.events import Rank

logger = logging.getLogger(__name__)

#: How long a worker that could not serve a request is chosen only where there is no other.
AVOID_S = 5.0


class ForwardStats(msgspec.Struct):
    """Counters since start.

    :param unavailable: requests whose worker was lost: the frontend tries once more.
    :param prefill_retries: prompts that were given to another prefill worker because the first was lost.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    unavailable: int = 0
    prefill_retries: int = 0


class Forwarder:
    """Serves the requests of all models until :meth:`drain`. Event loop only.

    :param live: whether the view of a rank is live.
    """

    def __init__(
        self,
        decider: Decider,
        accuracy: Accuracy,
        live: Callable[[Rank], bool],
    ) -> None:
        #: By the name that clients use; kept by models.py.
        self.models: dict[str, Model] = {}
        self.stats = ForwardStats()
        self._decider = decider
        self._accuracy = accuracy
        self._live = live
        self._avoided: dict[int, float] = {}
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    async def forward(self, request: RequestDict, call: Call) -> AsyncIterator[ChunkDict]:
        """Chunks of the chosen worker, as they come; those of a burst come joined (bursts.py).

        Where prefill and decode workers are apart, the prompt is computed before the decode worker is chosen.

        :raises RequestError: nobody can serve it, or the worker's own refusal. Unavailable: the worker was
            lost, and the frontend goes on with another one.
        """
        model = self._model(request)
        self.stats.requests += 1
        under_way = UnderWay(self, model, call)
        try:
            with self._counted(call):
                answer = None
                if model.apart():
                    answer = await self._prefill(under_way, request)
                    if under_way.ended or not answer.complete:
                        return  # the client has gone
                    if (chunk := answer.whole) is not None:
                        under_way.finished = True
                        yield chunk
                        return
                rank = under_way.choose(model.pool if answer is None else model.decode, request)
                told = addressed(request, rank) if answer is None else decode_request(request, rank, answer)
                chunks = model.clients[rank.worker_id].generate(told, rank.worker_id, call)
                with self._watched(rank.worker_id):
                    async for chunk in chunks:
                        under_way.saw(chunk, answer)
                        yield chunk
        finally:
            under_way.end()

    async def _prefill(self, under_way: UnderWay, request: RequestDict) -> PrefillAnswer:
        """Have the prompt computed, by another worker where one is lost; incomplete: the client has gone.

        :raises RequestError: as :meth:`forward`.
        """
        rank = under_way.choose(under_way.model.prefill, request)
        tried: set[int] = set()
        while True:
            try:
                return await self._prefill_on(rank, under_way, request)
            except Unavailable as error:
                tried.add(rank.worker_id)
                if len(tried) == PREFILL_TRIES or under_way.ended:
                    raise
                try:
                    rank = under_way.choose(under_way.model.prefill, request, tried)
                except RequestError:  # there is no other: what happened is the better answer
                    raise error from None
                self.stats.prefill_retries += 1

    async def _prefill_on(self, rank: Rank, under_way: UnderWay, request: RequestDict) -> PrefillAnswer:
        answer = PrefillAnswer(rank)
        worker_id, call = rank.worker_id, under_way.call
        chunks = under_way.model.clients[worker_id].generate(prefill_request(request, rank), worker_id, call)
        try:
            with self._watched(worker_id):
                # To the end of the stream: one that is left behind looks like a cancelled request.
                async for chunk in chunks:
                    if answer.saw(chunk):
                        under_way.computed(answer)
                if not answer.complete and not call.stopped():
                    raise Unavailable(f"prefill worker {worker_id:x} ended without a last chunk")
        except Unavailable:
            if not answer.complete:
                raise
        return answer

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those under way; False if some still were after the time-out."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def forget(self, worker_id: int) -> None:
        """The worker has gone."""
        self._accuracy.drop(worker_id)
        self._avoided.pop(worker_id, None)

    def _model(self, request: RequestDict) -> Model:
        if self._draining:
            raise Unavailable("the router is stopping; another one can serve this")
        name = str(request.get("model"))
        model = self.models.get(name)
        if model is None:
            raise InvalidRequest(unknown_choice("model", name, self.models))
        return model

    def choose(
        self,
        model: Model,
        pool: Pool,
        request: RequestDict,
        call: Call,
        tried: Collection[int],
        before: Decision | None,
    ) -> Decision:
        """Choose a rank of ``pool``, but of no worker in ``tried``, and book the request there.

        :param before: the last choice for this request: its prompt is not hashed again.
        """
        decision = self._decider.decide(
            pool,
            request,
            reachable=model.reachable().difference(tried),
            avoided=self._avoided_now(),
            prompt=before.prompt if before is not None else None,
            own_id=model.endpoint.instance_id if model.endpoint is not None else None,
            request_id=call.request_id,
            metadata=call.metadata if self._decider.hooked else None,
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
        return decision

    def began(self) -> None:
        """One request more is under way."""
        self._in_flight += 1
        self._idle.clear()

    def ended(self, finished: bool) -> None:
        """One request is under way no more."""
        self._in_flight -= 1
        self.stats.finished += finished
        if not self._in_flight:
            self._idle.set()

    def compare(self, decision: Decision, block_size: int, live: bool, cached_tokens: int | None) -> None:
        """Predicted against actual, when a prompt's engine has said what it reused; None: it has not."""
        if cached_tokens is None:
            self._accuracy.unreported(decision.rank)
            return
        self._accuracy.record(
            Outcome(
                decision.rank,
                block_size,
                decision.cached_tokens,
                cached_tokens,
                live,
                decision.busy,
                decision.in_flight,
            )
        )

    def tracks_output(self) -> bool:
        return self._decider.tracks_output

    def is_live(self, rank: Rank) -> bool:
        return self._live(rank)

    @contextmanager
    def _counted(self, call: Call) -> Iterator[None]:
        """Count how a request failed."""
        try:
            yield
        except Unavailable:
            self.stats.unavailable += 1
            raise
        except RequestError as error:
            self.stats.refused += 1
            logger.info("request %s refused: %s", call.request_id, error)
            raise

    @contextmanager
    def _watched(self, worker_id: int) -> Iterator[None]:
        """Avoid the worker for a while once it is lost."""
        try:
            yield
        except Unavailable as error:
            if worker_id not in self._avoided:
                logger.warning("worker %x is avoided for %.0f s: %s", worker_id, AVOID_S, error)
            self._avoided[worker_id] = asyncio.get_running_loop().time() + AVOID_S
            raise

    def _avoided_now(self) -> Mapping[int, float]:
        if self._avoided:
            now = asyncio.get_running_loop().time()
            self._avoided = {worker: until for worker, until in self._avoided.items() if until > now}
        return self._avoided
