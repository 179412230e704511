"""An installed package whose plugin has the name of one that comes with this project."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import ProtocolError
from vswa_plugin.hookspecs import NAME
from vswa_plugin.host.loading import load_host
from vswa_plugin.host.registered import PluginStatus

OURS = "trtllm_events"
CODE = """from vswa_plugin.hookspecs import hookimpl

@hookimpl
def vswa_metrics():
    return "acme_blocks 1"
"""
LAYOUT = CacheLayout((CacheGroup(0, None, 32),), "trtllm_v2", "m")

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs the package acme-metrics, as pip would leave it, with a module of that name."""
    added: list[str] = []

    def make(module: str) -> None:
        info = tmp_path / "acme_metrics-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-metrics\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{NAME}]\n{OURS} = {module}\n")
        (tmp_path / f"{module}.py").write_text(CODE)
        monkeypatch.syspath_prepend(str(tmp_path))
        added.append(module)

    yield make
    for module in added:
        sys.modules.pop(module, None)


def of_that_name(listed: list[PluginStatus]) -> dict[str, PluginStatus]:
    """By the package that each comes from."""
    return {status.source.split(" ")[0]: status for status in listed if status.name == OURS}


# One module sorts before ours and one behind it.
@pytest.mark.parametrize("module", ["acme_mod", "zz_acme_mod"])
def test_a_package_does_not_take_the_place_of_a_first_party_plugin_by_its_name(
    install: Install, module: str
) -> None:
    install(module)
    with load_host(environ={}) as host:
        listed = of_that_name(host.plugins())

        assert "loaded" == listed["vswa-plugin"].state
        assert "failed" == listed["acme-metrics"].state
        with pytest.raises(ProtocolError, match="data"):  # in the words of TensorRT-LLM's adapter
            host.event_adapter("trtllm", LAYOUT).feed({"event_id": 0})


@pytest.mark.parametrize("module", ["acme_mod", "zz_acme_mod"])
def test_the_refusal_of_a_second_plugin_of_one_name_names_both_packages(
    install: Install, module: str
) -> None:
    install(module)
    with load_host(environ={}) as host:
        (reason,) = [each.reason for each in of_that_name(host.plugins()).values() if each.state == "failed"]

    assert "acme-metrics" in reason
    assert "vswa-plugin" in reason
    assert OURS in reason


def test_a_first_party_plugin_that_cannot_be_imported_is_not_replaced_by_another_packages_of_its_name(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme_mod")
    monkeypatch.setitem(sys.modules, "vswa_plugins.trtllm_events", None)  # its import raises
    with load_host(environ={}) as host:
        states = {package: status.state for package, status in of_that_name(host.plugins()).items()}

    assert {"vswa-plugin": "failed", "acme-metrics": "failed"} == states
