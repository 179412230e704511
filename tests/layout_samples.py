"""Layouts of any kind, as vLLM's hybrid manager may have them."""

from __future__ import annotations

import msgspec
from hypothesis import strategies as st

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Resumption
from vswa_plugin.blocks.search import searches


@st.composite
def groups(draw: st.DrawFn, unit: int, *, partial: bool) -> list[CacheGroup]:
    drops = draw(st.booleans())
    made: list[CacheGroup] = []
    for group_id in range(draw(st.integers(1, 3))):
        # Chunked groups alone need nothing at the start of a chunk: a promise there would have no evidence.
        kind = draw(st.sampled_from(["full", "sliding", "recurrent", *["chunked"] * bool(made)]))
        # Where prefixes end inside blocks, only those of full and recurrent groups are larger than a unit.
        size = unit * (1 if partial and kind in ("sliding", "chunked") else draw(st.integers(1, 4)))
        made.append(
            CacheGroup(
                group_id,
                draw(st.integers(1, 5 * size)) if kind == "sliding" else None,
                size,
                kind if kind in ("chunked", "recurrent") else None,
                size * draw(st.integers(1, 4)) if kind == "chunked" else None,
                drops and kind != "recurrent" and draw(st.booleans()),
            )
        )
    return made


@st.composite
def layouts(draw: st.DrawFn) -> CacheLayout:
    unit, partial = draw(st.integers(1, 4)), draw(st.integers(0, 3)) == 0
    made = draw(groups(unit, partial=partial))
    if searches(
        CacheLayout(tuple(made), "vllm_hybrid", "m")
    ):  # what vLLM finds there is recorded: test_search.py
        made = [
            msgspec.structs.replace(group, drops_last=group.drops_last and group.kind == "full")
            for group in made
        ]
    layout = CacheLayout(tuple(made), "vllm_hybrid", "m")
    drops = any(group.drops_last for group in made)
    where = Resumption(
        unit if partial else layout.block_size,
        unit,
        partial,
        0 if drops else draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, layout.block_size])),
    )
    return CacheLayout(tuple(made), "vllm_hybrid", "m", resumption=where).check()
