"""The list of relayed workers, and which of Dynamo's instances one is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.dynamo.client import _host_of
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError
from vswa_plugin.program.model_path import FoundModel
from vswa_plugin.relay.instances import instance_on, one_on_each
from vswa_plugin.relay.listed import Defaults, Listed, listed, listed_in

PLACE = EndpointName("dynamo", "backend", "generate")
DEFAULTS = Defaults("vllm", "agg", PLACE, None, None, True, {"max_model_len": 100})
ONE = {"events": "tcp://10.0.0.5:5557", "model_path": "/m/gemma"}


def find(path: str, option: str) -> FoundModel:
    return FoundModel(Path(path), Path(path).name)


def made(given: dict[str, Any], defaults: Defaults = DEFAULTS) -> Listed:
    return listed(Section(given, "fleet.yaml", "workers[0]"), defaults, find)


def test_what_a_worker_does_not_say_is_taken_from_the_command_line() -> None:
    one = made({**ONE, "component": "prefill", "options": {"block_size": 32}})

    assert EndpointName("dynamo", "prefill", "generate") == one.endpoint
    assert ("vllm", "agg", "/m/gemma", "gemma") == (
        one.source.engine, one.source.mode, one.source.model_path, one.source.served_model_name,
    )  # fmt: skip
    assert ({"max_model_len": 100, "block_size": 32}, (0,), None) == (
        one.source.options, one.source.dp_ranks, one.source.replay,
    )  # fmt: skip
    assert (None, "10.0.0.5", False) == (one.worker_id, one.host, one.of_every_host)


@pytest.mark.parametrize(("given", "ranks"), [(3, (0, 1, 2)), ([4, 2], (2, 4)), ([0], (0,))])
def test_ranks_are_a_number_or_a_list(given: Any, ranks: tuple[int, ...]) -> None:
    assert ranks == made({**ONE, "dp_ranks": given}).source.dp_ranks


@pytest.mark.parametrize("ranks", [0, -1, True, 1025, [], [1, 1], [-1], [1024], ["0"], "2", 1.0])
def test_other_ranks_are_refused(ranks: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^workers\[0\]\.dp_ranks: expected a number of data-parallel ranks"
    ):
        made({**ONE, "dp_ranks": ranks})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": None}, r"workers\[0\]\.events: expected the address of its KV events"),
        ({"model_path": None}, r"workers\[0\]\.model_path: expected the directory or name of the model"),
        ({"id": -1}, r"workers\[0\]\.id: expected an integer in"),
        ({"id": 1 << 64}, r"workers\[0\]\.id: expected an integer in"),
        ({"mode": "both"}, r"workers\[0\]\.mode: expected one of"),
        ({"component": "a.b"}, r"workers\[0\]\.component"),
        ({"modle": "x"}, r"unknown option 'workers\[0\]\.modle' in fleet\.yaml: did you mean"),
        ({"replay": "tcp://{host}:1"}, r"workers\[0\]\.replay: expected {host} where events has it"),
        (
            {"events": "tcp://{host}:1", "id": 3},
            r"workers\[0\]\.id: expected none, because {host} stands for",
        ),
        ({"visible": "no"}, r"workers\[0\]\.visible: expected true or false"),
        ({"options": 3}, r"workers\[0\]\.options: expected a mapping"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made({**ONE, **change})


def two(**of_second: Any) -> dict[str, Any]:
    return {"workers": [ONE, {**ONE, "events": "tcp://10.0.0.6:5557", **of_second}]}


def test_workers_on_two_hosts_need_no_id() -> None:
    assert [None, None] == [each.worker_id for each in listed_in(two(), "fleet.yaml", DEFAULTS, find)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"events": ONE["events"]}, "expected an address of its own, got that of workers"),
        ({"events": "tcp://10.0.0.5:5560"}, "expected an id, because discovery cannot tell it from workers"),
    ],
)
def test_workers_that_could_not_be_told_apart_are_refused(second: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listed_in(two(**second), "fleet.yaml", DEFAULTS, find)


def test_workers_on_one_host_are_told_apart_by_id_or_endpoint() -> None:
    for second in ({"id": 7}, {"component": "other"}):
        assert 2 == len(listed_in(two(events="tcp://10.0.0.5:5560", **second), "f", DEFAULTS, find))
    with pytest.raises(ConfigError, match="expected an id of its own"):
        both = {"workers": [{**ONE, "id": 7}, {**ONE, "events": "tcp://10.0.0.6:1", "id": 7}]}
        listed_in(both, "fleet.yaml", DEFAULTS, find)


@pytest.mark.parametrize("workers", [None, [], {}, "x"])
def test_a_file_without_workers_is_refused(workers: Any) -> None:
    with pytest.raises(ConfigError, match="workers: expected a list of at least one worker"):
        listed_in({"workers": workers}, "fleet.yaml", DEFAULTS, find)


def test_an_entry_for_every_host_is_one_worker_for_each_instance() -> None:
    every = made({**ONE, "events": "tcp://{host}:5557", "replay": "tcp://{host}:5558"})
    one, other = every.of_instance(7, "10.0.0.9"), every.of_instance(8, "fe80::1")

    assert every.of_every_host and not one.of_every_host
    assert (7, "tcp://10.0.0.9:5557", "tcp://10.0.0.9:5558") == (
        one.worker_id, one.source.endpoint, one.source.replay,
    )  # fmt: skip
    assert "tcp://[fe80::1]:5557" == other.source.endpoint


@pytest.mark.parametrize(
    ("host", "found", "expected"),
    [
        ("10.0.0.5", {7: "10.0.0.5", 8: "10.0.0.6"}, 7),
        ("10.0.0.5", {8: "10.0.0.6"}, None),
        ("10.0.0.5", {7: "10.0.0.5", 8: "10.0.0.5"}, None),
        ("10.0.0.5", {7: ""}, None),
        ("127.0.0.1", {7: "127.0.0.1", 8: "10.0.0.6"}, 7),
        ("localhost", {7: "10.0.0.6"}, 7),
        ("localhost", {7: "10.0.0.6", 8: "10.0.0.5"}, None),
        ("", {7: "10.0.0.6"}, 7),
        ("", {}, None),
    ],
)
def test_an_instance_is_taken_only_where_nothing_else_can_be_meant(
    host: str, found: dict[int, str], expected: int | None
) -> None:
    number, why = instance_on(host, found)

    assert expected == number
    assert (number is None) == bool(why)


def test_instances_that_share_a_host_are_left_out() -> None:
    assert ({7: "a"}, {8, 9, 10}) == one_on_each({7: "a", 8: "b", 9: "b", 10: ""})


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1:43277/f3ae/lab/backend/generate", "127.0.0.1"),
        ("tcp://10.0.0.5:1234", "10.0.0.5"),
        ("[fe80::1]:4000/1a", "fe80::1"),
        ("worker-3.pods.local:4000/1a", "worker-3.pods.local"),
        ("a.subject.of.nats", ""),
        ("", ""),
    ],
)
def test_the_host_of_an_instance_is_read_from_its_address(address: str, host: str) -> None:
    assert host == _host_of(address)
