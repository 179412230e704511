from __future__ import annotations

import asyncio
from typing import Any, ClassVar

import pytest
import vswa_example_engine as plugin

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import Engine, EngineSettings, EventAdapter
from vswa_plugin.errors import ConfigError
from vswa_plugin.testing.conformance import EngineConformance, EventAdapterConformance
from vswa_plugin.testing.host import plugin_host


def settings(**changes: Any) -> EngineSettings:
    given = {"engine": plugin.NAME, "mode": "agg", "model_path": "/m", "served_model_name": "m"}
    return EngineSettings(**{**given, **changes})


class TestTheEngine(EngineConformance):
    """The whole contract of an engine: answers, counts, refusals, events, the end."""

    @pytest.fixture
    def engine(self) -> Engine:
        return plugin.ExampleEngine(settings())

    def new_adapter(self, engine: Engine) -> EventAdapter:
        return plugin.ExampleAdapter()


class TestTheAdapter(EventAdapterConformance):
    """Well-formed events are read, all others refused."""

    layout: ClassVar[CacheLayout] = CacheLayout(plugin.GROUPS, "vllm", "m")
    samples: ClassVar[list[Any]] = [
        {"store": list(range(16))},
        {"store": list(range(32))},
        {"remove": list(range(32))},
    ]

    def new_adapter(self) -> EventAdapter:
        return plugin.ExampleAdapter()


def test_a_request_as_dynamos_frontend_sends_it_is_served() -> None:
    stop = {"max_tokens": 2, "stop": None, "stop_token_ids_hidden": [1], "min_tokens": None}
    sampling = {"temperature": 0.5, "top_p": 0.9, "n": 1, "use_beam_search": None}
    given = {"model": "m", "token_ids": [7, 8], "stop_conditions": stop, "sampling_options": sampling}
    engine = plugin.ExampleEngine(settings())

    async def answered() -> list[int]:
        return [token async for chunk in engine.generate(given) for token in chunk["token_ids"]]

    assert [8, 8] == asyncio.run(answered())


def test_the_host_builds_it_by_its_name() -> None:
    with plugin_host(plugin) as host:
        assert plugin.NAME == host.engine(settings()).event_format


def test_a_full_cache_gives_up_what_was_used_longest_ago() -> None:
    cache = plugin.ExampleCache(blocks=3)
    first, second = list(range(33)), list(range(100, 133))

    assert [0, 32, 0] == [cache.take(prompt)[0] for prompt in (first, first, second)]
    assert 16 == cache.take(first)[0], "the end of the first prompt had to go"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks"):
        plugin.ExampleEngine(settings(options={"block": 2}))
