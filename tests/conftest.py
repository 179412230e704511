"""Fixtures shared by all tests: real brokers, a real small model, a real cluster. Each starts once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from _pytest.logging import LogCaptureHandler

from tests.properties import register_profiles
from vswa_plugin.launch.brokers import start_etcd, start_nats
from vswa_plugin.launch.cluster import Cluster, ClusterSettings
from vswa_plugin.launch.scratch import SCRATCH_ENV, open_scratch
from vswa_plugin.launch.topologies import WorkerGroup

HERE = Path(__file__).parent
#: What starts servers or programs, or runs long, is not quick: these folders and files, and these fixtures.
NOT_QUICK = {
    "accuracy",
    "cases",
    "cluster",
    "conformance",
    "endurance",
    "launch",
    "registry",
    "simulation",
    "testing",
} | {
    "live",
    "test_nats_auth",
    "test_nats_permissions",
    "test_worker_life",
    "test_model_path",
    "test_hostile_files",
    "test_termination",
    "test_disagg_soak",
    "test_recorder_traces",
    "test_contract_hooks",
    "test_exit_codes",
    "test_plugin_options",
    "test_schema",
    "test_live_page",
    "test_deep_chains",
    # Recorded traces, replayed whole.
    "test_unannounced_traces",
    "test_v1_traces",
    "test_v2_traces",
    "test_scorer",
    "test_simulate",
}
SERVERS = {"brokers", "cluster"}
#: Files that take long and rarely break: many programs, or faults that show after a time; marked ``long``.
LONG = {
    HERE / "cli/test_hostile_values.py",
    HERE / "cluster/test_decode_loss.py",
    HERE / "cluster/test_demo_runs.py",
    HERE / "cluster/test_metrics_pages.py",
    HERE / "cluster/test_monitoring.py",
    HERE / "cluster/test_request_fields.py",
    HERE / "cluster/test_router_windows.py",
    HERE / "cluster/test_tracing.py",
    HERE / "conformance/test_faults.py",
    HERE / "conformance/test_registry_faults.py",
    HERE / "files/test_hostile_files.py",
    HERE / "launch/test_endings.py",
    HERE / "plugins/tensorrt_llm/test_guide.py",
}
T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

register_profiles()


def pytest_configure(config: pytest.Config) -> None:
    for folder in sorted({path.parent for path in HERE.rglob("test_*.py")} - {HERE}):
        for name in folder.relative_to(HERE).parts:
            config.addinivalue_line("markers", f"{name}: what is in the folders of that name")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test is marked with the names of its folders, and with ``quick`` or ``long`` where it is."""
    for item in items:
        folders = item.path.parent.relative_to(HERE).parts if item.path.is_relative_to(HERE) else ()
        for name in folders:
            item.add_marker(name)
        if item.path in LONG:
            item.add_marker("long")
        elif not (NOT_QUICK & {*folders, item.path.stem} or SERVERS & set(getattr(item, "fixturenames", ()))):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Whatever a test starts ends with the tests, also where they are killed."""
    with open_scratch("pytest"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> Iterator[None]:
    """nohup has SIGHUP ignored, which our programs respect, and their children inherit."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brokers and plugin switches of whoever runs the tests must not decide what passes."""
    for name in list(os.environ):
        if name.startswith(("NATS_", "ETCD_", "VSWA_", "DYN_", "OTEL_")) and name not in (
            "VSWA_KERNEL",
            SCRATCH_ENV,
        ):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine on one event loop that lives as long as the session, as its children need."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test loop", daemon=True)
    thread.start()

    def run_there(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=120)

    yield run_there
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@dataclass(frozen=True)
class Brokers:
    nats_server: str
    etcd_endpoints: str

    @property
    def env(self) -> dict[str, str]:
        return {"NATS_SERVER": self.nats_server, "ETCD_ENDPOINTS": self.etcd_endpoints}


@pytest.fixture(scope="session")
def brokers(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    folder = tmp_path_factory.mktemp("brokers")
    nats, nats_server = run(start_nats(folder))
    etcd, etcd_endpoints = run(start_etcd(folder, folder / "data"))
    yield Brokers(nats_server, etcd_endpoints)
    run(nats.stop())
    run(etcd.stop())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3: window 512 and global, context 8,192."""
    from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint

    directory = tmp_path_factory.mktemp("model") / "gemma"
    make_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def cluster(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Dynamo's frontend and two workers, with status ports."""
    settings = ClusterSettings(
        model_path=str(model_dir),
        served_model_name="gemma",
        namespace="e2e",
        groups=(WorkerGroup("agg", 2, override={"gemma3_cpu": {"kv_blocks": {"512": 128, "global": 256}}}),),
        worker_options=("--status-port", "0"),
    )
    made = Cluster(settings, tmp_path_factory.mktemp("cluster"))
    made.nats_server, made.etcd_endpoints = brokers.nats_server, brokers.etcd_endpoints
    try:
        run(made.start())
        yield made
    finally:
        codes = run(made.stop())
    assert all(code == 0 for code in codes.values()), codes


@pytest.fixture(autouse=True)
def _no_log_handler_stays() -> Iterator[None]:
    """A program that ran in a test leaves its handler, whose stream ends with the test."""
    before = list(logging.root.handlers)
    yield
    for handler in list(logging.root.handlers):
        if handler not in before and not isinstance(handler, LogCaptureHandler):
            logging.root.removeHandler(handler)
