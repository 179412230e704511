"""From the engine's KV events to a router's prediction, and back to what the engine then reuses.

The stand-in's caches are those of the embedded engine, by the rules of manager V2 or V1; nothing here asks
them what they hold.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm import polling
from vswa_plugins.tensorrt_llm.lora import Adapter, Attribution
from vswa_plugins.trtllm_events import TrtllmEventAdapter, chain_keys, salt_id

from tests.tensorrt_llm_helpers import (
    NIXL,
    OPTIONS,
    Installer,
    Router,
    Started,
    asked,
    cached_of,
    workload,
)
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_package import BS, LLM
from tests.trtllm_events_helpers import LAYOUT, block
from vswa_plugin.engine.contract import BlocksStored

FEWER = "fewer promised than reused"
EXACT, ONE_SHORT = "exact", "more is reused: up to one token before the edge of some other block"


def fare(started: Started, seed: int, requests: int, ranks: int = 1) -> tuple[Counter[str], int]:
    """How predictions fare, in whole blocks; how many blocks were reused."""
    router = Router(started.engine.info)
    fared: Counter[str] = Counter()
    reused = 0
    for number, (prompt, new) in enumerate(workload(seed, requests)):
        router.listen(started.settled())
        rank = number % ranks
        predicted = router.predicted(prompt, rank) // BS
        routing = {"routing": {"dp_rank": rank}} if ranks > 1 else {}
        cached = cached_of(started.ask(asked(prompt, new, **routing)))
        # The one thing here that hashes cannot show: see the module docstring of vswa_plugin.blocks.reuse.
        one_short = predicted < cached // BS and cached % BS == BS - 1
        if predicted == cached // BS:
            fared[EXACT] += 1
        elif one_short:
            fared[ONE_SHORT] += 1
        else:
            fared[FEWER if predicted < cached // BS else f"{predicted} promised, {cached // BS} reused"] += 1
        reused += cached // BS
    assert 0 == sum(residency.unattributed for residency in router.residency.values())
    return fared, reused


V1_OPTIONS: dict[str, Any] = copy.deepcopy(OPTIONS)
V1_OPTIONS["kv_cache_config"]["use_kv_cache_manager_v2"] = False


@pytest.fixture
def start(install_standin: Installer, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts an engine by the rules of one manager."""
    made: list[Started] = []
    monkeypatch.setattr(polling, "MIN_PAUSE_S", 0.001)
    monkeypatch.setattr(polling, "MAX_PAUSE_S", 0.002)

    def start_kind(kind: str, blocks: tuple[int, int] = LLM.blocks, **more: Any) -> Started:
        install_standin("1.2.1" if kind == "v1_contiguous" else "1.3.0rc29")
        monkeypatch.setattr(LLM, "kind", kind)
        monkeypatch.setattr(LLM, "blocks", blocks)
        options = OPTIONS if kind == "v2" else V1_OPTIONS
        made.append(Started(model, options | more))
        return made[-1]

    yield start_kind
    for started in made:
        started.engine.stop()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("kind", "blocks"), [("v2", (24, 70)), ("v1", (80, 120)), ("v1_contiguous", (24, 70))]
)
def test_predicted_is_what_the_engine_reuses(
    start: Any, kind: str, blocks: tuple[int, int], seed: int
) -> None:
    started = start(kind, blocks)
    fared, reused = fare(started, seed, 120)

    assert f"trtllm_{kind}" == started.engine.info.layout.rule
    # What leaves V1's sliding windows without an event is inferred.
    assert {EXACT, ONE_SHORT} | ({FEWER} if kind == "v1" else set()) >= fared.keys()
    assert fared[EXACT] >= 119
    assert reused > 150


@pytest.mark.parametrize(("seed", "exact"), [(0, 116), (1, 119)])
def test_v1_is_predicted_worse_where_a_sliding_pool_holds_little_more_than_one_prompt(
    start: Any, seed: int, exact: int
) -> None:
    """What leaves without an event is inferred from what must have left before, see docs/tensorrt-llm.md.

    A prompt that holds blocks which would be the next to go is not seen to hold them.
    """
    fared, reused = fare(start("v1", (24, 70)), seed, 120)

    assert exact <= fared[EXACT]
    assert reused > 150


def test_each_attention_dp_rank_is_predicted_by_its_own_events(start: Any) -> None:
    started = start("v2", tensor_parallel_size=2, enable_attention_dp=True)
    fared, reused = fare(started, 1, 120, ranks=2)

    assert {EXACT, ONE_SHORT} >= fared.keys()
    assert fared[EXACT] >= 118
    assert reused > 50


def test_a_decode_worker_tells_what_it_received_and_its_sliding_blocks_hang_on_global_ones(
    install_standin: Installer, model: Path
) -> None:
    install_standin("1.3.0rc29")
    prefill, decode = (Started(model, OPTIONS | NIXL, mode) for mode in ("prefill", "decode"))
    router = Router(decode.engine.info)
    prompt = list(range(41))
    (chunk,) = prefill.ask(asked(prompt))
    decode.ask(asked(prompt, 3, prefill_result={"disaggregated_params": chunk["disaggregated_params"]}))
    router.listen(decode.settled())
    for started in (prefill, decode):
        started.engine.stop()

    assert {0: 2, 1: 10} == router.residency[0].counts()
    assert 0 == router.residency[0].unattributed
    assert 40 == router.predicted([*prompt[:40], 9, 9, 9])


# -- LoRA and salts --------------------------------------------------------------------------------

LEGAL = Adapter("legal", 7, "/models/legal")
PROMPT = list(range(12))


def told(attribution: Attribution, keys: list[int], parent: int | None = None) -> list[Any]:
    """Who the adapter says the blocks of ``PROMPT`` under these names belong to."""
    blocks = [block(key, PROMPT[i * BS : i * BS + BS]) for i, key in enumerate(keys)]
    data = {"type": "stored", "parent_hash": parent, "blocks": blocks}
    event = {"event_id": 0, "window_size": 8, "layer_group_id": 0, "hash_algo": "v1_block_key", "data": data}
    before = copy.deepcopy(event)
    adapter = TrtllmEventAdapter(LAYOUT)
    said = [
        (each.lora_name, each.cache_salt, len(each.blocks))
        for each in adapter.feed(attribution.annotate(event))
        if isinstance(each, BlocksStored)
    ]
    assert before == event, "an event is not changed by reading it"
    return said


def test_blocks_of_an_adapter_are_told_by_the_chain_noted_at_admission() -> None:
    attribution = Attribution({"legal": LEGAL}, BS)
    attribution.note(PROMPT, LEGAL, None)
    keys = chain_keys(PROMPT, BS, LEGAL.number)

    assert [("legal", None, 3)] == told(attribution, keys)


def test_what_is_generated_belongs_to_whom_the_prompt_belongs_to() -> None:
    attribution = Attribution({"legal": LEGAL}, BS)
    attribution.note(PROMPT[:8], LEGAL, None)
    prompt, (answer, more) = chain_keys(PROMPT[:8], BS, 7), (chain_keys(PROMPT, BS, 7)[2], 5)
    assert [("legal", None, 2)] == told(attribution, prompt)
    event = {"data": {"type": "stored", "parent_hash": prompt[1], "blocks": [{"block_hash": answer}]}}
    later = {"data": {"type": "stored", "parent_hash": answer, "blocks": [{"block_hash": more}]}}

    assert ["legal", "legal"] == [attribution.annotate(each)["data"]["lora_name"] for each in (event, later)]


def test_a_block_that_cannot_be_attributed_is_left_out_and_plain_ones_are_not() -> None:
    attribution = Attribution({"legal": LEGAL}, BS)

    assert [] == told(attribution, chain_keys(PROMPT, BS, LEGAL.number))
    assert [(None, None, 3)] == told(attribution, chain_keys(PROMPT, BS))


def test_a_salt_that_the_event_does_not_name_is_added() -> None:
    attribution = Attribution({}, BS)
    keys = chain_keys(PROMPT, BS, None, salt_id("s"))
    assert [(None, None, 3)] == told(attribution, keys)
    attribution.note(PROMPT, None, "s")

    assert [(None, "s", 3)] == told(attribution, keys)


def test_a_request_names_its_adapter_to_the_engine_and_its_chain_is_noted(start: Any) -> None:
    started = start("v2", enable_lora=True, vswa={"lora_adapters": {"legal": "/models/legal"}})
    started.ask(asked(PROMPT, routing={"lora_name": "legal"}))
    request = started.llm.requests[0].arguments["lora_request"]

    assert ("legal", 1, "/models/legal") == (request.lora_name, request.lora_int_id, request.lora_path)
    assert set(chain_keys(PROMPT, BS, 1)) == set(started.engine._attribution._noted)
