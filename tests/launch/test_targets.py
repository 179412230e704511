"""Ports of workers' status, and the file that says where the metrics of all programs are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.settings import ClusterSettings, check_settings, status_port
from vswa_plugin.launch.targets import scrape_targets, write_targets
from vswa_plugin.launch.topologies import WorkerGroup


def settings(model_dir: Path, *options: str) -> ClusterSettings:
    groups = (WorkerGroup("prefill", 2), WorkerGroup("decode", 1))
    return ClusterSettings(str(model_dir), "gemma", groups, worker_options=options)


def test_workers_have_status_ports_in_a_row(model_dir: Path) -> None:
    asked = settings(model_dir, "--status-port", "9400")
    check_settings(asked)

    assert [9400, 9401, 9402] == [status_port(asked, number) for number in range(3)]


def test_without_a_port_any_free_one_will_do(model_dir: Path) -> None:
    assert status_port(settings(model_dir), 1) is None
    assert 0 == status_port(settings(model_dir, "--status-port", "0"), 1)


def test_a_port_without_room_for_all_workers_is_refused(model_dir: Path) -> None:
    message = r"--status-port: expected room for 3 workers, .* got 65534 for the first, .* 65536 the last"
    with pytest.raises(ConfigError, match=message):
        check_settings(settings(model_dir, "--status-port", "65534"))
    check_settings(settings(model_dir, "--status-port", "65533"))


def test_targets_are_as_prometheus_reads_them(tmp_path: Path) -> None:
    urls = {"worker-0": "http://127.0.0.1:9400", "router-0": "http://[::1]:8092"}
    file = write_targets(tmp_path, urls)

    assert scrape_targets(urls) == json.loads(file.read_text())
    assert ["127.0.0.1:9400", "[::1]:8092"] == [each["targets"][0] for each in json.loads(file.read_text())]
    assert [file] == list(tmp_path.iterdir())
