"""One request of a gateway as Envoy tells of it, message by message, from its headers to its end.

    request headers ─► request body ─► choice ─► headers that pin it, or an answer in the frontend's place
    response headers, or the first byte of the body where bodies are sent ─► its prompt is computed
    end of the stream, however it comes ─► it counts as load no more

The request's body must come whole before its headers go on: buffered by Envoy, or in its full-duplex mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from vswa_plugin.dynamo.preprocess import PATHS, NotRead
from vswa_plugin.errors import RequestError, Unavailable
from vswa_plugin.router import picks
from vswa_plugin.router.picker import grpc_server
from vswa_plugin.router.picker.destinations import Destinations
from vswa_plugin.router.picker.grpc_server import Reply
from vswa_plugin.router.picker.headers import (
    DESTINATION,
    LB_NAMESPACE,
    SUBSET_KEY,
    SUBSET_NAMESPACE,
    is_routing,
)
from vswa_plugin.router.picker.messages import OVERWRITE, ProcessingRequest, ProcessingResponse
from vswa_plugin.router.picker.picker import Pick, Picker, status_of
from vswa_plugin.router.picker.requests import Unreadable

logger = logging.getLogger(__name__)

#: Envoy's ``BodySendMode``.
NOT_SENT, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)
#: Larger requests of clients are not read: what becomes of them is the gateway's to say.
MAX_BODY_BYTES = 64 << 20
_KINDS = (
    "request_headers",
    "request_body",
    "request_trailers",
    "response_headers",
    "response_body",
    "response_trailers",
)
#: Bytes of a body that one answer may bring back to Envoy.
_PIECE_BYTES = 60_000
_JSON = b"application/json"


class Gateway:
    """All exchanges of one picker. Event loop only.

    :param destinations: frontends, for gateways that let a picker choose the endpoint; where there are none,
        the gateway chooses it.
    """

    def __init__(self, picker: Picker, destinations: Destinations) -> None:
        self.picker = picker
        self.destinations = destinations
        self._warned = False
        self._idle = asyncio.Event()
        self._idle.set()

    def opened(self, reply: Reply) -> Exchange:
        """A request has come to the gateway."""
        self.picker.counts.under_way += 1
        self._idle.clear()
        return Exchange(self, reply)

    def closed(self) -> None:
        """It is over."""
        self.picker.counts.under_way -= 1
        if not self.picker.counts.under_way:
            self._idle.set()

    async def idle(self) -> None:
        """Return when no request is under way."""
        await self._idle.wait()

    def cannot_pick(self, mode: int) -> None:
        """A gateway does not send bodies in a way in which they can be read before the headers go on."""
        if not self._warned:
            self._warned = True
            logger.error(
                "requests go on without a choice: expected a gateway that sends bodies whole "
                "(request_body_mode BUFFERED or FULL_DUPLEX_STREAMED), got mode %d; correct it",
                mode,
            )


class Exchange:
    """One request."""

    def __init__(self, gateway: Gateway, reply: Reply) -> None:
        self._gateway = gateway
        self._picker = gateway.picker
        self._reply = reply
        self._headers: dict[str, str] = {}
        self._path = ""
        self._request_mode, self._response_mode = BUFFERED, NOT_SENT
        self._removed: list[str] = []
        self._subset: list[str] = []
        #: The body as far as it has come; None: it is not for us to read.
        self._body: bytearray | None = None
        self._picking: asyncio.Task[None] | None = None
        self._pick: Pick | None = None
        self._begun = False
        #: How a body that ended with trailers is followed up.
        self._trailers_came = False

    # -- what comes --------------------------------------------------------------------------------

    def received(self, message: bytes) -> None:
        try:
            request = ProcessingRequest.FromString(message)
        except DecodeError as error:
            self._reply.finish(grpc_server.INTERNAL, f"expected a ProcessingRequest: {error}")
            return
        if request.observability_mode:
            return  # nothing that is answered has an effect
        if request.HasField("protocol_config"):
            modes = request.protocol_config
            self._request_mode, self._response_mode = modes.request_body_mode, modes.response_body_mode
        for kind in _KINDS:
            if request.HasField(kind):
                getattr(self, f"_{kind}")(request, getattr(request, kind))
                return

    def closed(self) -> None:
        if self._picking is not None and not self._picking.done():
            self._picking.cancel()
            self._picker.counts.end(None, picks.GONE)
        if self._pick is not None:
            self._picker.end(self._pick)
        self._gateway.closed()

    def _request_headers(self, request: Any, message: Any) -> None:
        self._headers = headers = dict(_headers_of(message.headers))
        self._removed = [name for name in headers if is_routing(name)]
        self._path = headers.get(":path", "").partition("?")[0]
        self._subset = _subset_of(request)
        wanted = headers.get(":method") == "POST" and self._path in PATHS and not message.end_of_stream
        if wanted and self._request_mode in (NOT_SENT, STREAMED):
            self._gateway.cannot_pick(self._request_mode)
            wanted = False
        if not wanted:
            self._picker.counts.end(None, picks.PASSED)
            self._go_on("request_headers")
            return
        self._body = bytearray()
        if self._request_mode != FULL_DUPLEX:
            self._send(_continued("request_headers", {}, self._removed))

    def _request_body(self, _: Any, message: Any) -> None:
        if self._body is None:
            self._pass_on("request_body", message, self._request_mode)
            return
        self._body += message.body
        if len(self._body) > MAX_BODY_BYTES:
            self._reply.finish(grpc_server.RESOURCE_EXHAUSTED, f"a body of more than {MAX_BODY_BYTES} bytes")
        elif self._request_mode != FULL_DUPLEX or message.end_of_stream:
            self._begin()

    def _request_trailers(self, _: Any, __: Any) -> None:
        if self._body is not None and self._picking is None and self._request_mode == FULL_DUPLEX:
            self._trailers_came = True
            self._begin()
        else:
            self._send(ProcessingResponse(request_trailers={}))

    def _response_headers(self, _: Any, message: Any) -> None:
        status = next((text for name, text in _headers_of(message.headers) if name == ":status"), "")
        code = int(status) if status.isdigit() else 200
        # Where the body is sent here too, its first byte says more exactly when the prompt is computed.
        if code >= 400 or self._response_mode not in (STREAMED, FULL_DUPLEX):
            self._answer_begins(code)
        self._send(ProcessingResponse(response_headers={}))

    def _response_body(self, _: Any, message: Any) -> None:
        if message.body:
            self._answer_begins(200)
        self._pass_on("response_body", message, self._response_mode)

    def _response_trailers(self, _: Any, __: Any) -> None:
        self._send(ProcessingResponse(response_trailers={}))

    def _answer_begins(self, status: int) -> None:
        if self._pick is not None and not self._begun:
            self._begun = True
            self._picker.first_byte(self._pick, status)

    # -- the choice --------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._picking = asyncio.create_task(self._choose(), name="pick")

    async def _choose(self) -> None:
        counts = self._picker.counts
        assert self._body is not None
        try:
            pick = await self._picker.pick(self._path, bytes(self._body), self._headers)
        except (Unreadable, NotRead) as error:
            logger.info("a request goes on without a choice: %s", error)
            counts.end(None, picks.PASSED)
            self._go_on_with_body({})
        except Unavailable as error:
            logger.warning("a request is not chosen for: %s", error)
            counts.end(None, picks.FAILED)
            self._reply.finish(grpc_server.UNAVAILABLE, str(error))
        except RequestError as error:
            self._refuse(error)
        except Exception:
            logger.exception("a choice failed")
            counts.end(None, picks.FAILED)
            self._reply.finish(grpc_server.INTERNAL, "the picker failed at this request; its log says more")
        else:
            counts.end(pick.model, picks.PICKED)
            self._pick = pick
            self._go_on_with_body(pick.headers)

    def _refuse(self, error: RequestError) -> None:
        code = status_of(error)
        unavailable = code in (429, 503)
        self._picker.counts.end(None, picks.UNAVAILABLE if unavailable else picks.REFUSED)
        logger.info("a request is refused with %d: %s", code, error)
        kind = HTTPStatus(code).phrase
        body = msgspec.json.encode({"message": str(error), "type": kind, "code": code})
        response = ProcessingResponse()
        response.immediate_response.status.code = code
        response.immediate_response.body = body
        response.immediate_response.details = "vswa_picker"  # for Envoy's access log
        _set(response.immediate_response.headers, "content-type", _JSON)
        self._send(response)

    # -- what goes back ----------------------------------------------------------------------------

    def _go_on(self, kind: str) -> None:
        self._send(self._with_destination(_continued(kind, {}, self._removed)))

    def _go_on_with_body(self, pins: Mapping[str, str]) -> None:
        """Let the request go on, with its body as it came."""
        assert self._body is not None
        if self._request_mode != FULL_DUPLEX:
            self._send(self._with_destination(_continued("request_body", pins, ())))
            return
        last = not self._trailers_came
        headers = self._with_destination(_continued("request_headers", pins, self._removed))
        answers = [headers, *_streamed("request_body", bytes(self._body), last)]
        if self._trailers_came:
            answers.append(ProcessingResponse(request_trailers={}))
        self._send(*answers)

    def _with_destination(self, response: Any) -> Any:
        destination = self._gateway.destinations.next(self._subset)
        if destination is not None:
            kind = "request_headers" if response.HasField("request_headers") else "request_body"
            common = getattr(response, kind).response
            common.clear_route_cache = True
            _set(common.header_mutation, DESTINATION, destination.encode())
            response.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION: destination}})
        return response

    def _pass_on(self, kind: str, message: Any, mode: int) -> None:
        if mode == FULL_DUPLEX:
            self._send(*_streamed(kind, message.body, message.end_of_stream))
        else:
            self._send(ProcessingResponse(**{kind: {}}))

    def _send(self, *responses: Any) -> None:
        self._reply.send(*[response.SerializeToString() for response in responses])


def _headers_of(headers: Any) -> Iterator[tuple[str, str]]:
    """Envoy sends the value as bytes or, in older versions, as text."""
    for each in headers.headers:
        yield each.key.lower(), each.value or each.raw_value.decode("utf-8", "replace")


def _subset_of(request: Any) -> list[str]:
    """The endpoints that the gateway lets this picker choose among; empty: it does not say."""
    metadata = request.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in metadata or SUBSET_KEY not in metadata[SUBSET_NAMESPACE].fields:
        return []
    value = metadata[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    listed = [each.string_value for each in value.list_value.values]
    return [each.strip() for each in listed or value.string_value.split(",") if each.strip()]


def _set(mutation: Any, name: str, value: bytes) -> None:
    option = mutation.set_headers.add(append_action=OVERWRITE)
    option.header.key, option.header.raw_value = name, value


def _continued(kind: str, pins: Mapping[str, str], removed: Sequence[str]) -> Any:
    response = ProcessingResponse(**{kind: {"response": {}}})
    mutation = getattr(response, kind).response.header_mutation
    mutation.remove_headers.extend(name for name in removed if name not in pins)
    for name, value in pins.items():
        _set(mutation, name, value.encode())
    return response


def _streamed(kind: str, body: bytes, end_of_stream: bool) -> list[Any]:
    """The body in pieces that Envoy takes, at least one."""
    pieces = [body[at : at + _PIECE_BYTES] for at in range(0, len(body), _PIECE_BYTES)] or [b""]
    answers = []
    for number, piece in enumerate(pieces, 1):
        response = ProcessingResponse(**{kind: {"response": {}}})
        streamed = getattr(response, kind).response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = piece, end_of_stream and number == len(pieces)
        answers.append(response)
    return answers
