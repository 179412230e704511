"""The picture of ``vswa explain``: the blocks of a prompt per rank and window, as wide as the terminal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from vswa_plugin.errors import one_line
from vswa_plugin.index import Explanation, GroupExplanation

NEEDED, HELD, MISSING, GONE, EDGE = range(5)
#: A character for each, and what stands for them where the output cannot have it; and colours.
_SHAPES = ("█", "▒", "x", "·", "|")
_PLAIN = ("#", "+", "x", ".", "|")
_COLOURS = ("32", "36", "1;31", "2", "1")
_MEANINGS = ("needed and held", "held", "missing for more", "not held", "resumes here")
_LABEL = 10


def show(found: Sequence[Explanation], tokens: int) -> None:
    """Print all ranks of a prompt of so many tokens, the best first, and what the signs mean."""
    shapes = _shapes_for(sys.stdout.encoding)
    colours = _has_colours()
    width = max(20, shutil.get_terminal_size((80, 24)).columns - _LABEL - 4)
    for explanation in sorted(found, key=lambda each: -each.cached_tokens):
        _show_rank(explanation, tokens, width, shapes, colours)
    signs = (f"{_painted(shapes[n], n, colours)} {meaning}" for n, meaning in enumerate(_MEANINGS))
    print("\n  " + "  ".join(signs))


def _show_rank(found: Explanation, tokens: int, width: int, shapes: Sequence[str], colours: bool) -> None:
    scored = "" if found.scored else "  (not scored: stale or silent)"
    print(
        f"\nrank {found.rank}: {found.cached_tokens} of {tokens} tokens, rule {one_line(found.rule)}{scored}"
    )
    if found.failed is not None:
        print(f"  nothing is promised, because its rule has failed: {one_line(found.failed)}")
    for group in found.groups:
        cells = strip(group, found.cached_tokens, tokens, width)
        drawn = "".join(_painted(shapes[cell], cell, colours) for cell in cells)
        print(f"  {group.group.label:>{_LABEL - 2}}  {drawn}")
    print(f"  resumes at block {found.boundary} of {found.boundaries}")
    for group in found.groups:
        held = ", ".join(f"{first}..{end - 1}" for first, end in group.held) or "none"
        line = f"  window {group.group.label:>7}: holds blocks {held}"
        if group.spoilt is not None:
            line += f"; block {group.spoilt} is missing for the next boundary"
        print(line)


def strip(group: GroupExplanation, cached_tokens: int, tokens: int, width: int) -> list[int]:
    """What the group holds of a prompt, from its first token to its last, in at most ``width`` cells.

    A cell for each block where they fit. Else a cell stands for several: it is held where all of them are,
    and a missing block is never hidden. One cell more stands where the prompt is resumed.
    """
    size = group.group.block_size
    blocks = -(-tokens // size)
    count = max(1, min(blocks, width))
    held = {block for first, end in group.held for block in range(first, end)}
    needed = range(*group.needed) if group.needed is not None else range(0)
    cells = []
    for cell in range(count):
        inside = range(cell * blocks // count, max((cell + 1) * blocks // count, cell * blocks // count + 1))
        if group.spoilt in inside:
            cells.append(MISSING)
        elif all(block in needed for block in inside):
            cells.append(NEEDED)
        else:
            cells.append(HELD if all(block in held for block in inside) else GONE)
    if cached_tokens:
        cells.insert(min(count, cached_tokens // size * count // blocks), EDGE)
    return cells


def _shapes_for(encoding: str | None) -> Sequence[str]:
    try:
        "".join(_SHAPES).encode(encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return _PLAIN
    return _SHAPES


def _has_colours() -> bool:
    """As rich finds it: for a terminal, unless NO_COLOR or TERM says otherwise."""
    from rich.console import Console

    return Console().color_system is not None


def _painted(text: str, kind: int, colours: bool) -> str:
    return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if colours else text
