"""One page of metrics, piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client import Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from tests.metrics_helpers import families_of
from vswa_plugin.program import metrics
from vswa_plugin.program.metrics import About, Page


def piece(name: str, *labels: str) -> Metric:
    family = GaugeMetricFamily(name, f"The {name}.", labels=["of"])
    for label in labels:
        family.add_metric([label], 1)
    return family


def test_pieces_of_one_family_are_one_and_the_event_loop_runs_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "PAUSE_AFTER_S", 0)
    turns = 0
    seen: list[int] = []

    def pieces() -> Iterator[Metric]:
        for number in range(20):
            seen.append(turns)
            yield piece("vswa_one", f"{number}")
        yield piece("vswa_other")

    async def body() -> str:
        nonlocal turns
        rendering = asyncio.create_task(Page(lambda: About("index"), pieces).render())
        while not rendering.done():
            await asyncio.sleep(0)
            turns += 1
        return rendering.result()

    families = families_of(asyncio.run(body()))

    assert 20 == len(families["vswa_one"].samples)
    assert [] == families["vswa_other"].samples
    assert seen == sorted(set(seen)), "a turn for others after each piece"


def test_a_page_says_what_runs_and_how_its_process_is() -> None:
    families = families_of(asyncio.run(Page(lambda: About("worker", "mine", "1.2"), lambda: ()).render()))
    (build,) = families["vswa_build_info"].samples

    assert {"program": "worker", "engine": "mine", "engine_version": "1.2"}.items() <= build.labels.items()
    assert families["process_resident_memory_bytes"].total() > 1e6


def test_when_a_histogram_was_created_is_no_family_of_its_own() -> None:
    histogram = Histogram("vswa_time_seconds", "Time.", registry=None)
    histogram.observe(1)
    page = asyncio.run(Page(lambda: About("index"), histogram.collect).render())

    assert "vswa_time_seconds_created" not in page
    assert 1 == sum(
        each.name == "vswa_time_seconds_count" for each in families_of(page)["vswa_time_seconds"].samples
    )


def test_plugins_get_the_names_of_the_page_and_their_text_ends_it() -> None:
    given: list[str] = []

    def plugins(page: str) -> str:
        given.append(page)
        return "mine 1\n"

    page = asyncio.run(Page(lambda: About("index"), lambda: [piece("vswa_one", "a")], plugins).render())

    assert page.endswith('vswa_one{of="a"} 1.0\nmine 1\n')
    assert "# TYPE vswa_one gauge\n" in given[0]
    assert [] == [line for line in given[0].splitlines() if not line.startswith("# TYPE ")]
