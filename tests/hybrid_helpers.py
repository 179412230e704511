"""Random layouts of groups of any kind and block size."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    unit = draw(st.sampled_from([1, 2, 3]))
    groups = []
    for group_id in range(draw(st.integers(1, 3))):
        size = unit * draw(st.sampled_from([1, 2, 4]))
        kind = draw(st.sampled_from(["full", "sliding", "chunked", "recurrent"]))
        window = draw(st.integers(1, 5 * size)) if kind == "sliding" else None
        chunk = size * draw(st.integers(1, 4)) if kind == "chunked" else None
        # A sliding group that gives a block up and is finer than the alignment: see the next test.
        drops = kind == "full" and draw(st.booleans())
        groups.append(CacheGroup(group_id, window, size, kind, chunk, drops))
    sizes = [group.block_size for group in groups]
    where = Resumption(
        math.lcm(*sizes),
        math.gcd(unit, *sizes),
        lookahead=draw(st.integers(0, 2)),
        spare_last=draw(st.booleans()),
    )
    return CacheLayout(tuple(groups), "vllm_hybrid", "m", resumption=where).check()


@st.composite
def partial_layouts(draw: st.DrawFn) -> CacheLayout:
    """Prefixes that may end inside the blocks of full and recurrent groups; those of others are units."""
    unit, size = draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 8]))
    kinds = draw(st.lists(st.sampled_from(["full", "recurrent", "sliding"]), min_size=1, max_size=3))
    groups = tuple(
        CacheGroup(i, draw(st.integers(1, 5)), unit, kind)
        if kind == "sliding"
        else CacheGroup(i, None, size, kind, None, kind == "full" and draw(st.booleans()))
        for i, kind in enumerate(kinds)
    )
    return CacheLayout(groups, "vllm_hybrid", "m", resumption=Resumption(unit, unit, partial=True)).check()
