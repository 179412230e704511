"""The picture docs/two-windows.svg; ``python -m tests.two_windows > docs/two-windows.svg`` draws it again.

What it shows is worked out by the reuse rule and the index, not written down.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Rank, Stored

SIZE, BLOCKS = 32, 8
GROUPS = (CacheGroup(0, None, SIZE), CacheGroup(1, 2 * SIZE, SIZE))
#: Blocks that each group holds, as in the README.
HELD = {0: range(8), 1: (3, 4, 6, 7)}
CELL, LEFT = 46, 176
_STYLE = """
  text { font: 14px system-ui, 'DejaVu Sans', sans-serif; fill: #1b2430; }
  .faint { fill: #5a6675; } .big { font-size: 16px; font-weight: 600; }
  .held { fill: #a9d8c0; } .needed { fill: #2f9e68; } .none { fill: #e7eaef; }
  .edge { stroke: #1b2430; stroke-width: 3; }
  .wrong { stroke: #b3261e; stroke-width: 3; stroke-dasharray: 5 4; }
  .wrong-text { fill: #b3261e; }
"""


def reused(blocks: int) -> tuple[int, dict[int, range]]:
    """Of a prompt that shares so many blocks: blocks that are reused, and what each group needs for it."""
    rank = Rank(1)
    index = WindowIndex()
    index.join(rank, CacheLayout(GROUPS, "trtllm_v2", "m"))
    tokens = list(range(BLOCKS * SIZE))
    names = sequence_hashes_of_tokens(tokens, SIZE)
    for group, held in HELD.items():
        for block in held:
            index.apply(rank, Stored(group, block, None, (names[block],)))
    asked = [*tokens[: blocks * SIZE], 9_999]
    (found,) = index.explain(sequence_hashes_of_tokens(asked, SIZE), len(asked))
    needs = {each.group.group_id: range(*(each.needed or (0, 0))) for each in found.groups}
    return found.boundary, needs


def picture() -> str:
    """The SVG."""
    width, height = LEFT + BLOCKS * CELL + 200, 412
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    lines = [head, "<title>Two cache groups of one worker, and what it reuses of two prompts</title>"]
    lines += [f"<style>{_STYLE}</style>", f'<rect width="{width}" height="{height}" rx="10" fill="#fff"/>']
    lines.append(_text(20, 30, "One worker: a global window, and a sliding one of 2 blocks", "big"))
    for x, kind, text in ((20, "held", "held"), (100, "needed", "needed, and held"), (260, "none", "gone")):
        lines += [_box(x, 42, 14, 14, kind), _text(x + 20, 54, text)]
    for row, shared in enumerate((8, 6)):
        lines += _prompt(96 + row * 180, shared)
    return "\n".join([*lines, "</svg>", ""])


def _prompt(top: int, shared: int) -> Iterator[str]:
    boundary, needs = reused(shared)
    alone = next((at for at in range(shared) if at not in HELD[0]), shared)
    beside = LEFT + BLOCKS * CELL + 10
    yield _text(20, top, f"A prompt that shares {shared} blocks: the engine reuses {boundary}", "big")
    for block in range(BLOCKS):
        yield _text(LEFT + block * CELL + 16, top + 22, str(block), "faint")
    for row, (group, label) in enumerate(((0, "global layers"), (1, "sliding layers"))):
        y = top + 30 + row * 42
        yield _text(20, y + 22, label)
        for block in range(BLOCKS):
            kind = "needed" if block in needs[group] else "held" if block in HELD[group] else "none"
            yield _box(LEFT + block * CELL, y, CELL - 4, 34, kind)
    yield _line(LEFT + boundary * CELL - 2, top, "edge")
    yield _text(beside, top + 52, f"resumes at block {boundary}")
    if alone != boundary:
        yield _line(LEFT + alone * CELL - 2, top, "wrong")
        yield _text(beside, top + 78, "the global layers alone", "wrong-text")
        yield _text(beside, top + 96, f"would promise {alone}", "wrong-text")


def _text(x: int, y: int, text: str, kind: str = "plain") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{text}</text>'


def _box(x: int, y: int, width: int, height: int, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" class="{kind}"/>'


def _line(x: int, top: int, kind: str) -> str:
    return f'<line x1="{x}" x2="{x}" y1="{top + 26}" y2="{top + 110}" class="{kind}"/>'


if __name__ == "__main__":
    sys.stdout.write(picture())
