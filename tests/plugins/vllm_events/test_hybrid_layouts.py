"""Adapter, residency, wire and rule, against a simulated cache with groups of any kind and block size."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.vllm_events import VllmEventAdapter

from tests.hybrid_manager import HybridManager, names_of
from tests.layout_samples import layouts
from tests.properties import examples
from vswa_plugin.accuracy.pipeline import EventPipeline
from vswa_plugin.accuracy.scorers import Exact
from vswa_plugin.blocks.hashing import prefix_names
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.engine.predicted import Prompt


@examples(600)
@given(layouts(), st.integers(0, 1 << 32), st.booleans())
def test_what_is_promised_is_what_the_manager_reuses(layout: CacheLayout, seed: int, prompts: bool) -> None:
    """Without prompts, and so without all names, it is no more."""
    random = Random(seed)
    manager, exact = HybridManager(layout, random), Exact()
    pipeline = EventPipeline(layout, lambda: VllmEventAdapter(layout), [exact])
    served: list[list[int]] = [[]]
    # An event does not give the tokens after its last block where it leaves that out: so answers may have
    # names that nothing gives, unless a group lists all.
    dense = any(
        group.kind == "full" and group.block_size == layout.hash_block_size for group in layout.groups
    )
    cut = layout.lookahead > 0 and not dense
    for _ in range(12):
        before = random.choice(served)
        prompt = [*before[: random.randint(0, len(before))], *(random.randrange(3) for _ in range(12))]
        answer = [random.randrange(3) for _ in range(random.randint(1, 12)) if not cut]
        pipeline.settle()
        names = prefix_names(prompt, layout.hash_block_size, layout.lookahead)
        promised, reused = exact.predict(Prompt(prompt, names)), manager.hit(prompt)

        assert promised == reused if prompts else promised <= reused
        if prompts:
            pipeline.prompt(prompt, None, None)
        for event in manager.serve(prompt, answer):
            pipeline.feed(event)
        served.append(prompt + answer)
    assert 0 == pipeline.restarts


@pytest.mark.parametrize("prepared", [True, False])
def test_a_name_that_only_a_prompt_gives_is_known_whether_it_was_prepared_or_not(prepared: bool) -> None:
    layout = CacheLayout((CacheGroup(0, None, 4, "recurrent"),), "vllm_hybrid", "m")
    adapter = VllmEventAdapter(layout)
    manager = HybridManager(
        CacheLayout(layout.groups, "vllm_hybrid", "m", resumption=Resumption(4, 4)), Random(1)
    )
    prompt = list(range(22))
    adapter.prompt(prompt, None, None)
    while prepared and not adapter.prepare():
        pass
    names = names_of(prompt, None, 4, 0)
    event = manager._event(layout.groups[0], prompt, names, [20], 16, 20, 4)

    assert [] == adapter.feed(event), "the host does not know the parent"
    (stored,) = adapter.settle()
    assert (None, tuple(prompt[:20])) == (stored.parent_hash, stored.blocks[0].token_ids)  # type: ignore[union-attr]
    assert [] == adapter.settle()
