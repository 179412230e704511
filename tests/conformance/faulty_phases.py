"""Two stand-in engines that hand prompts over by ticket, and changes to them with one fault each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

import msgspec
import pytest

from tests.conformance import faulty_engines
from tests.conformance.faulty_engines import LeakingWhenClosed
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.engine.contract import WORKER_ONLY, ChunkDict, Engine, EventSink, RequestDict
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.testing.engine import StandinEngine, standin_settings
from vswa_plugin.testing.phases import PhasesConformance


class Handover:
    """Prompts that wait to be fetched, as a server of a prefill engine has them."""

    def __init__(self) -> None:
        self.offered = 0
        self.kept: dict[int, int] = {}
        self.open = True

    def keep(self, tokens: int) -> int:
        self.offered += 1
        self.kept[self.offered] = tokens
        return self.offered

    def fetch(self, ticket: int) -> int:
        """The tokens of that prompt, once; 0: it is not there."""
        return self.kept.pop(ticket, 0) if self.open else 0


class Prefill(StandinEngine):
    def __init__(self, handover: Handover) -> None:
        super().__init__(standin_settings("prefill", cache=True))
        self.handover = handover

    def stop(self) -> None:
        super().stop()
        self.handover.open = False
        self.handover.kept.clear()

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "kept": float(len(self.handover.kept))}

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                if "disaggregated_params" in chunk:
                    ticket = self.handover.keep(len(request["token_ids"]))
                    cached = chunk["completion_usage"]["prompt_tokens_details"]["cached_tokens"]
                    chunk["disaggregated_params"] |= {"ticket": ticket, "cached": cached}
                yield chunk


class Decode(StandinEngine):
    def __init__(self, handover: Handover) -> None:
        super().__init__(standin_settings("decode", cache=True))
        self.handover = handover
        self.received = 0

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "received": float(self.received)}

    def fetch(self, params: Any) -> int:
        tokens = self.handover.fetch(params["ticket"])
        self.received += tokens
        return tokens

    def cached(self, params: Any, tokens: int) -> int:
        return int(params["cached"]) if tokens else 0

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        chunks, tokens, params = super().generate(request), 0, None
        try:
            first = await anext(chunks)  # refuses what it must
            params = request["prefill_result"]["disaggregated_params"]
            tokens = self.fetch(params)
            yield self._usage({**first, WORKER_ONLY: {"transferred_tokens": tokens}}, params, tokens)
            async for chunk in chunks:
                yield self._usage(chunk, params, tokens)
        finally:
            await chunks.aclose()

    def _usage(self, chunk: ChunkDict, params: Any, tokens: int) -> ChunkDict:
        if "completion_usage" in chunk:
            cached = self.cached(params, tokens)
            chunk["completion_usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        return chunk


class StandinPhases(PhasesConformance):
    timeout_s = 2.0
    waiting = ("kept",)
    received = ("received",)
    kinds: ClassVar[tuple[type[Prefill], type[Decode]]] = (Prefill, Decode)

    @pytest.fixture
    def engines(self) -> tuple[Engine, Engine]:
        handover = Handover()
        prefill, decode = self.kinds
        return prefill(handover), decode(handover)


class FaultyPrefill(Prefill):
    #: The test that must fail, without ``test_``, and a part of what it says.
    caught_by: ClassVar[tuple[str, str]]


class FaultyDecode(Decode):
    caught_by: ClassVar[tuple[str, str]]


class HasOtherBlocks(FaultyDecode):
    caught_by = ("what_both_state_is_complete_and_their_blocks_are_of_one_layout", "cannot be handed over")

    def __init__(self, handover: Handover) -> None:
        super().__init__(handover)
        layout = msgspec.structs.replace(self.info.layout, groups=(CacheGroup(0, None, 64),))
        self.info = msgspec.structs.replace(self.info, layout=layout)


class ChangingPrefill(FaultyPrefill):
    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield self.changed(chunk)

    def changed(self, chunk: ChunkDict) -> ChunkDict:
        return chunk


class HandsNothingOver(ChangingPrefill):
    caught_by = ("prefill_answers_one_token_and_what_decode_goes_on_with", "expected disaggregated_params")

    def changed(self, chunk: ChunkDict) -> ChunkDict:
        return {name: value for name, value in chunk.items() if name != "disaggregated_params"}


class HandsOverWhatIsNoJson(ChangingPrefill):
    caught_by = ("prefill_answers_one_token_and_what_decode_goes_on_with", "expected JSON")

    def changed(self, chunk: ChunkDict) -> ChunkDict:
        return {**chunk, "disaggregated_params": {"state": b"where"}}


class AnswersMoreThanOneToken(ChangingPrefill):
    caught_by = ("prefill_answers_one_token_and_what_decode_goes_on_with", "at most 1 tokens")

    def changed(self, chunk: ChunkDict) -> ChunkDict:
        return {**chunk, "token_ids": [1, 2]}


class ComputesWhatIsComputed(FaultyPrefill):
    caught_by = ("prefill_refuses_what_another_prefill_engine_has_computed", "DID NOT RAISE")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async with aclosing(super().generate({**request, "prefill_result": None})) as chunks:
            async for chunk in chunks:
                yield chunk


class DrawsTheFirstTokenAgain(FaultyDecode):
    caught_by = ("decode_goes_on_behind_the_token_of_prefill", "expected the token of prefill")

    def _token(self, *arguments: Any) -> int:
        return super()._token(*arguments) + 1


class AnswersInTwoWays(FaultyDecode):
    caught_by = ("decode_goes_on_behind_the_token_of_prefill", "was answered in two ways")
    requests = 0

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        self.requests += 1
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                if "finish_reason" in chunk:
                    chunk = {**chunk, "token_ids": [self.requests]}
                yield chunk


class CountsTheTransferAsCached(FaultyDecode):
    """As engines do that take what was handed over for a hit: the client would see all of it as reused."""

    caught_by = ("decode_goes_on_behind_the_token_of_prefill", "cached_tokens: expected 0 to 79, got 80")

    def cached(self, params: Any, tokens: int) -> int:
        return tokens


class ComputesAnewAndSaysItReceived(FaultyDecode):
    """It lets the prefill engine's blocks go, and computes the prompt."""

    caught_by = ("what_decode_says_it_received_has_come", "nothing grew in stats()")

    def fetch(self, params: Any) -> int:
        return self.handover.fetch(params["ticket"])


class ComputesAnewAndSaysNothing(FaultyDecode):
    caught_by = ("what_decode_says_it_received_has_come", "got 0")

    def fetch(self, params: Any) -> int:
        self.handover.fetch(params["ticket"])
        return 0


class ClaimsWhatHasGone(FaultyDecode):
    caught_by = ("decode_claims_nothing_of_a_prefill_engine_that_has_gone", "of an engine that has stopped")

    def fetch(self, params: Any) -> int:
        return super().fetch(params) or 80


class WaitsForOneThatHasGone(FaultyDecode):
    caught_by = ("decode_claims_nothing_of_a_prefill_engine_that_has_gone", "did not end within")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        if not self.handover.open:
            await asyncio.Event().wait()
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


class TakesAnyResult(FaultyDecode):
    caught_by = ("decode_refuses_what_is_no_result_of_prefill_and_serves_on", "DID NOT RAISE")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        try:
            async with aclosing(super().generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except InvalidRequest:
            yield {"token_ids": [1], "index": 0, "finish_reason": "length"}


class LeavesItsTicket(FaultyDecode):
    """It has read the blocks, and never says that it has them."""

    caught_by = (
        "a_prompt_is_held_until_it_is_fetched_and_no_longer",
        "prefill: expected what was held before",
    )

    def fetch(self, params: Any) -> int:
        tokens = self.handover.kept.get(params["ticket"], 0)
        self.received += tokens
        return tokens


class CountsNothingThatWaits(FaultyPrefill):
    caught_by = ("a_prompt_is_held_until_it_is_fetched_and_no_longer", "to count a prompt that waits")

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "kept": 0.0}


class KeepsWhatWasFetched(FaultyPrefill):
    caught_by = (
        "a_prompt_is_held_until_it_is_fetched_and_no_longer",
        "prefill: expected what was held before",
    )

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "blocks_used": float(self.handover.offered)}


class LeavesItsTicketWhenItIsClosed(FaultyDecode):
    """What is fetched in the end is not, where there is no end."""

    caught_by = (
        "closing_a_decode_request_gives_back_what_both_held",
        "prefill: expected what was held before",
    )

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                if "finish_reason" in chunk:
                    super().fetch(request["prefill_result"]["disaggregated_params"])
                yield chunk

    def fetch(self, params: Any) -> int:
        return self.handover.kept.get(params["ticket"], 0)


class FreesNothingWhenItIsClosed(LeakingWhenClosed, FaultyDecode):
    caught_by = (
        "closing_a_decode_request_gives_back_what_both_held",
        "decode: expected what was held before",
    )


class WaitsForDecodeAsItStops(FaultyPrefill):
    caught_by = ("stopping_prefill_does_not_wait_for_decode", "stop() did not end within")

    def stop(self) -> None:
        if self.handover.kept:
            threading.Event().wait()
        super().stop()


class AnnouncesNothingOfWhatItReceived(FaultyDecode):
    caught_by = ("the_events_of_each_say_what_it_holds_of_the_prompt", "expected all 2 full blocks")

    def start(self, on_events: EventSink) -> None:
        def without(rank: int, events: Sequence[Any]) -> None:
            on_events(rank, [each for each in events if each["data"]["type"] != "stored"])

        super().start(without)


def all_faulty() -> list[type[Any]]:
    """All that are listed with a test."""
    return [*faulty_engines.all_faulty(FaultyPrefill), *faulty_engines.all_faulty(FaultyDecode)]


def _kinds(fault: type[Any]) -> tuple[type[Any], type[Any]]:
    return (fault, Decode) if issubclass(fault, Prefill) else (Prefill, fault)


#: For files of tests: the class by the name of the fault.
SUITES = {
    each.__name__: type(f"Test{each.__name__}", (StandinPhases,), {"kinds": _kinds(each)})
    for each in all_faulty()
}
