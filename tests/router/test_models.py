"""Which workers serve a model together, and how the model is shown for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vswa_plugin.blocks.layout import HASH_SCHEME, CacheGroup
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.engine.contract import MODES
from vswa_plugin.errors import ConfigError
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Entry
from vswa_plugin.router.args import parse
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.models import Models, card_of
from vswa_plugin.router.pools import grouped, not_used, slug_of
from vswa_plugin.router.promises import Promises
from vswa_plugin.selection import Weights


def entry(worker_id: int, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "namespace": "n",
        "component": "c",
        "worker_id": worker_id,
        "mode": "agg",
        "engine": "e",
        "served_model_name": "m",
        "model_path": "/models/m",
        "context_length": 8_192,
        "block_size": 32,
        "rule": "trtllm_v2",
        "hash_scheme": HASH_SCHEME,
        "groups": (CacheGroup(0, None, 32),),
        "epochs": {0: 1_000 + worker_id},
        "total_kv_blocks": 100,
    }
    return Entry(**{**values, **changes})


def test_workers_are_grouped_by_model_and_those_of_other_modes_left_alone() -> None:
    entries = [entry(1), entry(2, served_model_name="other"), entry(3, mode="prefill"), entry(4)]

    def workers(*modes: Any) -> dict[str, list[int]]:
        groups = grouped(entries, *modes)
        return {name: [each.worker_id for each in group.used] for name, group in groups.items()}

    assert workers() == {"m": [1, 4], "other": [2]}
    assert workers(("prefill", "decode")) == {"m": [3]}
    assert workers(MODES) == {"m": [1, 3, 4], "other": [2]}


@pytest.mark.parametrize(("field", "value"), [("block_size", 16), ("hash_scheme", "other")])
def test_a_worker_that_hashes_otherwise_is_refused_with_the_reason(field: str, value: Any) -> None:
    group = grouped([entry(1, **{field: value}), entry(2), entry(3)])["m"]

    assert [each.worker_id for each in group.used] == [2, 3]
    ((refused, reason),) = group.refused
    assert refused.worker_id == 1
    assert str(value) in reason
    assert "tokens_per_block" in reason


ODD: list[tuple[dict[str, Any], str]] = [
    ({"namespace": "a.b"}, "namespace: expected letters"),
    ({"component": "*"}, "component: expected letters"),
    ({"block_size": 0}, "block_size: expected at least 1, got 0"),
    ({"epochs": {}}, "epochs: expected one of each dp_rank"),
    ({"epochs": {-1: 5}}, "dp_rank: expected a number"),
    ({"worker_id": 1 << 64}, "worker_id: expected a number"),
]


@pytest.mark.parametrize(("changes", "reason"), ODD, ids=[next(iter(changes)) for changes, _ in ODD])
def test_an_odd_entry_is_left_out_with_its_reason_whatever_its_age(
    changes: dict[str, Any], reason: str
) -> None:
    odd = entry(**{"worker_id": 15, "epochs": {0: 1}, **changes})
    entries = [odd, entry(2)]

    assert {"m": [entry(2)]} == {name: list(group.used) for name, group in grouped(entries).items()}
    assert {} == grouped([odd]), "a model of odd entries alone is none"
    ((subject, told),) = not_used(entries, grouped(entries).values()).items()
    assert f"worker {odd.worker_id} is not used" == subject
    assert reason in told


def test_of_as_many_the_oldest_worker_decides_whatever_the_order() -> None:
    old, new = entry(9, epochs={0: 5}), entry(1, epochs={0: 7}, block_size=16)

    for entries in ([old, new], [new, old]):
        assert [each.worker_id for each in grouped(entries)["m"].used] == [9]


def test_a_model_is_shown_with_what_all_its_workers_can_do() -> None:
    used = grouped(
        [
            entry(1, context_length=4_096, epochs={0: 1, 1: 1}, tool_call_parser="t", reasoning_parser="r"),
            entry(2),
        ]
    )["m"].used
    card = card_of("m", used)

    assert (card.name, card.model_path, card.block_size) == ("m", "/models/m", 32)
    assert (card.context_length, card.total_kv_blocks, card.data_parallel_size) == (4_096, 200, 2)
    assert (card.tool_call_parser, card.reasoning_parser) == ("t", "r")


def test_models_have_different_endpoints_also_where_their_names_look_alike() -> None:
    names = ["gemma-3", "Gemma 3", "gemma_3", "google/gemma-3", "gemma"]

    assert slug_of("gemma-3") == "gemma-3"
    assert len({slug_of(name) for name in names}) == len(names)
    assert all(set(slug_of(name)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_the_defaults_are_dynamos_and_the_workers_share_the_routers_namespace() -> None:
    args = parse([], {})

    assert args.weights == Weights()
    assert str(args.endpoint) == "dynamo.router.generate"
    assert args.namespace == "dynamo"
    assert args.served_model_name is None
    assert parse(["--namespace", "all"], {}).namespace is None
    assert parse(["--endpoint", "dyn://a.b.c", "--namespace", "w"], {}).namespace == "w"


def test_knobs_come_from_options_or_from_dynamos_variables() -> None:
    environ = {
        "DYN_ROUTER_TEMPERATURE": "0.5",
        "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT": "0.9",
        "DYN_ROUTER_ASSUME_KV_REUSE": "false",
        "NATS_SERVER": "nats://n:1",
    }
    args = parse(["--overlap-score-credit", "0.7", "--router-track-output-blocks"], environ)

    assert args.weights == Weights(
        router_temperature=0.5, overlap_score_credit=0.7, assume_kv_reuse=False, track_output_blocks=True
    )
    assert args.nats_server == "nats://n:1"
    assert parse(["--no-router-track-prefill-tokens"], {}).weights == Weights(track_prefill_tokens=False)
    assert parse(["--router-kv-overlap-score-credit", "0.7"], {}).weights.overlap_score_credit == 0.7


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--router-temperature", "-1"], {}, "router_temperature: expected a finite number"),
        ([], {"DYN_ROUTER_TEMPERATURE": "warm"}, "DYN_ROUTER_TEMPERATURE: expected a number, got 'warm'"),
        ([], {"DYN_ROUTER_ASSUME_KV_REUSE": "maybe"}, "expected true or false, got 'maybe'"),
        (["--endpoint", "dyn://x"], {}, "--endpoint: expected dyn://namespace.component.endpoint"),
        (["--namespace", "a.b"], {}, "--namespace"),
        (["--log-level", "infos"], {}, "did you mean 'info'"),
        (["--heartbeat", "0"], {}, "--heartbeat"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_connection(
    argv: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(argv, environ)
    assert message in str(refused.value)


def test_taints_reach_the_pool_and_a_worker_that_shows_the_model_itself_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def opened(*_: Any) -> Any:
        return object()

    async def unshown(*_: Any) -> None:
        return None

    monkeypatch.setattr("vswa_plugin.router.models.WorkerClient.open", opened)
    monkeypatch.setattr(Models, "_show", unshown)
    hidden, visible = entry(1, visible=False, taints=("spot", "old")), entry(2)
    forwarder = Forwarder(
        Decider(WindowIndex(), Weights(), namespaced_sequence_hashes), Promises(), lambda rank: True
    )
    models = Models(None, {"1": hidden, "2": visible}, EndpointName.parse("dyn://n.c.e"), forwarder)
    asyncio.run(models.update())

    assert {1: {"spot", "old"}, 2: set()} == forwarder.models["m"].pool.taints
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert ["worker 2 shows 'm' itself"] == [text.partition(":")[0] for text in warned]


class _Client:
    def __init__(self) -> None:
        self.streams, self.given_up = 1, list[str]()

    def busy(self, worker_id: int) -> bool:
        return bool(self.streams)

    def give_up(self, worker_id: int, reason: str) -> None:
        self.given_up.append(reason)


@pytest.mark.parametrize(
    ("silent", "back", "streams", "given_up"),
    [(True, False, 1, 1), (False, False, 1, 0), (True, True, 1, 0), (True, False, 0, 0)],
    ids=["lost", "draining", "back again", "nothing under way"],
)
def test_streams_of_a_worker_that_left_and_is_silent_are_given_up_once(
    monkeypatch: pytest.MonkeyPatch, silent: bool, back: bool, streams: int, given_up: int
) -> None:
    client, heard = _Client(), {"silent": False}

    async def opened(*_: Any) -> Any:
        return client

    async def unshown(*_: Any) -> None:
        return None

    monkeypatch.setattr("vswa_plugin.router.models.WorkerClient.open", opened)
    monkeypatch.setattr(Models, "_show", unshown)
    forwarder = Forwarder(
        Decider(WindowIndex(), Weights(), namespaced_sequence_hashes), Promises(), lambda rank: True
    )
    entries = {"1": entry(1), "2": entry(2)}
    models = Models(
        None,
        entries,
        EndpointName.parse("dyn://n.c.e"),
        forwarder,
        silent=lambda rank: rank.worker_id == 1 and heard["silent"],
    )

    async def life() -> None:
        await models.update()
        left = entries.pop("1")
        await models.update()
        assert not client.given_up  # still heard of
        if back:
            entries["1"] = left
            await models.update()
        client.streams, heard["silent"] = streams, silent
        await models.update()
        await models.update()

    asyncio.run(life())
    assert given_up == len(client.given_up)
