"""Engines with one fault each, as changes to the stand-in, with the test that sees it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

import msgspec
import pytest

from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.engine.contract import ChunkDict, Engine, EventSink, RequestDict
from vswa_plugin.errors import InvalidRequest
from vswa_plugin.testing.conformance import EngineConformance
from vswa_plugin.testing.engine import StandinEngine, standin_settings


class Faulty(StandinEngine):
    #: The test that must fail, without ``test_``, and a part of what it says.
    caught_by: ClassVar[tuple[str, str]]

    def __init__(self) -> None:
        super().__init__(standin_settings(cache=True))


def changing(usage: dict[str, Any]) -> type[Faulty]:
    """Its last chunk's usage has these values."""

    class Changing(Faulty):
        async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
            async for chunk in super().generate(request):
                if "completion_usage" in chunk:
                    chunk["completion_usage"].update(usage)
                yield chunk

    return Changing


class LeakingWhenClosed(StandinEngine):
    """With any stand-in: it says that a request whose generator was closed still holds a block."""

    leaked = 0

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        try:
            async for chunk in super().generate(request):
                yield chunk
        except GeneratorExit:
            self.leaked += 1
            raise

    def stats(self) -> dict[str, float]:
        return {**super().stats(), "blocks_used_512": float(self.leaked)}


class StatesNoContext(Faulty):
    caught_by = ("what_it_states_before_the_start_is_complete_and_stays", "context_length")

    def __init__(self) -> None:
        super().__init__()
        self.info = msgspec.structs.replace(self.info, context_length=0)


class ChangesItsLayout(Faulty):
    caught_by = ("what_it_states_before_the_start_is_complete_and_stays", "another one")

    def start(self, on_events: EventSink) -> None:
        layout = msgspec.structs.replace(self.info.layout, groups=(CacheGroup(0, None, 64),))
        self.info = msgspec.structs.replace(self.info, layout=layout)


class HasFailedAllTheTime(Faulty):
    caught_by = ("it_has_not_failed_while_it_serves", "out of order")

    def failure(self) -> str | None:
        return "out of order"


class GivesNoReason(Faulty):
    caught_by = ("an_answer_ends_with_its_reason_and_its_usage", "finish_reason")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async for chunk in super().generate(request):
            yield {key: value for key, value in chunk.items() if key != "finish_reason"}


class GivesNoUsage(Faulty):
    caught_by = ("an_answer_ends_with_its_reason_and_its_usage", "completion_usage")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async for chunk in super().generate(request):
            yield {key: value for key, value in chunk.items() if key != "completion_usage"}


class IgnoresMaxTokens(Faulty):
    caught_by = ("an_answer_ends_with_its_reason_and_its_usage", "at most 4 tokens")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async for chunk in super().generate({**request, "stop_conditions": {"max_tokens": 9}}):
            yield chunk


class MiscountsTokens(changing({"completion_tokens": 1})):  # type: ignore[misc]
    caught_by = ("an_answer_ends_with_its_reason_and_its_usage", "'completion_tokens': 1")


class SaysNothingOfTheCache(changing({"prompt_tokens_details": None})):  # type: ignore[misc]
    caught_by = ("an_answer_ends_with_its_reason_and_its_usage", "cached_tokens")


class CountsTheWholePromptAsCached(changing({"prompt_tokens_details": {"cached_tokens": 80}})):  # type: ignore[misc]
    caught_by = ("a_prompt_that_comes_again_has_cached_tokens_but_never_all", "expected 0 to 79, got 80")


class HasWhatItNeverSaw(changing({"prompt_tokens_details": {"cached_tokens": 32}})):  # type: ignore[misc]
    caught_by = ("a_prompt_that_comes_again_has_cached_tokens_but_never_all", "never seen, got 32")


class MixesRequestsUp(Faulty):
    caught_by = ("requests_at_the_same_time_have_answers_of_their_own", "'prompt_tokens'")
    longest = 0

    def _chunks(self, token: int, prompt_tokens: int, *rest: int) -> Any:
        self.longest = max(self.longest, prompt_tokens)
        yield from super()._chunks(token, self.longest, *rest)


class ServesAnything(Faulty):
    caught_by = ("it_refuses_what_can_never_be_served_and_serves_on", "DID NOT RAISE")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        chunks = super().generate(request)
        try:
            first = await anext(chunks)
        except InvalidRequest:
            yield {"token_ids": [1], "index": 0, "finish_reason": "length"}
            return
        yield first
        async for chunk in chunks:
            yield chunk


class RefusesWithAnErrorOfItsOwn(Faulty):
    caught_by = ("it_refuses_what_can_never_be_served_and_serves_on", "LookupError")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        try:
            async for chunk in super().generate(request):
                yield chunk
        except InvalidRequest as error:
            raise LookupError from error


class StopsServingAfterARefusal(RefusesWithAnErrorOfItsOwn):
    caught_by = ("it_refuses_what_can_never_be_served_and_serves_on", "the engine stops")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        try:
            async for chunk in super().generate(request):
                yield chunk
        except LookupError as error:
            self._stopped = True
            raise InvalidRequest("never") from error


class CutsLongPrompts(Faulty):
    caught_by = ("it_refuses_a_prompt_that_leaves_no_room_for_an_answer", "DID NOT RAISE")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        async for chunk in super().generate({**request, "token_ids": request["token_ids"][:99]}):
            yield chunk


class CountsNoRequests(Faulty):
    caught_by = ("closing_the_generator_frees_what_the_request_held", "count a request that is under way")

    def stats(self) -> dict[str, float]:
        return {"running": 0.0}


class FreesNothingWhenItIsClosed(LeakingWhenClosed, Faulty):
    caught_by = ("closing_the_generator_frees_what_the_request_held", "expected what was held before")


class LeavesRequestsWaiting(Faulty):
    caught_by = ("stopping_ends_the_requests_under_way", "was still waiting")

    async def generate(self, request: RequestDict) -> AsyncGenerator[ChunkDict, None]:
        chunks = super().generate(request)
        yield await anext(chunks)
        await asyncio.Event().wait()


class NeverStops(Faulty):
    caught_by = ("a_stopped_engine_takes_no_requests", "stop() did not end within")

    def stop(self) -> None:
        threading.Event().wait()


class ServesAfterTheStop(Faulty):
    caught_by = ("a_stopped_engine_takes_no_requests", "DID NOT RAISE")

    def stop(self) -> None: ...


class AnnouncesAfterTheStop(Faulty):
    caught_by = ("no_events_come_after_the_stop", "after stop() had returned")

    def stop(self) -> None:
        super().stop()
        threading.Timer(0.01, self._on_events, (0, [{"event_id": 99}])).start()


class AnnouncesNothing(Faulty):
    caught_by = ("its_events_say_what_it_holds_of_the_prompt", "expected events of ranks below 1")

    def start(self, on_events: EventSink) -> None: ...


class AnnouncesForARankThatIsNotThere(Faulty):
    caught_by = ("its_events_say_what_it_holds_of_the_prompt", "got those of [1]")

    def start(self, on_events: EventSink) -> None:
        super().start(lambda rank, events: on_events(1, events))


class AnnouncesWhatItsAdapterCannotRead(Faulty):
    caught_by = ("its_events_say_what_it_holds_of_the_prompt", "its adapter refused events")

    def start(self, on_events: EventSink) -> None:
        super().start(lambda rank, events: on_events(rank, [{**each, "data": 1} for each in events]))


class LosesEvents(Faulty):
    caught_by = ("its_events_say_what_it_holds_of_the_prompt", "the view had to begin again")

    def start(self, on_events: EventSink) -> None:
        super().start(lambda rank, events: on_events(rank, events[1:]))


class AnnouncesOtherTokens(Faulty):
    caught_by = ("its_events_say_what_it_holds_of_the_prompt", "expected all 2 full blocks")

    def _take(self, prompt: Any) -> int:
        return super()._take([token + 1 for token in prompt])


def all_faulty(base: type[Any] = Faulty) -> list[type[Any]]:
    """All that are listed with a test."""
    inside = [each for sub in base.__subclasses__() for each in all_faulty(sub)]
    return [*inside, base] if hasattr(base, "caught_by") else inside


class Suite(EngineConformance):
    timeout_s = 2.0
    faulty: ClassVar[type[Faulty]]

    @pytest.fixture
    def engine(self) -> Engine:
        return self.faulty()


#: For files of tests: the class by the name of the fault.
SUITES = {each.__name__: type(f"Test{each.__name__}", (Suite,), {"faulty": each}) for each in all_faulty()}
