"""What hooks return is isolated like the hooks: what raises costs itself alone, is counted, and named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from tests.host_helpers import settings
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.blocks.reuse import Needs, TrtllmV2
from vswa_plugin.engine.contract import BlocksStored, Engine, EngineBlock, EngineInfo, PromptHolder
from vswa_plugin.engine.predicted import Prompt, Scorer
from vswa_plugin.errors import ConfigError, InvalidRequest, PluginFailed, ProtocolError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin

LAYOUT = CacheLayout((CacheGroup(0, 64, 32), CacheGroup(1, None, 32)), "mine", "m")
INFO = EngineInfo(LAYOUT, 1024, 8, 512, 64)
STORED = BlocksStored(1, None, (EngineBlock(1, tuple(range(32))),))
BUG = KeyError("a bug of the plugin")


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*_: object) -> Any:
        raise error

    return raises


# -- event adapters --------------------------------------------------------------------------------


def fed(host: PluginHost, feed: Callable[[Any], Any]) -> list[Any]:
    host.register(plugin(vswa_event_adapter=lambda: SimpleNamespace(feed=feed)), "theirs")
    return host.event_adapter("x", LAYOUT).feed({})


def test_an_adapter_answers_as_it_does(host: PluginHost) -> None:
    assert [STORED] == fed(host, lambda raw: [STORED])
    assert {} == host.failures()


def test_an_event_that_an_adapter_cannot_read_is_no_failure_of_it(host: PluginHost) -> None:
    with pytest.raises(ProtocolError, match="no such field"):
        fed(host, raising(ProtocolError("no such field")))

    assert {} == host.failures()


@pytest.mark.parametrize(
    "feed",
    [raising(BUG), raising(SystemExit(3)), lambda raw: None, lambda raw: [7], lambda raw: STORED],
    ids=["raises", "exits", "none", "no event", "no list"],
)
def test_an_adapter_that_does_what_it_must_not_is_counted_and_named(
    host: PluginHost, caplog: pytest.LogCaptureFixture, feed: Callable[[Any], Any]
) -> None:
    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in"):
        fed(host, feed)

    assert {("theirs", "vswa_event_adapter"): 1} == host.failures()
    assert "'theirs'" in caplog.text


def test_ctrl_c_in_an_adapter_stays_ctrl_c(host: PluginHost) -> None:
    with pytest.raises(KeyboardInterrupt):
        fed(host, raising(KeyboardInterrupt()))


# -- reuse rules -----------------------------------------------------------------------------------


class Rule(TrtllmV2):
    """A rule that answers as it is told, and else as TensorRT-LLM V2."""

    def __init__(self, **answers: Any) -> None:
        self.name = "mine"
        for part, answer in answers.items():
            setattr(self, part, answer)


def rule_of(host: PluginHost, **answers: Any) -> Any:
    host.register(plugin(vswa_reuse_rules=lambda: {"mine": Rule(**answers)}), "theirs")
    return host.reuse_rules()["mine"]


CALLS = {
    "boundaries": (LAYOUT, 100),
    "tokens": (LAYOUT, 2, 100),
    "first_needed": (LAYOUT.groups[0], 2, 100),
    "needs": (LAYOUT, 100),
}


def test_a_rule_answers_as_it_does(host: PluginHost) -> None:
    rule = rule_of(host)

    assert [getattr(TrtllmV2(), part)(*given) for part, given in CALLS.items()] == [
        getattr(rule, part)(*given) for part, given in CALLS.items()
    ]
    assert ("mine", "run") == (rule.name, rule.provenance)


@pytest.mark.parametrize("part", CALLS)
def test_a_rule_that_raises_is_counted_and_named(host: PluginHost, part: str) -> None:
    rule = rule_of(host, **{part: raising(BUG)})
    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in"):
        getattr(rule, part)(*CALLS[part])

    assert {("theirs", "vswa_reuse_rules"): 1} == host.failures()


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        ("boundaries", -1),
        ("boundaries", 101),
        ("boundaries", 1.0),
        ("boundaries", True),
        ("tokens", 100),
        ("first_needed", 3),
        ("first_needed", -1),
        ("needs", (1, 2)),
        ("needs", Needs((1,), (1, None))),
        ("needs", Needs((1, -1), (1, None))),
        ("needs", Needs((1, None), (1,))),
    ],
)
def test_an_answer_that_would_do_harm_elsewhere_is_a_failure_of_the_rule(
    host: PluginHost, part: str, answer: object
) -> None:
    rule = rule_of(host, **{part: lambda *_: answer})
    with pytest.raises(PluginFailed, match="expected"):
        getattr(rule, part)(*CALLS[part])

    assert {("theirs", "vswa_reuse_rules"): 1} == host.failures()


def test_a_layout_that_a_rule_refuses_is_no_failure_of_it(host: PluginHost) -> None:
    rule = rule_of(host, needs=raising(ConfigError("expected windows of 64 tokens")))
    with pytest.raises(ConfigError, match="windows of 64"):
        rule.needs(LAYOUT, 100)

    assert {} == host.failures()


# -- engines ---------------------------------------------------------------------------------------


async def one_chunk(_: object) -> AsyncIterator[dict[str, Any]]:
    yield {"token_ids": [1]}


def a_chunk_and(error: BaseException) -> Callable[[object], AsyncIterator[dict[str, Any]]]:
    async def generate(_: object) -> AsyncIterator[dict[str, Any]]:
        yield {"token_ids": [1]}
        raise error

    return generate


async def a_refusal(_: object) -> AsyncIterator[dict[str, Any]]:
    raise InvalidRequest("expected fewer tokens")
    yield {}


def engine_of(host: PluginHost, **parts: Any) -> Engine:
    shape = {
        "event_format": "x",
        "info": INFO,
        "start": lambda on_events: None,
        "stop": lambda: None,
        "generate": one_chunk,
        "failure": lambda: None,
        "stats": lambda: {"running": 1.0},
    }
    host.register(plugin(vswa_engine=lambda: SimpleNamespace(**shape | parts)), "theirs")
    return host.engine(settings("mine"))


async def chunks_of(engine: Engine) -> list[Any]:
    return [chunk async for chunk in engine.generate({})]


def test_an_engine_answers_as_it_does(host: PluginHost) -> None:
    engine = engine_of(host)
    engine.start(lambda rank, events: None)
    engine.stop()

    assert ("x", INFO) == (engine.event_format, engine.info)
    assert (None, {"running": 1.0}) == (engine.failure(), engine.stats())
    assert [{"token_ids": [1]}] == asyncio.run(chunks_of(engine))
    assert {} == host.failures()


def test_an_engine_that_cannot_start_says_so_with_its_plugins_name(host: PluginHost) -> None:
    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in"):
        engine_of(host, start=raising(BUG)).start(lambda rank, events: None)

    assert {("theirs", "vswa_engine"): 1} == host.failures()


def test_what_a_user_can_correct_goes_through_unchanged(host: PluginHost) -> None:
    with pytest.raises(ConfigError, match="a file lacks"):
        engine_of(host, start=raising(ConfigError("a file lacks"))).start(lambda rank, events: None)

    assert {} == host.failures()


@pytest.mark.parametrize(
    "stop",
    [raising(BUG), raising(ConfigError("late")), partial(raising(BUG))],
    ids=["bug", "ours", "partial"],
)
def test_an_engine_that_fails_as_it_stops_keeps_nothing_from_being_stopped(
    host: PluginHost, stop: Callable[[], Any]
) -> None:
    engine_of(host, stop=stop).stop()

    assert {("theirs", "vswa_engine"): 1} == host.failures()


@pytest.mark.parametrize(
    "stats",
    [
        raising(BUG),
        lambda: None,
        lambda: {"running": "one"},
        lambda: {'running{a="b"} 1 #': 1.0},
        lambda: {f"request_{number}": 1.0 for number in range(1_001)},
    ],
    ids=["bug", "none", "text", "odd name", "many"],
)
def test_an_engine_whose_gauges_fail_has_none(host: PluginHost, stats: Callable[[], Any]) -> None:
    assert {} == engine_of(host, stats=stats).stats()
    assert {("theirs", "vswa_engine"): 1} == host.failures()


@pytest.mark.parametrize("info", [raising(BUG), raising(SystemExit(3)), lambda _: {"layout": LAYOUT}])
def test_an_engine_that_cannot_state_what_it_is_is_counted_and_named(
    host: PluginHost, info: Callable[[Any], Any]
) -> None:
    class Engine:
        """Well at first, when the host looks whether it has all parts."""

        event_format = "x"
        started = False
        start = stop = generate = failure = stats = raising(BUG)

        @property
        def info(self) -> Any:
            return info(self) if self.started else INFO

    theirs = Engine()
    host.register(plugin(vswa_engine=lambda: theirs), "theirs")
    engine = host.engine(settings("mine"))
    assert INFO == engine.info
    theirs.started = True

    with pytest.raises(PluginFailed, match="plugin 'theirs' failed in info: "):
        _ = engine.info
    assert {("theirs", "vswa_engine"): 1} == host.failures()


def test_an_engine_that_cannot_say_how_it_is_has_failed(host: PluginHost) -> None:
    failure = engine_of(host, failure=raising(BUG)).failure()

    assert failure is not None
    assert "plugin 'theirs' failed" in failure


@pytest.mark.parametrize("error", [BUG, SystemExit(3)], ids=["bug", "exits"])
def test_a_request_that_meets_a_bug_of_the_engine_is_counted_and_named(
    host: PluginHost, error: BaseException
) -> None:
    with pytest.raises(PluginFailed, match=f"plugin 'theirs' failed in generate: {type(error).__name__}"):
        asyncio.run(chunks_of(engine_of(host, generate=a_chunk_and(error))))

    assert {("theirs", "vswa_engine"): 1} == host.failures()


def test_a_refused_request_is_no_failure_of_the_engine(host: PluginHost) -> None:
    with pytest.raises(InvalidRequest):
        asyncio.run(chunks_of(engine_of(host, generate=a_refusal)))

    assert {} == host.failures()


def released(engine: Engine) -> bool:
    return cast(PromptHolder, engine).release({"ticket": 1})


@pytest.mark.parametrize(
    ("parts", "expected"), [({"release": lambda params: bool(params)}, True), ({}, False)]
)
def test_an_engine_lets_go_of_a_prompt_where_it_can(
    host: PluginHost, parts: dict[str, Any], expected: bool
) -> None:
    assert expected is released(engine_of(host, **parts))
    assert {} == host.failures()


def test_params_that_an_engine_refuses_are_no_failure_of_it(host: PluginHost) -> None:
    with pytest.raises(InvalidRequest):
        released(engine_of(host, release=raising(InvalidRequest("of another engine"))))

    assert {} == host.failures()


def test_an_engine_that_fails_to_let_go_is_counted_and_named(host: PluginHost) -> None:
    assert not released(engine_of(host, release=raising(BUG)))
    assert {("theirs", "vswa_engine"): 1} == host.failures()


def test_closing_the_answer_closes_the_engines_own(host: PluginHost) -> None:
    closed: list[bool] = []

    async def generate(_: object) -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {}
        finally:
            closed.append(True)

    async def body() -> None:
        chunks: Any = engine_of(host, generate=generate).generate({})
        await anext(chunks)
        await chunks.aclose()

    asyncio.run(body())

    assert [True] == closed


# -- scorers ---------------------------------------------------------------------------------------


class Guess:
    """A scorer that promises nothing."""

    name = "guess"

    def begin(self, layout: object) -> None: ...
    def learn(self, stored: object, nodes: object) -> None: ...
    def apply(self, event: object) -> None: ...
    def predict(self, prompt: Prompt) -> int:
        return 0


def scorer_of(host: PluginHost, **parts: Any) -> Scorer:
    guess = Guess()
    for part, answer in parts.items():
        setattr(guess, part, answer)
    host.register(plugin(vswa_accuracy_scorers=lambda: [guess]), "theirs")
    (scorer,) = host.accuracy_scorers(LAYOUT, {})
    return scorer


@pytest.mark.parametrize("part", ["begin", "learn", "apply", "predict"])
def test_a_scorer_that_fails_once_is_asked_no_more(host: PluginHost, part: str) -> None:
    scorer: Any = scorer_of(host, **{part: raising(BUG)})
    for _ in range(3):
        scorer.begin(LAYOUT)
        scorer.learn(STORED, ())
        scorer.apply(None)
        assert 0 == scorer.predict(Prompt((1, 2), ()))

    assert scorer.failed
    assert {("theirs", "vswa_accuracy_scorers"): 1} == host.failures()


@pytest.mark.parametrize("answer", [-1, 3, None, 1.5])
def test_a_prediction_that_cannot_be_is_a_failure_of_the_scorer(host: PluginHost, answer: object) -> None:
    scorer: Any = scorer_of(host, predict=lambda prompt: answer)

    assert 0 == scorer.predict(Prompt((1, 2), ()))
    assert scorer.failed
    assert {("theirs", "vswa_accuracy_scorers"): 1} == host.failures()


def test_a_name_that_another_scorer_has_costs_that_plugin_its_scorers(host: PluginHost) -> None:
    class Other(Guess):
        name = "other"

    for owner, given in {"a": [Guess()], "b": [Other(), Guess()], "c": [Other(), Other()]}.items():
        host.register(plugin(vswa_accuracy_scorers=lambda given=given: given), owner)

    assert ["guess"] == [scorer.name for scorer in host.accuracy_scorers(LAYOUT, {})]
    assert {("b", "vswa_accuracy_scorers"): 1, ("c", "vswa_accuracy_scorers"): 1} == host.failures()
