"""From a client's request to the workers that serve it, and to what follows for the gateway."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping

import msgspec

from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError, unknown_choice
from vswa_plugin.router.decide import Hasher, hashed_prompt
from vswa_plugin.router.http.answers import UnknownModel
from vswa_plugin.router.http.server import Tokens
from vswa_plugin.router.picker import requests
from vswa_plugin.router.picker.headers import REQUEST_ID
from vswa_plugin.router.picker.reports import Reports
from vswa_plugin.router.picks import PickerCounts
from vswa_plugin.router.pools import Model
from vswa_plugin.router.reservations import Reservation
from vswa_plugin.router.selector.choices import GatewayChoices, pins_of
from vswa_plugin.selection import NoCandidate

logger = logging.getLogger(__name__)

#: How long a model that has lost its last worker is answered for with 503, and not with 404.
UNSERVED_S = 600.0


class Pick(msgspec.Struct, frozen=True):
    """:param headers: by which the request goes to its workers."""

    model: str
    reservation: Reservation
    headers: Mapping[str, str]


class Picker:
    """Picks for all models. Event loop only.

    :param ttl_s: how long a request counts as load at most, whatever becomes of it.
    """

    def __init__(
        self,
        choices: GatewayChoices,
        tokens: Tokens,
        hasher: Hasher,
        reports: Reports,
        counts: PickerCounts,
        ttl_s: float,
    ) -> None:
        self.counts = counts
        self.reports = reports
        self._choices = choices
        self._tokens = tokens
        self._hasher = hasher
        self._ttl_s = ttl_s
        #: When each model had a worker last.
        self._served_at: dict[str, float] = {}

    async def pick(self, path: str, body: bytes, headers: Mapping[str, str]) -> Pick:
        """Choose the workers of a request, which count as loaded by it until :meth:`end`.

        :param path: one of ``vswa_plugin.dynamo.preprocess.PATHS``.
        :raises Unreadable, NotRead: the frontend will refuse it.
        :raises RequestError: it cannot be served: see :func:`status_of`.
        """
        began = time.perf_counter()
        request = requests.read(body, headers)
        model = self._model(request.model)
        token_ids = await self._tokens.token_ids(path, request.fields)
        self.counts.preprocessing.observe(time.perf_counter() - began)
        routing = request.routed["routing"]
        try:
            prompt = hashed_prompt(
                self._hasher,
                token_ids,
                model.pool.naming,
                routing.get("cache_salt"),
                None,
                scorable=request.scorable,
            )
        except (UnicodeEncodeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"cache_salt or tokens cannot be hashed: {error}") from error
        request_id = self._choices.reservations.check(str(uuid.uuid4()))
        reservation = self._choices.choose(model, request.routed, prompt, request_id, request.metadata)
        self._choices.reservations.add(reservation, self._ttl_s)
        self.reports.expect(reservation)
        self.counts.picking.observe(time.perf_counter() - began)
        pins = {name: str(number) for name, number in pins_of(reservation).items()}
        return Pick(request.model, reservation, {**pins, REQUEST_ID: request_id})

    def first_byte(self, pick: Pick, status: int) -> None:
        """Its answer has begun: its prompt is computed, or a worker could not serve it."""
        if status < 400:
            pick.reservation.computed()
            return
        self.reports.forget(pick.reservation.selection_id)
        self._choices.reservations.give_up(pick.reservation.selection_id)
        if status in (502, 503, 504):
            for decision in {pick.reservation.computes.rank, pick.reservation.generates.rank}:
                self._choices.avoided.lost(decision.worker_id, f"the gateway's answer was {status}")

    def end(self, pick: Pick) -> None:
        """Its answer has come to its end, or its client has gone."""
        self._choices.reservations.give_up(pick.reservation.selection_id)
        self.reports.ended(pick.reservation.selection_id)

    def _model(self, name: str) -> Model:
        """Raises UnknownModel, or NoCandidate where it was served a while ago."""
        models, now = self._choices.models(), asyncio.get_running_loop().time()
        self._served_at |= dict.fromkeys(models, now)
        if name in models:
            return models[name]
        if now - self._served_at.get(name, -UNSERVED_S) < UNSERVED_S:
            raise NoCandidate(f"no worker serves {name!r} right now; see /workers")
        self._served_at.pop(name, None)
        raise UnknownModel(f"model: {unknown_choice('model', name, models)}")


def status_of(error: RequestError) -> int:
    """The HTTP status with which a request is refused for ``error``."""
    if isinstance(error, UnknownModel):
        return 404
    if isinstance(error, InvalidRequest):
        return 400
    return 429 if isinstance(error, Overloaded) else 503
