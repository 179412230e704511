"""Suites that an engine or an event adapter must pass, as classes of pytest tests to subclass.

    class TestMyEngine(EngineConformance):
        @pytest.fixture
        def engine(self) -> Engine:
            return MyEngine(settings)            # built, not started

    class TestMyAdapter(EventAdapterConformance):
        layout = CacheLayout(...)
        samples = [...]                          # events of the engine, from its start on

        def new_adapter(self) -> EventAdapter:
            return MyAdapter(self.layout)

What is checked lies in engine_checks.py and adapter_checks.py; here are the tests and what an author can set.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import Engine, EventAdapter, RequestDict
from vswa_plugin.errors import InvalidRequest, Unavailable
from vswa_plugin.testing import adapter_checks, engine_checks
from vswa_plugin.testing.engine_checks import EngineLife

try:
    import pytest
except ImportError as error:
    raise ImportError(
        "vswa_plugin.testing.conformance needs pytest: pip install 'vswa-plugin[test]'; the other modules of "
        "vswa_plugin.testing work without it"
    ) from error

__all__ = [
    "EngineConformance",
    "EventAdapterConformance",
]

#: Changes to a good request -> requests that no engine of mode agg can ever serve.
REFUSED: dict[str, RequestDict] = {
    "an empty prompt": {"token_ids": []},
    "no prompt": {"token_ids": None},
    "a text for a prompt": {"token_ids": "one"},
    "a text for a token": {"token_ids": [1, "2", 3]},
    "a result of a prefill worker": {"prefill_result": {"disaggregated_params": {"token": 1}}},
    "no token to generate": {"stop_conditions": {"max_tokens": 0}},
    "stop conditions that are no object": {"stop_conditions": [1]},
    "a rank below zero": {"routing": {"dp_rank": -1}},
}


class EngineConformance:
    """Tests for one engine of mode ``agg``. A subclass gives the fixture ``engine``.

    :cvar prompt: token ids that the model knows: more than two blocks, of which the last is not full.
    :cvar long_answer: tokens of an answer that is long enough to be interrupted, within the context.
    :cvar timeout_s: how long any one thing may take.
    :cvar held: beginnings of the names of gauges in ``stats()`` that fall back when a request is gone.
    :cvar announces: whether the engine announces KV events.
    """

    prompt: ClassVar[Sequence[int]] = range(300, 380)
    long_answer: ClassVar[int] = 160
    timeout_s: ClassVar[float] = 30.0
    held: ClassVar[tuple[str, ...]] = ("running", "waiting", "blocks_used")
    announces: ClassVar[bool] = True

    @pytest.fixture
    def engine(self) -> Engine:
        """An engine that is built and not started; each test starts and stops it."""
        raise NotImplementedError("expected the subclass to have a fixture `engine` that returns an Engine")

    @pytest.fixture
    def life(self, engine: Engine) -> Iterator[EngineLife]:
        """The engine with an event loop, not started; stopped at the end where the test has not done it."""
        life = EngineLife(engine, self.timeout_s)
        yield life
        life.close()

    @pytest.fixture
    def running(self, life: EngineLife) -> EngineLife:
        """The engine, started."""
        life.start()
        return life

    def request(self, prompt: Sequence[int], max_tokens: int = 4) -> dict[str, Any]:
        """A request in Dynamo's shape; override it where the model needs more."""
        return engine_checks.plain_request(prompt, max_tokens)

    def new_adapter(self, engine: Engine) -> EventAdapter:
        """Reads the engine's events: the installed plugin for its format, unless overridden."""
        return engine_checks.installed_adapter(engine)

    # -- what it states ----------------------------------------------------------------------------

    def test_what_it_states_before_the_start_is_complete_and_stays(self, life: EngineLife) -> None:
        engine_checks.check_info(life.engine)
        before = life.engine.info.layout
        life.start()

        engine_checks.check_info(life.engine)
        assert before == life.engine.info.layout, "the layout of the started engine is another one"

    def test_it_has_not_failed_while_it_serves(self, running: EngineLife) -> None:
        before = running.engine.failure()
        running.answer(self.request(self.prompt))

        assert (None, None) == (before, running.engine.failure())

    # -- answers -----------------------------------------------------------------------------------

    def test_an_answer_ends_with_its_reason_and_its_usage(self, running: EngineLife) -> None:
        chunks = running.answer(self.request(self.prompt, 4))

        engine_checks.check_answer(chunks, len(self.prompt), most=4)

    def test_a_prompt_that_comes_again_has_cached_tokens_but_never_all(self, running: EngineLife) -> None:
        chunks = [running.answer(self.request(self.prompt, 2)) for _ in range(2)]

        engine_checks.check_answer(chunks[0], len(self.prompt), most=2, cold=True)
        engine_checks.check_answer(chunks[1], len(self.prompt), most=2)

    def test_requests_at_the_same_time_have_answers_of_their_own(self, running: EngineLife) -> None:
        prompts = [list(self.prompt)[: len(self.prompt) - n] for n in range(3)]
        answers = running.answers([self.request(prompt, 3) for prompt in prompts])

        for prompt, chunks in zip(prompts, answers, strict=True):
            engine_checks.check_answer(chunks, len(prompt), most=3)

    @pytest.mark.parametrize("case", REFUSED)
    def test_it_refuses_what_can_never_be_served_and_serves_on(self, running: EngineLife, case: str) -> None:
        good = self.request(self.prompt)
        with pytest.raises(InvalidRequest):
            running.answer({**good, **REFUSED[case]})

        engine_checks.check_answer(running.answer(good), len(self.prompt), most=4)

    def test_it_refuses_a_prompt_that_leaves_no_room_for_an_answer(self, running: EngineLife) -> None:
        length = running.engine.info.context_length
        with pytest.raises(InvalidRequest):
            running.answer(self.request([self.prompt[0]] * length, 1))

    # -- what is given back --------------------------------------------------------------------------

    def test_closing_the_generator_frees_what_the_request_held(self, running: EngineLife) -> None:
        before = running.gauges(self.held)
        long, short = (self.request(self.prompt, tokens) for tokens in (self.long_answer, 1))
        during, after = running.interrupted(long, short, self.held, before)

        assert during.get("running", 0) > before.get("running", 0), (
            f"expected the gauge `running` of stats() to count a request that is under way, got {during}"
        )
        assert before == after, f"expected what was held before the request, {before}, got {after}"

    def test_stopping_ends_the_requests_under_way(self, running: EngineLife) -> None:
        ended = running.stopped_during(self.request(self.prompt, self.long_answer))

        assert ended, f"a request was still waiting {self.timeout_s:g} s after the engine stopped"

    def test_a_stopped_engine_takes_no_requests(self, running: EngineLife) -> None:
        running.stop()
        with pytest.raises(Unavailable):
            running.answer(self.request(self.prompt))

    # -- events ------------------------------------------------------------------------------------

    def test_no_events_come_after_the_stop(self, running: EngineLife) -> None:
        running.answer(self.request(self.prompt))
        running.stop()
        with pytest.raises(Unavailable):
            running.answer(self.request(self.prompt))

        assert [] == running.late_events(), "events came after stop() had returned"

    def test_its_events_say_what_it_holds_of_the_prompt(self, running: EngineLife) -> None:
        if not self.announces:
            pytest.skip("the engine announces no events")
        for _ in range(2):
            running.answer(self.request(self.prompt))
        running.stop()

        engine_checks.check_events(running, self.new_adapter, self.prompt)


class EventAdapterConformance:
    """Tests for one event adapter. A subclass gives ``layout``, ``samples`` and :meth:`new_adapter`.

    :cvar layout: the groups that the samples are of.
    :cvar samples: well-formed events of one rank, in order, from the engine's start on; JSON values. At least
        one stores blocks.
    :cvar examples: how many mutations each test tries.
    :cvar most_lines: lines of Python that the adapter may run for one event before it is said to hang.
    """

    layout: ClassVar[CacheLayout]
    samples: ClassVar[Sequence[Any]]
    examples: ClassVar[int] = 100
    most_lines: ClassVar[int] = adapter_checks.MOST_LINES

    def new_adapter(self) -> EventAdapter:
        """A new adapter for :attr:`layout`."""
        raise NotImplementedError("expected the subclass to have a method `new_adapter`")

    def rank(self) -> adapter_checks.Rank:
        """A new adapter with the residency of its rank."""
        return adapter_checks.Rank(self.new_adapter(), self.layout, self.most_lines)

    def test_the_samples_are_read_and_blocks_are_held(self) -> None:
        rank = self.rank()
        stored = sum(rank.takes(raw) for raw in self.samples)

        assert [] == rank.refused, f"well-formed events were refused: {rank.refused}"
        assert [] == rank.restarts, f"well-formed events made the view begin again: {rank.restarts}"
        assert stored, "expected an event that stores blocks among what the samples mean, got none"

    def test_events_are_not_changed(self) -> None:
        given = copy.deepcopy(list(self.samples))
        rank = self.rank()
        for raw in given:
            rank.takes(raw)

        assert list(self.samples) == given, "feed() changed its argument, which other plugins are shown"

    def test_a_mutated_event_is_read_or_refused_as_a_fault_of_the_protocol(self) -> None:
        from vswa_plugin.testing import mutations

        def check(mutated: mutations.Mutated) -> None:
            rank = self.rank()
            for raw in mutated.events:
                rank.takes(raw)

        mutations.try_all(mutations.mutated(self.samples), check, self.examples)

    def test_a_list_with_one_element_more_is_read_or_refused_as_a_fault_of_the_protocol(self) -> None:
        for index, sample in enumerate(self.samples):
            for longer in adapter_checks.grown(sample):
                rank = self.rank()
                for raw in (*self.samples[:index], longer):
                    rank.takes(raw)

    def test_any_json_is_read_or_refused_as_a_fault_of_the_protocol(self) -> None:
        from vswa_plugin.testing import mutations

        mutations.try_all(mutations.any_json(), lambda raw: self.rank().takes(raw), self.examples)

    def test_any_sequence_of_events_ends_and_is_read_or_refused(self) -> None:
        """Also one in which blocks are their own parents, or chains close on themselves otherwise."""
        from vswa_plugin.testing import mutations

        names = {name for _, name in self.rank().announced(self.samples)}

        def check(events: list[Any]) -> None:
            rank = self.rank()
            for raw in events:
                rank.takes(raw)

        mutations.try_all(mutations.resequenced(self.samples, names), check, self.examples)

    def test_a_refused_event_leaves_nothing_behind(self) -> None:
        from vswa_plugin.testing import mutations

        def check(mutated: mutations.Mutated) -> None:
            rank, without = self.rank(), self.rank()
            *before, last = mutated.events[: mutated.at + 1]
            rest = list(self.samples[mutated.at + 1 :])
            for raw in before:
                rank.takes(raw)
                without.takes(raw)
            rank.takes(last)
            if not rank.refused:
                return
            later, expected = rank.announced(rest), without.announced(rest)
            assert later <= expected, f"after a refused event, its blocks were announced: {later - expected}"

        mutations.try_all(mutations.mutated(self.samples, keep_order=True), check, self.examples)

    def test_an_event_that_comes_twice_makes_no_blocks_that_were_not_stored(self) -> None:
        once = self.rank().announced(self.samples)
        for index, raw in enumerate(self.samples):
            twice = [*self.samples[: index + 1], copy.deepcopy(raw), *self.samples[index + 1 :]]
            assert self.rank().announced(twice) <= once, f"event {index} twice announced other blocks"
