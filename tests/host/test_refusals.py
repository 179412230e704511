"""Plugins that the host refuses: why, and that no trace of them is left."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.host_helpers import clock as clock
from tests.host_helpers import coroutine, state
from tests.host_helpers import host as host
from vswa_plugin.errors import PluginError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.testing.host import plugin
from vswa_plugin.wire.events import Batch, Source


async def async_generator(batch: Batch) -> Any:
    yield


def generator(batch: Batch) -> Any:
    yield


def positional(*args: object) -> None: ...


def keyword_only(source: Source, *, batch: Batch) -> None: ...


def with_default(source: Source, batch: Batch | None = None) -> None: ...


def unknown_argument(source: Source, batches: Batch) -> None: ...


class Raises:
    @hookimpl
    def vswa_kv_batch(self, batch: Batch) -> None: ...

    def __dir__(self) -> list[str]:
        raise RuntimeError("no listing")


class Callable_:
    def __call__(self, batch: Batch) -> None: ...


def vswa_kv_batch(batch: Batch) -> None: ...


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "misspelt": (
        lambda: plugin(vswa_kv_bacth=lambda: None),
        "did you mean 'vswa_kv_batch'? Known: vswa_accuracy_scorers, ",
    ),
    "unlike any": (
        lambda: plugin(zzz=lambda: None),
        "implements 'zzz', which is no hook: Known: vswa_accuracy_scorers, ",
    ),
    "async": (lambda: plugin(vswa_kv_batch=coroutine), "got an async one; hooks are synchronous"),
    "async generator": (lambda: plugin(vswa_kv_batch=async_generator), "got an async one"),
    "generator": (lambda: plugin(vswa_kv_batch=generator), "got a generator"),
    "wrapper": (
        lambda: SimpleNamespace(vswa_kv_batch=hookimpl(generator, wrapper=True, specname="vswa_kv_batch")),
        "wrappers are not supported",
    ),
    "old wrapper": (
        lambda: SimpleNamespace(
            vswa_kv_batch=hookimpl(generator, hookwrapper=True, specname="vswa_kv_batch")
        ),
        "wrappers are not supported",
    ),
    "unknown argument": (
        lambda: plugin(vswa_kv_batch=unknown_argument),
        "expected arguments out of (source, batch), passed by name, got 'batches'; did you mean 'batch'?",
    ),
    "positional": (lambda: plugin(vswa_kv_batch=positional), "got *args"),
    "keyword only": (lambda: plugin(vswa_kv_batch=keyword_only), "got batch: 'Batch'"),
    "default": (
        lambda: plugin(vswa_kv_batch=with_default),
        "'batch' has a default and would never be passed",
    ),
    "forgotten mark": (lambda: SimpleNamespace(vswa_kv_batch=vswa_kv_batch), "write @hookimpl above it"),
    "no function": (
        lambda: SimpleNamespace(vswa_kv_batch=hookimpl(Callable_())),  # type: ignore[type-var]
        "expected a plain function, got Callable_",
    ),
    "no hook": (lambda: SimpleNamespace(x=1), "implements no hook"),
    "cannot be listed": (lambda: Raises(), "cannot be examined: RuntimeError: no listing"),
    "one good hook, one bad": (
        lambda: plugin(vswa_metrics=lambda: "", vswa_kv_batch=coroutine),
        "plugin 'bad', hook 'vswa_kv_batch'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_plugin_leaves_no_trace_and_the_message_helps(host: PluginHost, case: str) -> None:
    make, message = REFUSED[case]
    host.register(plugin(vswa_metrics=lambda: None), "good")
    before = state(host)
    with pytest.raises(PluginError) as caught:
        host.register(make(), "bad")

    assert message in str(caught.value)
    assert "'bad'" in str(caught.value)
    assert before == state(host)
    host.register(plugin(vswa_metrics=lambda: None), "bad")  # the name is free


@pytest.mark.parametrize("name", ["", "a,b", "a b", "-x", "a\n"])
def test_a_name_that_could_not_be_switched_off_is_refused(host: PluginHost, name: str) -> None:
    before = state(host)
    with pytest.raises(PluginError, match="expected a plugin name"):
        host.register(plugin(vswa_metrics=lambda: None), name)

    assert before == state(host)


def test_a_name_is_taken_once_and_both_sources_are_named(host: PluginHost) -> None:
    host.register(plugin(vswa_metrics=lambda: None), "x", source="first package")
    before = state(host)
    with pytest.raises(PluginError, match=r"named 'x': one from first package, one from second package"):
        host.register(plugin(vswa_metrics=lambda: None), "x", source="second package")

    assert before == state(host)


def test_one_object_is_registered_once(host: PluginHost) -> None:
    same = plugin(vswa_metrics=lambda: None)
    host.register(same, "x")
    before = state(host)
    with pytest.raises(PluginError, match="loaded already, under the name 'x'"):
        host.register(same, "y")

    assert before == state(host)


def test_an_optional_hook_that_the_host_does_not_know_is_accepted(host: PluginHost) -> None:
    both = plugin(vswa_metrics=lambda: None)
    both.later = hookimpl(lambda: None, specname="vswa_of_next_year", optionalhook=True)  # type: ignore[attr-defined]
    host.register(both, "x")

    assert ("vswa_metrics",) == host.plugins()[0].hooks
