"""The suite that a prefill and a decode engine must pass together, as a class of pytest tests to subclass.

    class TestMyPhases(PhasesConformance):
        received = ("bytes_received",)           # counters of the decode engine

        @pytest.fixture
        def engines(self) -> tuple[Engine, Engine]:
            return MyEngine(prefill_settings), MyEngine(decode_settings)      # built, not started

Both run here as a worker runs them, and what one answers is handed to the other as Dynamo does it: as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from vswa_plugin.engine.contract import WORKER_ONLY, ChunkDict, Engine, EventAdapter, RequestDict
from vswa_plugin.errors import InvalidRequest, RequestError
from vswa_plugin.testing import engine_checks
from vswa_plugin.testing.engine_checks import EngineLife

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "vswa_plugin.testing.phases needs pytest: pip install 'vswa-plugin[test]'; most other modules of "
        "vswa_plugin.testing work without it"
    ) from error

__all__ = [
    "PhasesConformance",
]

#: What no prefill worker of any engine hands over.
FOREIGN: dict[str, Any] = {
    "the fields of another engine": {"disaggregated_params": {"engine": "of somebody else"}},
    "a text": {"disaggregated_params": "where?"},
    "a result that is no object": [1],
}


class PhasesConformance:
    """Tests for two engines of one kind, of the modes ``prefill`` and ``decode``.

    A subclass gives the fixture ``engines``. Mode ``agg`` is for ``EngineConformance``.

    :cvar prompt: token ids that the model knows: more than two blocks, of which the last is not full.
    :cvar long_answer: tokens of an answer that is long enough to be interrupted, within the context.
    :cvar timeout_s: how long any one thing may take; less than a prefill engine waits for a decode engine.
    :cvar held: beginnings of the names of gauges in ``stats()`` that fall back when a request is gone.
    :cvar waiting: of the prefill engine, beginnings of those that count what waits for a decode engine;
        empty: it does not say.
    :cvar received: beginnings of the names of totals in the decode engine's ``stats()`` that grow with what
        it receives; empty: nothing really moves, or it does not say.
    :cvar announces: whether the engines announce KV events.
    """

    prompt: ClassVar[Sequence[int]] = range(300, 380)
    long_answer: ClassVar[int] = 160
    timeout_s: ClassVar[float] = 20.0
    held: ClassVar[tuple[str, ...]] = ("running", "waiting", "blocks_used")
    waiting: ClassVar[tuple[str, ...]] = ()
    received: ClassVar[tuple[str, ...]] = ()
    announces: ClassVar[bool] = True

    @pytest.fixture
    def engines(self) -> tuple[Engine, Engine]:
        """A prefill and a decode engine that are built and not started; each test starts and stops them."""
        raise NotImplementedError(
            "expected the subclass to have a fixture `engines` that returns two Engines"
        )

    @pytest.fixture
    def pair(self, engines: tuple[Engine, Engine]) -> Iterator[tuple[EngineLife, EngineLife]]:
        """Both, started."""
        prefill, decode = (EngineLife(engine, self.timeout_s) for engine in engines)
        try:
            prefill.start()
            decode.start()
            yield prefill, decode
        finally:
            try:
                decode.close()
            finally:
                prefill.close()

    def request(self, prompt: Sequence[int], max_tokens: int = 4) -> dict[str, Any]:
        """A request in Dynamo's shape; override it where the model needs more."""
        return engine_checks.plain_request(prompt, max_tokens)

    def new_adapter(self, engine: Engine) -> EventAdapter:
        """Reads an engine's events: the installed plugin for its format, unless overridden."""
        return engine_checks.installed_adapter(engine)

    # -- prefill -----------------------------------------------------------------------------------

    def test_what_both_state_is_complete_and_their_blocks_are_of_one_layout(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        for life in pair:
            engine_checks.check_info(life.engine)
        prefill, decode = (life.engine.info.layout for life in pair)

        assert prefill.groups == decode.groups, "blocks of other windows or sizes cannot be handed over"

    def test_prefill_answers_one_token_and_what_decode_goes_on_with(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        chunks = pair[0].answer(self.request(self.prompt, 5))

        engine_checks.check_answer(chunks, len(self.prompt), most=1, cold=True)
        _token_of(chunks)
        _handed_over(chunks)

    def test_prefill_refuses_what_another_prefill_engine_has_computed(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        request = self.request(self.prompt)
        handed = _handed_over(pair[0].answer(request))
        with pytest.raises(InvalidRequest):
            pair[0].answer({**request, "prefill_result": handed})

    # -- decode ------------------------------------------------------------------------------------

    def test_decode_goes_on_behind_the_token_of_prefill(self, pair: tuple[EngineLife, EngineLife]) -> None:
        request = self.request(self.prompt)
        answers = []
        for cold in (True, False):
            first, chunks = self._both(pair, request)
            engine_checks.check_answer(chunks, len(self.prompt), most=4, cold=cold)
            tokens = [token for chunk in chunks for token in chunk["token_ids"]]
            assert tokens[:1] == [first], (
                f"expected the token of prefill, {first}, to come first, got {tokens}"
            )
            answers.append(tokens)

        assert answers[0] == answers[1], "the same prompt, handed over twice, was answered in two ways"

    def test_what_decode_says_it_received_has_come(self, pair: tuple[EngineLife, EngineLife]) -> None:
        before = pair[1].gauges(self.received)
        _, chunks = self._both(pair, self.request(self.prompt))
        claimed = _transferred(chunks)
        after = pair[1].gauges(self.received)

        assert 0 < claimed <= len(self.prompt), (
            f"expected the first chunk to say in {WORKER_ONLY}.transferred_tokens that 1 to "
            f"{len(self.prompt)} tokens were received, got {claimed}"
        )
        if self.received:
            assert sum(after.values()) > sum(before.values()), (
                f"{claimed} tokens were received, it says; but of these nothing grew in stats(): {after}"
            )

    def test_decode_claims_nothing_of_a_prefill_engine_that_has_gone(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        if not self.received:
            pytest.skip("nothing really moves between these engines")
        request = self.request(self.prompt)
        handed = _handed_over(pair[0].answer(request))
        pair[0].stop()
        chunks: list[ChunkDict] = []
        with suppress(RequestError):  # another worker may do it
            chunks = pair[1].answer({**request, "prefill_result": handed})

        if chunks:
            engine_checks.check_answer(chunks, len(self.prompt), most=4, cold=True)
            assert 0 == _transferred(chunks), "tokens were received of an engine that has stopped, it says"

    @pytest.mark.parametrize("case", FOREIGN)
    def test_decode_refuses_what_is_no_result_of_prefill_and_serves_on(
        self, pair: tuple[EngineLife, EngineLife], case: str
    ) -> None:
        request = self.request(self.prompt)
        with pytest.raises(InvalidRequest):
            pair[1].answer({**request, "prefill_result": FOREIGN[case]})

        _, chunks = self._both(pair, request)
        engine_checks.check_answer(chunks, len(self.prompt), most=4)

    # -- what is given back --------------------------------------------------------------------------

    def test_a_prompt_is_held_until_it_is_fetched_and_no_longer(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        before = [life.gauges(self.held + self.waiting) for life in pair]
        request = self.request(self.prompt)
        handed = _handed_over(pair[0].answer(request))
        holding, free = pair[0].gauges(self.waiting), _only(before[0], self.waiting)
        assert not self.waiting or sum(holding.values()) > sum(free.values()), (
            f"expected these gauges of stats() to count a prompt that waits for decode, got {holding}"
        )
        pair[1].answer({**request, "prefill_result": handed})

        self._given_back(pair, before)

    def test_closing_a_decode_request_gives_back_what_both_held(
        self, pair: tuple[EngineLife, EngineLife]
    ) -> None:
        before = [life.gauges(self.held + self.waiting) for life in pair]
        request = self.request(self.prompt, self.long_answer)
        handed = _handed_over(pair[0].answer(request))
        pair[1].closed_early({**request, "prefill_result": handed})

        self._given_back(pair, before)

    def test_stopping_prefill_does_not_wait_for_decode(self, pair: tuple[EngineLife, EngineLife]) -> None:
        pair[0].answer(self.request(self.prompt))
        pair[0].stop()

    # -- events ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("phase", ["prefill", "decode"])
    def test_the_events_of_each_say_what_it_holds_of_the_prompt(
        self, pair: tuple[EngineLife, EngineLife], phase: str
    ) -> None:
        if not self.announces:
            pytest.skip("the engines announce no events")
        for _ in range(2):
            self._both(pair, self.request(self.prompt))
        for life in reversed(pair):
            life.stop()

        engine_checks.check_events(pair[phase == "decode"], self.new_adapter, self.prompt)

    # -- inside ------------------------------------------------------------------------------------

    def _both(self, pair: tuple[EngineLife, EngineLife], request: RequestDict) -> tuple[int, list[ChunkDict]]:
        """The token of prefill, and the chunks of decode."""
        chunks = pair[0].answer(request)
        handed = _handed_over(chunks)
        return _token_of(chunks), pair[1].answer({**request, "prefill_result": handed})

    def _given_back(self, pair: tuple[EngineLife, EngineLife], before: Sequence[dict[str, float]]) -> None:
        """Both hold what they held, without a further request: an engine that idles must let go too."""
        for life, held, phase in zip(pair, before, ("prefill", "decode"), strict=True):
            now = life.settled(self.held + self.waiting, held)
            assert held == now, f"{phase}: expected what was held before the request, {held}, got {now}"


def _only(gauges: dict[str, float], beginnings: tuple[str, ...]) -> dict[str, float]:
    return {name: value for name, value in gauges.items() if name.startswith(beginnings)}


def _token_of(chunks: Sequence[ChunkDict]) -> int:
    tokens: list[int] = [token for chunk in chunks for token in chunk["token_ids"]]
    assert len(tokens) == 1, f"expected one token of prefill, got {len(tokens)}"
    return tokens[0]


def _handed_over(chunks: Sequence[ChunkDict]) -> dict[str, Any]:
    """``prefill_result`` for the decode engine, through JSON."""
    params = chunks[-1].get("disaggregated_params")
    assert params, "expected disaggregated_params in the last chunk of prefill, for the decode engine"
    try:
        carried = json.loads(json.dumps(params, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"disaggregated_params: expected JSON, which Dynamo carries: {error}") from error
    assert carried == params, "disaggregated_params: JSON makes something else of it"
    return {"disaggregated_params": carried}


def _transferred(chunks: Sequence[ChunkDict]) -> int:
    """What the decode engine says it received, in tokens."""
    stated = (chunks[0].get(WORKER_ONLY) or {}).get("transferred_tokens", 0)
    assert type(stated) is int, f"{WORKER_ONLY}.transferred_tokens: expected a number, got {stated!r}"
    return stated
