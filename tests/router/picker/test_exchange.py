"""One request as Envoy tells of it, against a real Decider: what goes back, and what counts as load when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from tests.e2e_helpers import eventually
from tests.router_http_helpers import PROMPT, A, Api, B, entry_of, run, stored
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.dynamo.preprocess import NotRead
from vswa_plugin.errors import Unavailable
from vswa_plugin.router import reservations
from vswa_plugin.router.picker.destinations import Destinations
from vswa_plugin.router.picker.exchange import (
    BUFFERED,
    FULL_DUPLEX,
    NOT_SENT,
    STREAMED,
    Exchange,
    Gateway,
)
from vswa_plugin.router.picker.messages import ProcessingRequest, ProcessingResponse
from vswa_plugin.router.picker.picker import Picker
from vswa_plugin.router.picker.reports import Reports
from vswa_plugin.router.picks import PickerCounts
from vswa_plugin.selection import Load
from vswa_plugin.wire.events import Rank, ReuseReport

COMPLETIONS = "/v1/completions"
WORKER, RANK = "x-dynamo-worker-instance-id", "x-dynamo-dp-rank"
Answer = dict[str, Any]


class Tokens:
    """Stands for Dynamo's preprocessor: each prompt is PROMPT."""

    def __init__(self) -> None:
        self.raises: Exception | None = None
        self.hold: asyncio.Event | None = None

    async def token_ids(self, path: str, body: Mapping[str, msgspec.Raw]) -> Sequence[int]:
        if self.hold is not None:
            await self.hold.wait()
        if self.raises is not None:
            raise self.raises
        return PROMPT


class Envoy:
    """The other side of one stream."""

    def __init__(self, side: Side, mode: int = BUFFERED, response_mode: int = NOT_SENT) -> None:
        self.answers: list[Any] = []
        self.finished: tuple[int, str] | None = None
        self._modes = {"request_body_mode": mode, "response_body_mode": response_mode}
        self.exchange: Exchange = side.gateway.opened(self)  # type: ignore[arg-type]

    def send(self, *messages: bytes) -> None:
        self.answers += map(ProcessingResponse.FromString, messages)

    def finish(self, status: int = 0, reason: str = "") -> None:
        self.finished = status, reason

    def tell(self, **message: Any) -> None:
        self.exchange.received(ProcessingRequest(protocol_config=self._modes, **message).SerializeToString())

    def headers(self, path: str = COMPLETIONS, method: str = "POST", end: bool = False, **more: str) -> None:
        named = {":path": path, ":method": method, **{name.replace("_", "-"): v for name, v in more.items()}}
        listed = [{"key": name, "raw_value": value.encode()} for name, value in named.items()]
        self.tell(request_headers={"headers": {"headers": listed}, "end_of_stream": end})

    def body(self, end: bool = False, **fields: Any) -> None:
        body = json.dumps({"model": "m", "prompt": "Hi", **fields}).encode()
        self.tell(request_body={"body": body, "end_of_stream": end})

    def status(self, code: int) -> None:
        listed = [{"key": ":status", "raw_value": str(code).encode()}]
        self.tell(response_headers={"headers": {"headers": listed}})

    async def answered(self, count: int) -> None:
        await eventually(lambda: len(self.answers) >= count or self.finished, f"{count} answers")

    async def picked(self, **fields: Any) -> None:
        """Headers and body have gone on."""
        self.headers()
        self.body(**fields)
        await self.answered(2)


class Side:
    """A gateway over the workers of ``Api``."""

    def __init__(self, api: Api, destinations: Sequence[str] = (), ttl_s: float = 60) -> None:
        self.tokens, self.now = Tokens(), 0.0
        self.reports = Reports(api.promises, lambda: self.now)
        counts = PickerCounts()
        picker = Picker(api.choices, self.tokens, namespaced_sequence_hashes, self.reports, counts, ttl_s)
        self.destinations = Destinations(destinations)
        self.gateway = Gateway(picker, self.destinations)

    @property
    def outcomes(self) -> dict[tuple[str, str], int]:
        return dict(self.gateway.picker.counts.outcomes)


def pins(answer: Any, kind: str = "request_body") -> dict[str, str]:
    mutation = getattr(answer, kind).response.header_mutation
    return {each.header.key: each.header.raw_value.decode() for each in mutation.set_headers}


def removed(answer: Any, kind: str = "request_headers") -> list[str]:
    return list(getattr(answer, kind).response.header_mutation.remove_headers)


def with_side(body: Callable[[Api, Side], Any], **options: Any) -> Any:
    async def whole() -> Any:
        async with Api() as api:
            await api.all_live()
            await api.holds(B, stored(sliding=[3, 4], whole=range(5)))
            side = Side(api, **options)
            found = await body(api, side)
            return found

    return run(whole())


def test_a_request_is_pinned_to_the_rank_that_reuses_most_and_counts_as_load_until_its_answer_ends() -> None:
    async def body(api: Api, side: Side) -> tuple[dict[str, str], list[Load]]:
        envoy = Envoy(side)
        await envoy.picked()
        loads = [api.book.load(B)]
        envoy.status(200)
        loads.append(api.book.load(B))
        envoy.exchange.closed()
        loads.append(api.book.load(B))
        assert {("m", "picked"): 1} == side.outcomes
        assert 0 == side.gateway.picker.counts.under_way == len(api.choices.reservations)
        assert [True] * 3 == [a.HasField(k) for a, k in zip(envoy.answers, KINDS, strict=True)]
        return pins(envoy.answers[1]), loads

    found, loads = with_side(body)

    assert {WORKER: "2", RANK: "0"}.items() <= found.items()
    assert 36 == len(found.pop("x-dynamo-request-id"))
    assert {WORKER, RANK} == found.keys()
    assert [Load(8, 50, 1), Load(8, 0, 1), Load()] == loads


KINDS = ("request_headers", "request_body", "response_headers")


def test_headers_of_clients_that_would_pin_the_request_are_removed_before_ours_are_set() -> None:
    async def body(api: Api, side: Side) -> tuple[list[str], dict[str, str]]:
        envoy = Envoy(side)
        envoy.headers(x_worker_instance_id="1", x_dynamo_dp_rank="1", x_dynamo_meta_a="b", accept="c")
        envoy.body()
        await envoy.answered(2)
        return removed(envoy.answers[0]), pins(envoy.answers[1])

    gone, found = with_side(body)

    assert ["x-worker-instance-id", "x-dynamo-dp-rank"] == gone
    assert "2" == found[WORKER]


def test_in_full_duplex_nothing_goes_on_before_the_whole_body_has_come_and_then_all_of_it_does() -> None:
    text = "x" * 130_000

    async def body(api: Api, side: Side) -> tuple[int, list[Any]]:
        envoy = Envoy(side, FULL_DUPLEX)
        envoy.headers(x_dp_rank="1")
        whole = json.dumps({"model": "m", "prompt": text}).encode()
        for at in range(0, len(whole), 50_000):
            envoy.tell(request_body={"body": whole[at : at + 50_000]})
        early = len(envoy.answers)
        envoy.tell(request_body={"end_of_stream": True})
        await envoy.answered(4)
        assert whole == b"".join(
            each.request_body.response.body_mutation.streamed_response.body for each in envoy.answers[1:]
        )
        return early, envoy.answers

    early, answers = with_side(body)

    assert 0 == early
    assert "2" == pins(answers[0], "request_headers")[WORKER]
    assert ["x-dp-rank"] == removed(answers[0])
    ends = [each.request_body.response.body_mutation.streamed_response.end_of_stream for each in answers[1:]]
    assert [False, False, True] == ends
    assert all(len(each.SerializeToString()) < 64 << 10 for each in answers), (
        "what Envoy takes in one message"
    )


def test_a_body_that_ends_with_trailers_is_whole_then_and_they_follow_it() -> None:
    async def body(api: Api, side: Side) -> list[Any]:
        envoy = Envoy(side, FULL_DUPLEX)
        envoy.headers()
        envoy.body()
        envoy.tell(request_trailers={})
        await envoy.answered(3)
        return envoy.answers

    headers, sent, trailers = with_side(body)

    assert "2" == pins(headers, "request_headers")[WORKER]
    assert not sent.request_body.response.body_mutation.streamed_response.end_of_stream
    assert trailers.HasField("request_trailers")


@pytest.mark.parametrize("mode", [STREAMED, FULL_DUPLEX])
def test_where_the_answers_body_is_sent_its_first_byte_ends_prefill_not_its_headers(mode: int) -> None:
    async def body(api: Api, side: Side) -> list[int]:
        envoy = Envoy(side, BUFFERED, mode)
        await envoy.picked()
        waiting = []
        envoy.status(200)
        waiting.append(api.book.load(B).prefill_tokens)
        envoy.tell(response_body={"body": b""})
        waiting.append(api.book.load(B).prefill_tokens)
        envoy.tell(response_body={"body": b"data"})
        waiting.append(api.book.load(B).prefill_tokens)
        streamed = envoy.answers[-1].response_body.response.body_mutation.streamed_response.body
        assert (b"data" if mode == FULL_DUPLEX else b"") == streamed
        return waiting

    assert [50, 50, 0] == with_side(body)


@pytest.mark.parametrize(
    ("headers", "mode"),
    [
        ({"path": "/v1/models", "method": "GET", "end": True}, BUFFERED),
        ({"path": "/v1/embeddings"}, BUFFERED),
        ({"method": "GET", "end": True}, BUFFERED),
        ({}, NOT_SENT),
        ({}, STREAMED),
        ({"path": "/v1/embeddings"}, FULL_DUPLEX),
    ],
)
def test_what_is_not_chosen_for_passes_without_pins_of_anybody(headers: dict[str, Any], mode: int) -> None:
    async def body(api: Api, side: Side) -> list[Any]:
        envoy = Envoy(side, mode)
        envoy.headers(**headers, x_dp_rank="1")
        if not headers.get("end") and mode != NOT_SENT:
            envoy.body(end=True)
        assert {("other", "passed"): 1} == side.outcomes
        assert Load() == api.book.load(B)
        return envoy.answers

    first, *rest = with_side(body)

    assert ["x-dp-rank"] == removed(first)
    assert {} == pins(first, "request_headers")
    if mode == FULL_DUPLEX:
        assert b"Hi" in rest[0].request_body.response.body_mutation.streamed_response.body


@pytest.mark.parametrize("error", [NotRead(400, "no"), None])
def test_what_the_frontend_will_refuse_goes_on_to_it(error: Exception | None) -> None:
    async def body(api: Api, side: Side) -> Any:
        side.tokens.raises = error
        envoy = Envoy(side)
        await envoy.picked(**({} if error else {"nvext": 7}))
        assert {("other", "passed"): 1} == side.outcomes
        return envoy.answers[1]

    answer = with_side(body)

    assert answer.HasField("request_body")
    assert {} == pins(answer)


def refusal(answer: Any) -> tuple[int, dict[str, Any]]:
    return answer.immediate_response.status.code, json.loads(answer.immediate_response.body)


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"model": "x"}, 404, "model: unknown model 'x'. Known: m"),
        ({"nvext": {"backend_instance_id": 9}}, 400, "backend_instance_id"),
        ({"nvext": {"routing_constraints": {"required_taints": 1}}}, 400, "routing"),
        ({"nvext": {"routing_constraints": {"required_taints": ["gold"]}}}, 503, "gold"),
        ({"cache_salt": "\ud800"}, None, ""),
    ],
)
def test_a_request_that_cannot_be_served_is_answered_with_its_status_and_the_reason(
    fields: dict[str, Any], code: int | None, reason: str
) -> None:
    async def body(api: Api, side: Side) -> Any:
        envoy = Envoy(side)
        await envoy.picked(**fields)
        envoy.exchange.closed()
        assert Load() == api.book.load(B)
        return envoy.answers[1]

    answer = with_side(body)

    if code is None:  # no text at all, which the frontend says better
        assert answer.HasField("request_body")
        return
    found, told = refusal(answer)
    assert code == found == told["code"]
    assert reason in told["message"]


def test_a_model_that_has_lost_its_workers_is_unavailable_and_one_that_never_was_is_unknown() -> None:
    async def body(api: Api, side: Side) -> list[int]:
        first = Envoy(side)
        await first.picked()
        api.fleet.entries.clear()
        api.enter(entry_of(7, model="other"))
        codes = []
        for model in ("m", "never"):
            envoy = Envoy(side)
            await envoy.picked(model=model)
            codes.append(refusal(envoy.answers[1])[0])
        return codes

    assert [503, 404] == with_side(body)


def test_too_many_requests_are_refused_with_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "MAX_RESERVATIONS", 1)

    async def body(api: Api, side: Side) -> int:
        first, second = Envoy(side), Envoy(side)
        await first.picked()
        await second.picked()
        assert {("m", "picked"): 1, ("other", "unavailable"): 1} == side.outcomes
        return refusal(second.answers[1])[0]

    assert 429 == with_side(body)


@pytest.mark.parametrize("error", [Unavailable("gone"), ZeroDivisionError("a bug")])
def test_where_the_picker_itself_fails_the_gateways_own_failure_mode_decides(error: Exception) -> None:
    async def body(api: Api, side: Side) -> tuple[Any, dict[tuple[str, str], int]]:
        side.tokens.raises = error
        envoy = Envoy(side)
        await envoy.picked()
        return envoy.finished, side.outcomes

    finished, outcomes = with_side(body)

    assert finished[0] in (13, 14)
    assert {("other", "failed"): 1} == outcomes


def test_a_client_that_goes_while_its_worker_is_chosen_leaves_no_load() -> None:
    async def body(api: Api, side: Side) -> dict[tuple[str, str], int]:
        side.tokens.hold = asyncio.Event()
        envoy = Envoy(side)
        envoy.headers()
        envoy.body()
        await asyncio.sleep(0)
        envoy.exchange.closed()
        side.tokens.hold.set()
        assert envoy.exchange._picking is not None
        await asyncio.wait({envoy.exchange._picking})
        assert Load() == api.book.load(B)
        assert 0 == len(api.choices.reservations) == side.gateway.picker.counts.under_way
        return side.outcomes

    assert {("other", "gone"): 1} == with_side(body)


def test_a_request_that_goes_on_for_ever_is_load_for_its_time_only() -> None:
    async def body(api: Api, side: Side) -> dict[tuple[str, str], int]:
        envoy = Envoy(side)
        await envoy.picked()
        await eventually(lambda: api.book.load(B) == Load(), "its time is over")
        envoy.status(200)
        envoy.exchange.closed()
        return dict(api.choices.reservations.ended)

    assert {("m", "ttl"): 1} == with_side(body, ttl_s=0.02)


def test_a_worker_whose_answer_is_503_is_avoided_and_its_request_is_no_load_any_more() -> None:
    async def body(api: Api, side: Side) -> tuple[Load, str]:
        envoy = Envoy(side)
        await envoy.picked()
        envoy.status(503)
        load = api.book.load(B)
        again = Envoy(side)
        await again.picked()
        return load, pins(again.answers[1])[WORKER]

    assert (Load(), "1") == with_side(body)


def test_a_report_of_the_chosen_rank_is_compared_with_the_promise_whenever_it_comes() -> None:
    async def body(api: Api, side: Side) -> Any:
        for report_first in (True, False):
            envoy = Envoy(side)
            await envoy.picked()
            request_id = pins(envoy.answers[1])["x-dynamo-request-id"]
            report = ReuseReport(request_id, 130, 80)
            side.reports.received(A, ReuseReport(request_id, 130, 0))  # another rank's is none
            side.reports.received(B, ReuseReport("another chooser's", 130, 80))
            if report_first:
                side.reports.received(B, report)
            envoy.exchange.closed()
            side.reports.received(B, report)
        unreported, failed = Envoy(side), Envoy(side)
        await unreported.picked()
        await failed.picked()
        failed.status(500)
        unreported.exchange.closed()
        failed.exchange.closed()
        side.now = 31.0
        side.reports.expire()
        assert 0 == len(side.reports)
        return api.promises.ranks

    ranks = with_side(body)

    assert {B} == set(ranks)
    assert (2, 0, 0, 1) == (ranks[B].exact, ranks[B].over, ranks[B].under, ranks[B].unreported)


def test_prefill_and_decode_workers_are_pinned_together() -> None:
    async def body(api: Api, side: Side) -> tuple[dict[str, str], list[int]]:
        api.fleet.entries.clear()
        api.enter(entry_of(1, mode="prefill"), entry_of(2, mode="decode"))
        envoy = Envoy(side)
        await envoy.picked()
        requests = [api.book.load(Rank(1)).requests, api.book.load(Rank(2)).requests]
        envoy.status(200)
        requests += [api.book.load(Rank(1)).requests, api.book.load(Rank(2)).requests]
        return pins(envoy.answers[1]), requests

    found, requests = with_side(body)

    assert [1, 1, 0, 1] == requests
    assert {
        WORKER: "2",
        RANK: "0",
        "x-dynamo-prefill-instance-id": "1",
        "x-dynamo-prefill-dp-rank": "0",
    }.items() <= found.items()


@pytest.mark.parametrize("mode", [BUFFERED, FULL_DUPLEX])
def test_the_endpoint_is_named_where_the_gateway_leaves_it_to_the_picker(mode: int) -> None:
    async def body(api: Api, side: Side) -> list[tuple[str, str]]:
        await side.destinations.look_up()
        found = []
        for subset in ([], [], ["10.0.0.9:80"]):
            envoy = Envoy(side, mode)
            listed = [{"key": ":path", "value": COMPLETIONS}, {"key": ":method", "value": "POST"}]
            request = ProcessingRequest(request_headers={"headers": {"headers": listed}})
            request.protocol_config.request_body_mode = mode
            if subset:
                hint = {"x-gateway-destination-endpoint-subset": subset}
                request.metadata_context.filter_metadata["envoy.lb.subset_hint"].update(hint)
            envoy.exchange.received(request.SerializeToString())
            envoy.body(end=True)
            await envoy.answered(2)
            kind, at = ("request_headers", 0) if mode == FULL_DUPLEX else ("request_body", 1)
            named = envoy.answers[at].dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"]
            found.append((pins(envoy.answers[at], kind)["x-gateway-destination-endpoint"], named))
        return found

    frontends = ("10.0.0.1:80", "10.0.0.2:80")
    found = with_side(body, destinations=frontends)

    assert [frontends[1], frontends[0], "10.0.0.9:80"] == [header for header, _ in found]
    assert all(header == metadata for header, metadata in found)


def test_a_message_that_is_none_ends_the_stream() -> None:
    async def body(api: Api, side: Side) -> Any:
        envoy = Envoy(side)
        envoy.exchange.received(b"\xff")
        return envoy.finished

    code, reason = with_side(body)

    assert 13 == code
    assert "expected a ProcessingRequest" in reason
