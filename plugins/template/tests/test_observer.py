from __future__ import annotations

from collections.abc import Iterator

import pytest
import vswa_example as plugin

from vswa_plugin.engine import RequestRecord
from vswa_plugin.testing.host import PluginHost, plugin_host


@pytest.fixture
def host() -> Iterator[PluginHost]:
    # Fails the test at its end where the plugin failed: the host itself would go on without its answer.
    with plugin_host(plugin) as host:
        yield host


def test_a_finished_request_without_reuse_is_counted(host: PluginHost) -> None:
    for cached_tokens, finish_reason in ((0, "stop"), (32, "stop"), (0, "error")):
        host.request_finished(
            RequestRecord(
                request_id="r",
                model="gemma3",
                worker_id=1,
                dp_rank=0,
                prompt_tokens=100,
                cached_tokens=cached_tokens,
                output_tokens=5,
                finish_reason=finish_reason,
                first_token_s=0.1,
                total_s=0.2,
            )
        )

    assert "example_cold_requests_total 1.0" in host.metrics()
