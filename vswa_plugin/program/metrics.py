"""The page of metrics of one program, written in pieces: a large one must not hold up the event loop."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import metadata
from itertools import chain

import msgspec
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vswa_plugin import __version__

#: Time of writing after which the event loop gets a turn.
PAUSE_AFTER_S = 0.001


def no_plugins(_: str) -> str:
    return ""


class About(msgspec.Struct, frozen=True):
    """What a program is, for ``vswa_build_info``.

    :param program: ``worker``, ``relay``, ``router``, ``selector`` or ``index``.
    :param engine: of a worker, with its version.
    """

    program: str
    engine: str = ""
    engine_version: str = ""


class Page:
    """The metrics of one program: what it is, its process, its own families, and those of its plugins.

    :param about: what the program is; an engine says its version once it has started.
    :param families: of the program, made anew for each page. A family may come in pieces, one after the
        other; the event loop may run between any two of them.
    :param plugins: from the TYPE lines of the page to the text that plugins add: ``PluginHost.metrics``.
    """

    def __init__(
        self,
        about: Callable[[], About],
        families: Callable[[], Iterable[Metric]],
        plugins: Callable[[str], str] = no_plugins,
    ) -> None:
        self._about = about
        self._process = ProcessCollector(registry=None)
        self._families = families
        self._plugins = plugins

    async def render(self) -> str:
        """The whole page as Prometheus text."""
        texts: list[str] = []
        declared: list[str] = []
        last, resumed = "", time.perf_counter()
        for piece in chain((_build_info(self._about()),), self._process.collect(), self._families()):
            text = _text_of(piece)
            if piece.name == last:
                text = text.split("\n", 2)[2]  # its HELP and TYPE lines are there already
            else:
                declared.append(text.split("\n", 2)[1] + "\n")
                last = piece.name
            texts.append(text)
            if time.perf_counter() - resumed > PAUSE_AFTER_S:
                await asyncio.sleep(0)
                resumed = time.perf_counter()
        return "".join(texts) + self._plugins("".join(declared))


class _Only(Collector):
    """What makes a registry of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def _text_of(family: Metric) -> str:
    # When each counter was created would be a family of its own, about the length of the first one.
    family.samples = [each for each in family.samples if each.name != f"{family.name}_created"]
    return generate_latest(_Only(family)).decode()


def _build_info(about: About) -> Metric:
    labels = {
        "program": about.program,
        "version": __version__,
        "dynamo_version": _version_of("ai-dynamo-runtime"),
        "engine": about.engine,
        "engine_version": about.engine_version,
        "python_version": platform.python_version(),
    }
    family = GaugeMetricFamily("vswa_build_info", "Always 1; the labels say what runs.", labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family


@cache  # read from the disk, and for each page
def _version_of(distribution: str) -> str:
    """Empty where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
