"""The registry against a real etcd."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.conftest import Brokers, Run
from vswa_plugin.embedded import start_etcd
from vswa_plugin.errors import ConfigError, ConnectError, ProtocolError
from vswa_plugin.layout import CacheGroup
from vswa_plugin.processes import free_port
from vswa_plugin.registry import Entry, decode_entry, encode_entry
from vswa_plugin.registry.etcd import EtcdRegistry, parse_endpoints

ENTRY = Entry(
    namespace="ns",
    component="backend",
    worker_id=0xABC,
    mode="agg",
    engine="gemma3_cpu",
    served_model_name="gemma",
    model_path="/models/gemma",
    context_length=8192,
    block_size=32,
    rule="trtllm_v2",
    hash_scheme="dynamo-xxh3-1337",
    groups=(CacheGroup(0, 512, 32), CacheGroup(1, None, 32)),
    epochs={0: 2**63, 1: 5},
    total_kv_blocks=100,
)


def test_an_entry_survives_the_registry_and_newer_fields_are_ignored() -> None:
    assert decode_entry("k", encode_entry(ENTRY)) == ENTRY
    newer = msgspec.json.encode({**msgspec.to_builtins(ENTRY), "new_field": 1})
    assert decode_entry("k", newer) == ENTRY


def test_a_malformed_entry_is_named_by_key_and_field() -> None:
    with pytest.raises(ProtocolError, match=r"expected a worker entry at some/key, .*namespace"):
        decode_entry("some/key", b"{}")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("http://a:1,b:2", [("a", 1), ("b", 2)]),
        (" a , https://b:3", [("a", 2379), ("b", 3)]),
    ],
)
def test_endpoints_are_a_list_of_urls(text: str, parsed: list[tuple[str, int]]) -> None:
    assert parse_endpoints(text) == parsed


@pytest.mark.parametrize("text", ["", " , ", "ftp://a:1", "http://a:port", "http://:1"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ETCD_ENDPOINTS: expected"):
        parse_endpoints(text)


def test_an_entry_is_there_from_join_to_leave(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[list[Entry]]:
        worker, router = EtcdRegistry(brokers.etcd_endpoints), EtcdRegistry(brokers.etcd_endpoints)
        seen = []
        await worker.join(ENTRY)
        seen.append(await _mine(router))
        await worker.join(msgspec.structs.replace(ENTRY, epochs={0: 9}))
        seen.append(await _mine(router))
        await worker.leave()
        seen.append(await _mine(router))
        await router.leave()
        return seen

    joined, replaced, left = run(body())

    assert joined == [ENTRY]
    assert [entry.epochs for entry in replaced] == [{0: 9}]
    assert left == []


def test_a_dead_worker_leaves_with_its_lease_and_a_live_one_stays(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> None:
        dead, live = EtcdRegistry(brokers.etcd_endpoints, 1), EtcdRegistry(brokers.etcd_endpoints, 1)
        other = msgspec.structs.replace(ENTRY, worker_id=2)
        await dead.join(ENTRY)
        await live.join(other)
        dead._keepalive.cancel()  # type: ignore[union-attr]  # as a crash would
        async with asyncio.timeout(15):
            while await _mine(live) != [other]:
                await asyncio.sleep(0.05)
        await live.leave()

    run(body())


def test_a_malformed_entry_of_somebody_else_is_left_out(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[Entry]:
        registry = EtcdRegistry(brokers.etcd_endpoints)
        await registry.join(ENTRY)
        await registry._call(lambda client: client.put("vswa/v1/workers/ns/backend/bad", b"{"))
        found = await _mine(registry)
        await registry._call(lambda client: client.delete("vswa/v1/workers/ns/backend/bad"))
        await registry.leave()
        return found

    assert run(body()) == [ENTRY]


def test_the_second_endpoint_is_used_when_the_first_does_not_answer(run: Run[Any], brokers: Brokers) -> None:
    async def body() -> list[Entry]:
        registry = EtcdRegistry(f"http://127.0.0.1:{free_port()},{brokers.etcd_endpoints}")
        await registry.join(ENTRY)
        found = await _mine(registry)
        await registry.leave()
        return found

    assert run(body()) == [ENTRY]


def test_an_etcd_that_is_not_there_is_named_with_the_setting(run: Run[Any]) -> None:
    port = free_port()

    with pytest.raises(ConnectError, match=rf"expected etcd at 127.0.0.1:{port} .ETCD_ENDPOINTS."):
        run(EtcdRegistry(f"http://127.0.0.1:{port}").entries())


def test_a_worker_joins_again_when_etcd_came_back_without_its_lease(run: Run[Any], tmp_path: Path) -> None:
    async def body() -> None:
        port = free_port()
        first, url = await start_etcd(tmp_path, tmp_path / "one", port)
        registry = EtcdRegistry(url, lease_ttl_s=1)
        await registry.join(ENTRY)
        first.kill()
        await first.wait()
        second, _ = await start_etcd(tmp_path, tmp_path / "two", port)  # an empty one
        watcher = EtcdRegistry(url)
        async with asyncio.timeout(20):
            while await _mine(watcher) != [ENTRY]:
                await asyncio.sleep(0.05)
        await registry.leave()
        await watcher.leave()
        await second.stop()

    run(body())


def test_etcd3_imports_beside_a_modern_protobuf_without_any_process_wide_switch() -> None:
    code = (
        "import google.protobuf, os; "
        "assert int(google.protobuf.__version__.split('.')[0]) >= 4; "
        "import vswa_plugin.registry.etcd; import etcd3; "
        "assert 'PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION' not in os.environ; "
        "print(etcd3.etcdrpc.PutRequest(key=b'k').key)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:google", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "b'k'"), done.stderr


async def _mine(registry: EtcdRegistry) -> list[Entry]:
    return [entry for entry in await registry.entries() if entry.namespace == "ns"]
