"""The simulated caches of vLLM's models: what they reuse is what the reuse rule says of their events."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest

from tests.vllm_cache_helpers import Held
from vswa_plugin.engine.presets import PRESETS, VLLM, rank_setup
from vswa_plugin.host.loading import load_host
from vswa_plugin.simulation.sweep import Bench, Case, Plan
from vswa_plugin.simulation.workloads import made_up

MODELS = [name for name, each in PRESETS.items() if each.engine == VLLM]
#: Blocks of 32 tokens of global attention, little enough that prompts evict others. DeepSeek V4's window of 8
#: has so small blocks, and so many of them in the one pool, that a smaller one is as good.
ROOM = {"deepseek-v4-flash": 200}
#: Models on which a router that counts global groups only is right too: nothing else is there, chunks are
#: longer than most prompts, or blocks are so large that prompts part within the first one.
RIGHT_TOO = ("llama-4-scout", "llama-4-scout-hybrid", "kimi-linear-48b")


@pytest.fixture(scope="module")
def host() -> Any:
    with load_host(environ={}) as host:
        yield host


@pytest.mark.parametrize("name", MODELS)
def test_the_rule_predicts_every_request_from_the_events_before_it(host: Any, name: str) -> None:
    setup = rank_setup(name, ROOM.get(name, 600), 0.5, None, 131_072)
    rank, held = host.simulated_rank(setup), Held(setup.layout)
    reused, served, removed = 0, 0, 0
    for request in islice(made_up("agents", 3), 90):
        if not rank.fits(len(request.prompt), len(request.output)):
            continue
        expected = held.resumable(request.prompt)
        assert expected == rank.would_reuse(request.prompt)
        sequence = rank.open(request.prompt, len(request.output))
        assert sequence is not None
        assert expected == sequence.cached_tokens
        sequence.compute_prompt()
        sequence.finish(request.output)
        events = rank.take_events()
        held.apply(events)
        served += 1
        reused += expected > 0
        removed += sum(event["type"] == "BlockRemoved" for event in events)
    assert served >= 50
    assert reused >= 10
    assert removed > 0


@pytest.mark.parametrize("name", MODELS)
def test_exact_promises_are_true_on_the_way_that_real_events_take(host: Any, name: str) -> None:
    """With several ranks, and several requests under way."""
    bench = Bench(Plan("agents", requests=60, ranks=2), host)
    exact = bench.run(Case(name, ROOM.get(name, 1_200), "exact", 2))
    global_only = bench.run(Case(name, ROOM.get(name, 1_200), "global only", 2))

    assert 1 == exact.true_promises == exact.agreed
    assert exact.hit_rate > 0.1
    assert (name in RIGHT_TOO) == (1 == global_only.true_promises)


@pytest.mark.parametrize("name", MODELS)
def test_a_request_fits_where_its_cache_can_hold_it(host: Any, name: str) -> None:
    small, large = (
        host.simulated_rank(rank_setup(name, blocks, 0.5, None, 20_000)) for blocks in (16, 4_000)
    )

    assert large.fits(10_000, 100)
    assert not large.fits(20_000, 1)
    assert not small.fits(10_000, 100)
    assert small.open(tuple(range(10_000)), 100) is None
