"""``vswa events``: readable per window, and what was missed is said."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from typing import Any

import pytest

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, long_prompt, post
from vswa_plugin.blocks.layout import CacheGroup
from vswa_plugin.cli.events import Follower, _print
from vswa_plugin.cli.main import main
from vswa_plugin.launch.cluster import Cluster
from vswa_plugin.wire.events import Batch, Cleared, Layout, Moved, Removed, Source, Stored, encode
from vswa_plugin.wire.subjects import subject
from vswa_plugin.wire.transport import Transport

Output = pytest.CaptureFixture[str]
SOURCE = Source("ns", "backend", 7)
LAYOUT = Layout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "h", "gemma")


def batch(first: int, *events: Any, epoch: int = 1) -> Batch:
    return Batch(1, epoch, first, 0, events)


def shown(follower: Follower, each: Batch) -> list[str]:
    return follower.lines(SOURCE, follower.read(SOURCE, each))


def test_each_event_is_one_line_with_its_id_and_window() -> None:
    follower = Follower()
    lines = list(
        shown(
            follower,
            batch(
                0,
                LAYOUT,
                Stored(0, 3, 0xAB, (1, 2)),
                Removed(1, (9,)),
                Moved(0, (1,), "host"),
                Cleared(None),
            ),
        )
    )

    assert [line.split()[:2] for line in lines] == [
        ["0", "layout"],
        ["1", "stored"],
        ["2", "removed"],
        ["3", "moved"],
        ["4", "cleared"],
    ]
    assert "window 512    blocks 3..4 after 00000000000000ab on device" in lines[1]
    assert "window global 1 block: 0000000000000009" in lines[2]
    assert "window 512    1 block: 0000000000000001 to host" in lines[3]
    assert "all windows" in lines[4]


def test_a_window_can_be_followed_alone() -> None:
    follower = Follower(window="512")
    lines = shown(follower, batch(0, LAYOUT, Stored(0, 0, None, (1,)), Stored(1, 0, None, (1,))))

    assert [line.split()[1] for line in lines] == ["layout", "stored"]
    assert "window 512" in lines[1]


def test_json_has_the_events_of_the_window_that_is_followed_and_ids_as_text(capsys: Output) -> None:
    far = Source("ns", "backend", 2**64 - 1)
    events = (LAYOUT, Stored(0, 0, None, (1,)), Stored(1, 1, 2**64 - 1, (2**63,)), Cleared(None))
    args = argparse.Namespace(json=True, heartbeats=False)

    assert _print(Follower(window="global"), far, batch(7, *events), args)
    assert not _print(Follower(window="512"), far, batch(7, Stored(1, 0, None, (1,))), args)
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert {"namespace": "ns", "component": "backend", "worker_id": f"{2**64 - 1}", "dp_rank": 0} == told[
        "source"
    ]
    assert [(7, "layout"), (9, "stored"), (10, "cleared")] == [
        (event["event_id"], event["type"]) for event in told["batch"]["events"]
    ]
    stored = told["batch"]["events"][1]
    assert ("ffffffffffffffff", ["8000000000000000"]) == (stored["parent_hash"], stored["sequence_hashes"])
    assert str(far.worker_id) in str(far), "the text has the same spelling"


def test_what_was_missed_is_said_once_and_a_new_epoch_is_no_gap() -> None:
    follower = Follower()
    follower.read(SOURCE, batch(0, LAYOUT))

    assert "gap: 3 events were missed" in shown(follower, batch(4, Removed(0, (1,))))[0]
    assert "gap" not in "".join(shown(follower, batch(5, Removed(0, (2,)))))
    assert "gap" in "".join(shown(follower, batch(8)))
    assert "gap" not in "".join(shown(follower, batch(0, LAYOUT, epoch=2)))


def test_a_group_of_unknown_window_is_shown_by_its_number() -> None:
    assert "group 0" in shown(Follower(), batch(9, Removed(0, (1,))))[0]


def test_a_window_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["events", "--window", "big"])
    assert "--window: expected a number of tokens or 'global', got 'big'" in capsys.readouterr().err


def test_the_command_follows_running_workers_whose_windows_it_learns_from_the_registry(
    run: Run[Any], cluster: Cluster
) -> None:
    async def body() -> tuple[str, int]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vswa_plugin", "events", "--namespace", "e2e", "--json", "--count", "2"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **cluster.env},
        )
        assert process.stderr is not None
        assert b"following" in await process.stderr.readline()
        request = {"model": "gemma", "prompt": long_prompt("followed"), "max_tokens": 2}

        async def ended() -> bool:
            await post(
                cluster, "/v1/completions", {**request, "prompt": request["prompt"] + str(os.urandom(4))}
            )
            return process.returncode is not None

        await eventually(ended, "the command ends after two batches")
        out, _ = await process.communicate()
        return out.decode(), process.returncode or 0

    out, code = run(body())
    shown = [json.loads(line) for line in out.splitlines()]

    assert code == 0
    assert len(shown) == 2
    assert {each["source"]["namespace"] for each in shown} == {"e2e"}
    assert shown[0]["batch"]["events"][0]["type"] in {"stored", "removed"}


def test_readable_lines_of_a_running_worker_name_its_windows(run: Run[Any], cluster: Cluster) -> None:
    async def learn() -> Follower:
        follower = Follower()
        for entry in await cluster.entries():
            follower.learn(entry)
        return follower

    follower = run(learn())
    labels = {follower.label(source, 0) for source in follower.groups}

    assert labels == {"window 512"}


def test_head_gets_its_line_and_ends_the_command(run: Run[Any], brokers: Brokers) -> None:
    """The client of NATS logs what a handler raises and goes on; the command must end nevertheless."""

    async def body() -> tuple[int, str, str]:
        vswa = f"{sys.executable} -m vswa_plugin events --namespace piped --heartbeats"
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", f"set -o pipefail; {vswa} | head -1"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **brokers.env},
        )
        transport = Transport(brokers.nats_server, "test")
        await transport.connect()
        payload = encode(batch(0))

        async def ended() -> bool:
            await transport.publish(subject(Source("piped", "backend", 7), "events"), payload)
            return process.returncode is not None

        await eventually(ended, "the command ends after head")
        await transport.close()
        out, error = await process.communicate()
        return process.returncode or 0, out.decode(), error.decode()

    code, out, error = run(body())

    assert (141, 1) == (code, len(out.splitlines()))
    assert "following; Ctrl-C ends\n" == error
