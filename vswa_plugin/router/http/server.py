"""The router's HTTP server: it reads requests, answers them, and explains what is wrong with one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from vswa_plugin.dynamo.preprocess import CHAT, COMPLETIONS, NotRead
from vswa_plugin.errors import InvalidRequest, Overloaded, RequestError
from vswa_plugin.following.fleet import Fleet
from vswa_plugin.program.addresses import check_address, http_url
from vswa_plugin.program.status import Status
from vswa_plugin.router.decide import Hasher
from vswa_plugin.router.http.answers import (
    ServedPrompt,
    TooLarge,
    UnknownModel,
    explanations,
    prompt_of,
    prompt_of_hashes,
    query_answer,
    ready_answer,
    served,
    worker_answers,
)
from vswa_plugin.router.http.dump import DumpQuery, dump
from vswa_plugin.router.http.guard import READ_TIMEOUT_S, authorized, read_body
from vswa_plugin.router.http.messages import (
    MAX_BODY_BYTES,
    MAX_TOKENS,
    ChoiceAnswer,
    ErrorAnswer,
    ExplainQuery,
    HashQuery,
    HealthAnswer,
    Query,
    ReadyAnswer,
    Release,
    ReleaseAnswer,
    SelectAnswer,
    SelectionWish,
    SelectQuery,
)
from vswa_plugin.router.http.metrics import RouterMetrics
from vswa_plugin.router.http.openapi import document
from vswa_plugin.router.http.operations import DUMP_PARAMETERS, HTML, JSON, OPERATIONS, Operation, Parameter
from vswa_plugin.router.http.overview import overview
from vswa_plugin.router.http.page import document as page_document
from vswa_plugin.router.http.prompts import Tokenizers
from vswa_plugin.router.pools import Groups
from vswa_plugin.router.reservations import Reservations, SelectionIdTaken, UnknownReservation

logger = logging.getLogger(__name__)

#: A client that does not read its dump is left.
DUMP_TIMEOUT_S = 60.0
_CODES: tuple[tuple[type[RequestError], int], ...] = (
    (InvalidRequest, 400),
    (NotRead, 400),
    (UnknownModel, 404),
    (UnknownReservation, 404),
    (SelectionIdTaken, 409),
    (TooLarge, 413),
    (RequestError, 503),
)
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class NoSelector(UnknownModel):
    """This router forwards requests itself."""


class Selecting(Protocol):
    """What answers ``/select`` and what follows from it; see router/selector/choices.py."""

    reservations: Reservations

    def select(self, query: SelectQuery) -> SelectAnswer: ...
    def first_token(self, wish: SelectionWish) -> ReleaseAnswer: ...
    def release(self, wish: Release) -> ReleaseAnswer: ...


class Tokens(Protocol):
    """What makes the tokens of a client's request; see ``vswa_plugin.dynamo.preprocess``."""

    async def token_ids(self, path: str, body: Mapping[str, msgspec.Raw]) -> Sequence[int]: ...


class RouterServer:
    """Serves the API for one router.

    :param status: the state of the router's process.
    :param choices: of a router that forwards nothing; None: ``/select`` is refused.
    :param token: that clients must send; None: anybody is answered.
    :param tokens: makes the tokens of a text; None: text is refused.
    """

    def __init__(
        self,
        fleet: Fleet,
        hasher: Hasher,
        status: Status,
        metrics: RouterMetrics,
        choices: Selecting | None = None,
        token: str | None = None,
        tokens: Tokens | None = None,
        *,
        explain_choice: Callable[[ServedPrompt], list[ChoiceAnswer]],
    ) -> None:
        self._tokens = tokens
        self._explain_choice = explain_choice
        self._fleet = fleet
        self._groups = Groups(fleet.entries)
        self._hasher = hasher
        self._status = status
        self._shown_metrics = metrics
        self._choices = choices
        self._token = token
        self._tokenizers = Tokenizers()
        self._dumping = False
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; the port, a free one for 0. Raises ConfigError where the address is taken or not ours."""
        check_address(host, port)
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._middleware])
        for operation in OPERATIONS:
            app.router.add_route(operation.method, operation.path, self._handler(operation))
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=READ_TIMEOUT_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        bound: int = self._runner.addresses[0][1]
        logger.info("API on %s, described at /openapi.json", http_url(host, bound))
        return bound

    async def stop(self) -> None:
        if self._choices is not None:
            self._choices.reservations.close()
        if self._runner is not None:
            await self._runner.cleanup()

    # -- operations --------------------------------------------------------------------------------

    async def _query(self, query: Query) -> Any:
        return query_answer(self._fleet, prompt_of(self._groups, self._hasher, query))

    async def _query_by_hash(self, query: HashQuery) -> Any:
        return query_answer(self._fleet, prompt_of_hashes(self._groups, query))

    async def _explain(self, query: ExplainQuery) -> Any:
        tokens = query.token_ids
        if tokens is None:
            if query.prompt is None:
                raise InvalidRequest("expected token_ids or prompt, got neither")
            path = served(self._groups, query).entries[0].model_path
            tokens = await self._tokenizers.tokens(path, query.prompt)
            if len(tokens) > MAX_TOKENS:
                raise TooLarge(f"prompt: expected at most {MAX_TOKENS} tokens, got {len(tokens)}")
        asked = Query(
            token_ids=tokens,
            model_name=query.model_name,
            model=query.model,
            lora_name=query.lora_name,
            cache_salt=query.cache_salt,
        )
        return explanations(self._fleet, prompt_of(self._groups, self._hasher, asked))

    async def _choice(self, query: Query) -> Any:
        return self._explain_choice(prompt_of(self._groups, self._hasher, query))

    async def _select(self, query: SelectQuery) -> Any:
        choices = self._selecting()
        return choices.select(
            query if query.prompt is None and query.messages is None else await self._read(query)
        )

    async def _read(self, query: SelectQuery) -> SelectQuery:
        """The same with the tokens of its text."""
        if self._tokens is None:
            raise InvalidRequest(
                "expected token_ids, got text: this program makes no tokens of it; `vswa picker` does"
            )
        if [query.token_ids, query.prompt, query.messages].count(None) != 2:
            raise InvalidRequest("expected one of token_ids, prompt and messages, got more")
        name = served(self._groups, query).name
        given = {
            "prompt": query.prompt,
            "messages": query.messages,
            "tools": query.tools,
            "chat_template_args": query.chat_template_args,
        }
        fields = {"model": name, **{key: value for key, value in given.items() if value is not None}}
        raw = {key: msgspec.Raw(msgspec.json.encode(value)) for key, value in fields.items()}
        path = COMPLETIONS if query.messages is None else CHAT
        token_ids = list(await self._tokens.token_ids(path, raw))
        if not 0 < len(token_ids) <= MAX_TOKENS:
            raise InvalidRequest(f"expected a prompt of 1 to {MAX_TOKENS} tokens, got {len(token_ids)}")
        return msgspec.structs.replace(query, token_ids=token_ids, prompt=None, messages=None)

    async def _prefill_complete(self, query: Any) -> Any:
        return self._selecting().first_token(query)

    async def _release(self, query: Any) -> Any:
        return self._selecting().release(query)

    async def _workers(self, request: web.Request) -> Any:
        return worker_answers(self._fleet, request.query.get("model_name"))

    async def _dump(self, request: web.Request) -> web.StreamResponse:
        numbers = {each.name: _number(request, each) for each in DUMP_PARAMETERS if each.kind == "integer"}
        query = DumpQuery(request.query.get("model_name"), **numbers)
        query.ranks(self._fleet.index)  # refused before anything is sent
        if self._dumping:
            raise Overloaded("expected one dump at a time, got another; ask again when it is done")
        self._dumping = True
        response = web.StreamResponse(headers={"Content-Type": JSON})
        try:
            async with asyncio.timeout(DUMP_TIMEOUT_S):
                await response.prepare(request)
                async for piece in dump(self._fleet, query):
                    await response.write(piece)
                await response.write_eof()
        except TimeoutError:
            logger.warning("a dump was not read within %.0f s and is cut off", DUMP_TIMEOUT_S)
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._dumping = False
        return response

    async def _health(self, _: web.Request) -> web.Response:
        failure = self._status.failure
        answer = HealthAnswer("healthy" if failure is None else "failed", failure)
        return _json(answer, 200 if failure is None else 503)

    async def _ready(self, _: web.Request) -> web.Response:
        answer = self._readiness()
        return _json(answer, 200 if answer.ready else 503)

    def _readiness(self) -> ReadyAnswer:
        failure = self._status.failure
        reason = None if self._status.ready else "the router is starting or ending"
        ready = self._status.ready and failure is None
        return ready_answer(self._fleet, ready, failure or reason)

    async def _overview(self, _: web.Request) -> Any:
        answer, metrics = self._readiness(), self._shown_metrics
        return overview(self._fleet, metrics.counted, metrics.program, answer.ready, answer.reason)

    async def _page(self, _: web.Request) -> web.Response:
        text, policy = page_document()
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return web.Response(text=text, content_type=HTML, headers=headers)

    async def _metrics(self, _: web.Request) -> web.Response:
        text = await self._shown_metrics.render()
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _openapi(self, _: web.Request) -> Any:
        return document(with_token=self._token is not None)

    def _selecting(self) -> Selecting:
        if self._choices is None:
            raise NoSelector(
                "expected a router started with --selector-only, got one that forwards requests itself: send "
                "them to Dynamo's frontend"
            )
        return self._choices

    # -- reading and answering ---------------------------------------------------------------------

    def _handler(self, operation: Operation) -> _Handler:
        method: Callable[[Any], Awaitable[Any]] = getattr(self, f"_{operation.name}")
        decoder = None if operation.body is None else msgspec.json.Decoder(operation.body)

        async def handle(request: web.Request) -> web.StreamResponse:
            argument: Any = request
            if decoder is not None:
                argument = _decoded(decoder, operation, await read_body(request))
            answer = await method(argument)
            return answer if isinstance(answer, web.StreamResponse) else _json(answer)

        return handle

    @web.middleware
    async def _middleware(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        began = time.perf_counter()
        try:
            if not authorized(request, self._token):
                raise web.HTTPUnauthorized
            response = await handler(request)
        except web.HTTPException as error:
            response = _http_error(request, error)
        except RequestError as error:
            response = _error(str(error), next(code for kind, code in _CODES if isinstance(error, kind)))
        except ConnectionError:
            raise  # the client has gone
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            response = _error("the router failed at this request; please report it with its log", 500)
        resource = request.match_info.route.resource
        endpoint = "other" if resource is None else resource.canonical
        self._shown_metrics.observe(endpoint, response.status, time.perf_counter() - began)
        return response


def _decoded(decoder: msgspec.json.Decoder[Any], operation: Operation, body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(
            f"expected {operation.body.__name__} as in /openapi.json, got {len(body)} bytes: {error}"
        ) from error


def _number(request: web.Request, parameter: Parameter) -> int | None:
    name, most = parameter.name, parameter.most
    text = request.query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= most):
        raise InvalidRequest(f"{name}: expected a whole number of at most {most}, got {text[:40]!r}")
    return int(text)


def _json(answer: Any, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type=JSON)


def _error(text: str, code: int) -> web.Response:
    return _json(ErrorAnswer(text, code), code)


def _http_error(request: web.Request, error: web.HTTPException) -> web.Response:
    """aiohttp's own refusals, in our words."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _error(f"{request.path}: expected {allowed}, got {request.method}", error.status)
        response.headers["Allow"] = allowed
        return response
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        text = f"expected a body of at most {MAX_BODY_BYTES} bytes, got more; send fewer tokens or hashes"
    elif isinstance(error, web.HTTPNotFound):
        paths = ", ".join(operation.path for operation in OPERATIONS)
        text = f"expected one of {paths}; got {request.path[:100]}"
    elif isinstance(error, web.HTTPUnauthorized):
        response = _error("expected the header `Authorization: Bearer` with the token of this router", 401)
        response.headers["WWW-Authenticate"] = "Bearer"
        return response
    elif isinstance(error, web.HTTPRequestTimeout):
        text = f"expected the whole body within {READ_TIMEOUT_S:g} s; this connection is closed"
        response = _error(text, error.status)
        response.force_close()
        return response
    else:
        text = f"{request.method} {request.path[:100]}: {error.reason}"
    return _error(text, error.status)
