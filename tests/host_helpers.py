"""A plugin host whose clock stands still, and plugins made of functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import EngineInfo, EngineSettings
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin, plugin_host
from vswa_plugin.wire.events import VERSION, Batch, Source

SOURCE = Source("dynamo", "backend", 1, 0)
BATCH = Batch(VERSION, 1, 0, 0, [])
LAYOUT = CacheLayout((CacheGroup(0, None, 32),), "trtllm_v2", "m")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(clock: Clock) -> Iterator[PluginHost]:
    # Its tests make plugins fail, and look at what became of it.
    with plugin_host(clock=clock, expect_failures=None) as host:
        yield host


def observer(seen: list[str], name: str) -> object:
    return plugin(vswa_kv_batch=lambda batch: seen.append(name))


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def settings(engine: str) -> EngineSettings:
    return EngineSettings(engine=engine, mode="agg", model_path="/m", served_model_name="m")


def engine(**missing: None) -> SimpleNamespace:
    parts = ("event_format", "info", "start", "stop", "generate", "stats", "failure")
    shape: dict[str, object] = {part: part for part in parts if part not in missing}
    if "info" in shape:
        shape["info"] = EngineInfo(LAYOUT, 1024, 8, 512, 64)
    return SimpleNamespace(**shape)


def state(host: PluginHost) -> object:
    """All that a registration could leave behind."""
    manager = host._manager
    relay = {
        name: [impl.function for impl in call.get_hookimpls()] for name, call in vars(manager.hook).items()
    }
    return (
        manager.list_name_plugin(),
        relay,
        dict(host._calls),
        host.plugins(),
        host.failures(),
        set(sys.modules),
    )


async def coroutine(source: Source, batch: Batch) -> None: ...
