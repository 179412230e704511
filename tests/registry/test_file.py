"""What is particular to the registry in a directory, and which registry the environment names."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Run
from tests.registry_helpers import ENTRY, FileBackend, Reader, entry, plant_entry, start_worker
from vswa_plugin.errors import ConfigError, ConnectError
from vswa_plugin.launch.processes import Child
from vswa_plugin.registry import PREFIX, Entry, encode_entry
from vswa_plugin.registry import entry_files as entry_files_module
from vswa_plugin.registry.entry_files import EntryFile, Scanner, file_name, key_of, sweep
from vswa_plugin.registry.file import FOLDER, FileRegistry
from vswa_plugin.registry.opening import discovery_backend, open_registry, registry_from_env
from vswa_plugin.worker.__main__ import main
from vswa_plugin.worker.args import parser

REMOTE = msgspec.structs.replace(ENTRY, host="elsewhere")
KEY = ENTRY.key


@pytest.fixture
def backend(tmp_path: Path) -> FileBackend:
    return FileBackend(tmp_path)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_file_name_is_flat_and_leads_back_to_its_key(text: str) -> None:
    name = file_name(PREFIX + text)

    assert key_of(name) == PREFIX + text
    assert "/" not in name


def test_a_killed_worker_is_seen_long_before_its_ttl(
    run: Run[Any], backend: FileBackend, tmp_path: Path
) -> None:
    async def body() -> float:
        router = backend.registry()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            child = await start_worker(backend.where, ENTRY, tmp_path)
            await reader.until_holds(ENTRY)
            began = time.monotonic()
            child.kill()
            await reader.until_holds()
            took = time.monotonic() - began
        await child.wait()
        await router.close()
        return took

    assert run(body()) < FileBackend.ttl_s / 2


def test_a_lock_that_a_forked_child_keeps_does_not_outlive_the_ttl(
    run: Run[Any], backend: FileBackend, tmp_path: Path
) -> None:
    holder = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); time.sleep(60)"
    )

    async def body() -> list[list[Entry]]:
        router = backend.registry(ttl_s=1)
        await plant_entry(backend, ENTRY)
        path = tmp_path / "registry" / FOLDER / file_name(KEY)
        child = await Child.start("holder", [sys.executable, "-c", holder, str(path)], tmp_path)

        async def locked() -> bool:
            return "locked" in child.log_tail()

        await child.until(locked, "locked", 10)
        os.utime(path)
        seen = [await router.entries()]
        os.utime(path, (time.time() - 5, time.time() - 5))
        seen.append(await router.entries())
        child.kill()
        await child.wait()
        await router.close()
        return seen

    assert run(body()) == [[ENTRY], []]


def test_an_entry_of_another_machine_leaves_when_it_was_not_touched_for_a_ttl(
    run: Run[Any], backend: FileBackend
) -> None:
    async def body() -> float:
        router = backend.registry(ttl_s=1)
        await router.entries()
        async with router.watch() as watcher:
            reader = Reader(watcher)
            await plant_entry(backend, REMOTE)
            began = time.monotonic()
            await reader.until_holds(REMOTE)
            await reader.until_holds()
            took = time.monotonic() - began
        await router.close()
        return took

    assert 0.9 < run(body()) < 3


def test_a_step_of_the_wall_clock_takes_nobody_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = EntryFile(tmp_path, KEY)
    file.write(encode_entry(REMOTE))
    scanner = Scanner(tmp_path, 10, "here")
    assert list(scanner.scan(PREFIX)) == [KEY]
    now = time.time_ns()
    monkeypatch.setattr(entry_files_module.time, "time_ns", lambda: now + 3_600 * 10**9)

    assert list(scanner.scan(PREFIX)) == [KEY]
    file.remove()


def test_a_file_from_the_future_lives_for_one_ttl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = EntryFile(tmp_path, KEY)
    file.write(encode_entry(REMOTE))
    os.utime(tmp_path / file_name(KEY), (time.time() + 3600, time.time() + 3600))
    scanner = Scanner(tmp_path, 10, "here")
    assert list(scanner.scan(PREFIX)) == [KEY]
    now = time.monotonic()
    monkeypatch.setattr(entry_files_module.time, "monotonic", lambda: now + 11)

    assert list(scanner.scan(PREFIX)) == []
    file.remove()


def test_without_locks_the_ttl_alone_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(entry_files_module.fcntl, "flock", no_locks)
    file = EntryFile(tmp_path, KEY)
    file.write(encode_entry(ENTRY))

    assert list(Scanner(tmp_path, 10, ENTRY.host).scan(PREFIX)) == [KEY]
    file.remove()


def test_a_reader_sees_a_whole_entry_at_every_moment_of_many_replacements(tmp_path: Path) -> None:
    file = EntryFile(tmp_path, KEY)
    payloads = [encode_entry(entry(ENTRY.worker_id, epoch)) for epoch in range(2)]
    file.write(payloads[0])
    stop = threading.Event()

    def replace() -> None:
        for number in range(10_000):
            if stop.is_set():
                return
            file.write(payloads[number % 2])

    writer = threading.Thread(target=replace)
    writer.start()
    scanner = Scanner(tmp_path, 10, ENTRY.host)
    try:
        for _ in range(1_000):
            (seen,) = scanner.scan(PREFIX).values()
            assert seen in payloads
    finally:
        stop.set()
        writer.join()
        file.remove()


def test_what_is_no_entry_file_is_passed_over(
    run: Run[Any], backend: FileBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vswa_plugin.registry")

    async def body() -> list[Entry]:
        worker = backend.registry()
        await worker.join(ENTRY)
        folder = tmp_path / "registry" / FOLDER
        (folder / "folder.json").mkdir()
        (folder / "notes.txt").write_text("{")
        (folder / ".hidden.json").write_text("{")
        os.mkfifo(folder / "pipe.json")  # to open it must not block
        for _ in range(3):
            found = await worker.entries()
        await worker.close()
        return list(found)

    assert run(body()) == [ENTRY]
    assert caplog.text.count("folder.json") == 1


def test_what_dead_writers_left_is_swept_by_those_that_join(tmp_path: Path) -> None:
    old, live, other = tmp_path / "old.json", tmp_path / "live.json", tmp_path / "other.txt"
    for path in (old, live, other):
        path.write_text("")
    for path in (old, other):
        os.utime(path, (time.time() - 200, time.time() - 200))

    sweep(tmp_path, 100)

    assert sorted(tmp_path.iterdir()) == [live, other]


def test_a_directory_that_cannot_be_made_is_named_with_the_setting(run: Run[Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(
        ConnectError, match=r"at .*file/vswa-v1-workers \(VSWA_REGISTRY\), got Not a directory"
    ):
        run(FileRegistry(tmp_path / "file").entries())


def test_an_idle_watcher_of_a_hundred_workers_costs_little(run: Run[Any], backend: FileBackend) -> None:
    async def body() -> float:
        router = backend.registry()
        for number in range(100):
            await plant_entry(backend, msgspec.structs.replace(REMOTE, worker_id=number))
        scanner = router._scanner
        scanner.scan(PREFIX)
        began = time.process_time()
        for _ in range(20):
            assert len(scanner.scan(PREFIX)) == 100
        return (time.process_time() - began) / 20

    assert run(body()) < 0.04  # a few ms, five times a second


# ---- which registry -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "etcd at 127.0.0.1:2379"),
        ({"VSWA_REGISTRY": "etcd", "ETCD_ENDPOINTS": "http://a:1,http://b:2"}, "etcd at a:1, b:2"),
        ({"VSWA_REGISTRY": "http://c:3", "ETCD_ENDPOINTS": "http://a:1"}, "etcd at c:3"),
        ({"VSWA_REGISTRY": "file:/x/y"}, f"directory /x/y/{FOLDER}"),
        ({"VSWA_REGISTRY": "file:///x%20y"}, f"directory /x y/{FOLDER}"),
        ({"VSWA_REGISTRY": "file:x"}, f"directory {Path.cwd()}/x/{FOLDER}"),
        ({"VSWA_REGISTRY": "file", "DYN_FILE_KV": "/kv"}, f"directory /kv/{FOLDER}"),
        ({"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": "/kv"}, f"directory /kv/{FOLDER}"),
        ({"DYN_DISCOVERY_BACKEND": "file"}, f"directory /tmp/dynamo_store_kv/{FOLDER}"),
        ({"DYN_DISCOVERY_BACKEND": "file", "TMPDIR": "/no"}, f"directory /no/dynamo_store_kv/{FOLDER}"),
        ({"DYN_DISCOVERY_BACKEND": "file", "VSWA_REGISTRY": "etcd"}, "etcd at 127.0.0.1:2379"),
        ({"DYN_DISCOVERY_BACKEND": "kv_store"}, "etcd at 127.0.0.1:2379"),
        ({"DYN_DISCOVERY_BACKEND": "mem", "VSWA_REGISTRY": "file:/x"}, f"directory /x/{FOLDER}"),
    ],
)
def test_the_environment_names_the_registry(environ: dict[str, str], expected: str) -> None:
    assert str(registry_from_env(environ)) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"VSWA_REGISTRY": "etc"}, "VSWA_REGISTRY: unknown registry 'etc': did you mean 'etcd'?"),
        ({"VSWA_REGISTRY": "file:"}, "VSWA_REGISTRY: expected file:DIR or file:///DIR, got 'file:'"),
        ({"VSWA_REGISTRY": "file://host/x"}, "VSWA_REGISTRY: expected file:DIR"),
        (
            {"DYN_DISCOVERY_BACKEND": "mem"},
            "DYN_DISCOVERY_BACKEND: expected a registry beside 'mem', .* set ETCD_ENDPOINTS, or VSWA",
        ),
        ({"ETCD_ENDPOINTS": "ftp://a"}, "ETCD_ENDPOINTS: expected"),
        ({"ETCD_AUTH_USERNAME": "u"}, "ETCD_AUTH_PASSWORD: expected a value because ETCD_AUTH_USERNAME is"),
    ],
)
def test_what_names_no_registry_is_refused_by_its_variable(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry_from_env(environ)


def test_files_need_no_grpc() -> None:
    code = (
        "import sys; from vswa_plugin.registry.opening import open_registry; open_registry('file:/x'); "
        "sys.exit('grpc' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_discovery_and_registry_are_two_settings() -> None:
    environ = {"VSWA_REGISTRY": "file:/x"}

    assert discovery_backend(environ) == "etcd"
    assert discovery_backend({"DYN_DISCOVERY_BACKEND": "kubernetes"}) is None
    assert str(open_registry("etcd", environ)) == "etcd at 127.0.0.1:2379"


def test_the_help_of_the_worker_names_the_variables() -> None:
    said = parser().format_help()

    for name in ("VSWA_REGISTRY", "ETCD_AUTH_PASSWORD", "ETCD_AUTH_CLIENT_KEY", "DYN_FILE_KV", "--registry"):
        assert name in said


@pytest.mark.parametrize("given", ["variable", "argument"])
def test_a_worker_refuses_an_unknown_registry_before_anything_else(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    argv = ["--model-path", str(model_dir)]
    if given == "variable":
        monkeypatch.setenv("VSWA_REGISTRY", "consul")
    else:
        argv += ["--registry", "consul"]

    assert main(argv) == 2
    assert "VSWA_REGISTRY: unknown registry 'consul'. Known: etcd, file" in capsys.readouterr().err


def test_flock_is_what_keeps_an_entry_alive(tmp_path: Path) -> None:
    file = EntryFile(tmp_path, KEY)
    file.write(encode_entry(ENTRY))
    scanner = Scanner(tmp_path, 10, ENTRY.host)
    before = list(scanner.scan(PREFIX))
    fcntl.flock(file._descriptor, fcntl.LOCK_UN)  # type: ignore[arg-type]

    assert (before, list(scanner.scan(PREFIX))) == ([KEY], [])
    file.remove()
