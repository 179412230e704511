from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vswa_plugins.prometheus import Prometheus

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.records import RequestRecord
from vswa_plugin.host.host import PluginHost
from vswa_plugin.wire.events import (
    VERSION,
    Batch,
    Cleared,
    Event,
    Moved,
    Removed,
    Source,
    Stored,
    layout_event,
)

LAYOUT = layout_event(CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "m"))
ONE = Source("dynamo", "backend", 1, 0)
TWO = Source("dynamo", "backend", 2, 0)


@pytest.fixture
def host() -> Iterator[PluginHost]:
    with PluginHost() as host:
        host.register(Prometheus, "prometheus")
        yield host
        assert {} == host.failures()


def values(host: PluginHost) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(host.metrics()):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                label = next(
                    (f"[{value}]" for key, value in sample.labels.items() if key in ("window", "model")), ""
                )
                found[sample.name + label] = sample.value
    return found


def show(host: PluginHost, *events: Event, source: Source = ONE) -> None:
    host.kv_batch(source, Batch(VERSION, 1, 0, 0, list(events)))


def record(**changes: object) -> RequestRecord:
    fields: dict[str, object] = {
        "request_id": "r",
        "model": "m",
        "worker_id": 1,
        "dp_rank": 0,
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "output_tokens": 10,
        "finish_reason": "stop",
        "first_token_s": 0.2,
        "total_s": 1.0,
    }
    return RequestRecord(**(fields | changes))  # type: ignore[arg-type]


def test_blocks_are_counted_per_window(host: PluginHost) -> None:
    show(host, LAYOUT)
    show(host, Stored(0, 0, None, (1, 2, 3)), Stored(1, 0, None, (1, 2)), Removed(0, (1, 2)))
    show(host, Moved(1, (1,), "host"), Cleared(0), Cleared())
    got = values(host)

    assert 3 == got["vswa_kv_blocks_stored_total[512]"]
    assert 2 == got["vswa_kv_blocks_stored_total[global]"]
    assert 2 == got["vswa_kv_blocks_removed_total[512]"]
    assert 0 == got["vswa_kv_blocks_removed_total[global]"]
    assert 0 == got["vswa_kv_blocks_moved_total[512]"]
    assert 1 == got["vswa_kv_blocks_moved_total[global]"]
    assert 1 == got["vswa_kv_clears_total[512]"]
    assert 1 == got["vswa_kv_clears_total[all]"]


def test_the_same_group_id_means_another_window_on_another_source(host: PluginHost) -> None:
    other = layout_event(CacheLayout((CacheGroup(0, 1024, 32),), "trtllm_v2", "m"))
    show(host, LAYOUT)
    show(host, other, source=TWO)
    show(host, Stored(0, 0, None, (1,)))
    show(host, Stored(0, 0, None, (1, 2)), source=TWO)
    got = values(host)

    assert 1 == got["vswa_kv_blocks_stored_total[512]"]
    assert 2 == got["vswa_kv_blocks_stored_total[1024]"]


def test_a_group_without_a_layout_is_counted_as_unknown(host: PluginHost) -> None:
    show(host, Stored(5, 0, None, (1,)))

    assert 1 == values(host)["vswa_kv_blocks_stored_total[unknown]"]


def test_a_heartbeat_is_not_counted(host: PluginHost) -> None:
    show(host, LAYOUT)
    before = host.metrics()
    show(host)

    assert before == host.metrics()


def test_where_nothing_was_counted_as_in_a_router_there_is_no_metric(host: PluginHost) -> None:
    show(host)

    assert "" == host.metrics()


def test_requests_are_counted_with_their_tokens(host: PluginHost) -> None:
    host.request_finished(record())
    host.request_finished(record(finish_reason="cancelled", first_token_s=None, output_tokens=0))
    got = values(host)

    assert 200 == got["vswa_prompt_tokens_total[m]"]
    assert 128 == got["vswa_cached_tokens_total[m]"]
    assert 10 == got["vswa_output_tokens_total[m]"]
    assert 1 == got["vswa_time_to_first_token_seconds_count[m]"]
    assert got["vswa_time_to_first_token_seconds_sum[m]"] == pytest.approx(0.2)
    assert 2 == got["vswa_request_duration_seconds_count[m]"]


def test_tokens_carry_the_mode_of_the_worker(host: PluginHost) -> None:
    settings = SimpleNamespace(mode="prefill")
    host.worker_connected(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
    host.request_finished(record())

    assert 'vswa_prompt_tokens_total{mode="prefill",model="m"} 100.0' in host.metrics()
    assert "_created" not in host.metrics()


def test_two_hosts_in_one_process_count_apart(host: PluginHost) -> None:
    show(host, LAYOUT)
    with PluginHost() as other:
        other.register(Prometheus, "prometheus")
        show(other, LAYOUT)
        show(other, Stored(0, 0, None, (1, 2, 3)))
        other.request_finished(record())

        assert 3 == values(other)["vswa_kv_blocks_stored_total[512]"]
        assert 1 == values(other)["vswa_request_duration_seconds_count[m]"]
    assert 0 == values(host)["vswa_kv_blocks_stored_total[512]"]
    assert "vswa_request_duration_seconds_count[m]" not in values(host)
