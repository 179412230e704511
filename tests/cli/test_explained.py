"""The picture of ``vswa explain``."""

from __future__ import annotations

import pytest

from vswa_plugin.blocks import CacheGroup, CacheLayout
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.cli.explained import EDGE, GONE, HELD, MISSING, NEEDED, show, strip
from vswa_plugin.index import Explanation, WindowIndex
from vswa_plugin.wire.events import Rank, Stored

GROUPS = (CacheGroup(0, 32, 16), CacheGroup(1, None, 16))


def explained(blocks: int, sliding: list[int], whole: list[int]) -> Explanation:
    """One rank and a prompt of so many blocks and one token more."""
    index, rank = WindowIndex(), Rank(7)
    index.join(rank, CacheLayout(GROUPS, "trtllm_v2", "m"))
    tokens = list(range(blocks * 16 + 1))
    names = sequence_hashes_of_tokens(tokens, 16)
    for group, held in ((0, sliding), (1, whole)):
        for block in held:
            index.apply(rank, Stored(group, block, None, (names[block],)))
    return index.explain(names, len(tokens))[0]


@pytest.fixture(autouse=True)
def _a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_each_block_is_a_sign_and_the_boundary_stands_between_two() -> None:
    found = explained(8, [3, 4, 7], list(range(8)))
    sliding, whole = (strip(group, found.cached_tokens, 129, 60) for group in found.groups)

    assert sliding == [GONE] * 3 + [NEEDED] * 2 + [EDGE, MISSING, GONE, HELD, GONE]
    assert whole == [NEEDED] * 5 + [EDGE] + [HELD] * 3 + [GONE], "the last token begins a block of its own"


@pytest.mark.parametrize("width", [20, 33, 60])
def test_a_long_prompt_is_fitted_and_its_missing_block_is_never_hidden(width: int) -> None:
    found = explained(400, list(range(333)), list(range(400)))
    for group, kind in zip(found.groups, (MISSING, NEEDED), strict=True):
        cells = strip(group, found.cached_tokens, 6_401, width)
        assert len(cells) == width + 1 and cells.count(EDGE) == 1
        assert kind in cells


def test_what_is_printed_fits_80_columns_and_says_the_same_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show([explained(400, [1, 2], list(range(400)))], 6_401)
    printed = capsys.readouterr().out

    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("  window "))
    assert "rank 7/0: 48 of 6401 tokens, rule trtllm_v2" in printed
    assert "  window  global: holds blocks 0..399\n" in printed
    assert "  window      32: holds blocks 1..2; block 3 is missing for the next boundary\n" in printed
    assert "\x1b" not in printed, "no colours where nobody sees them"


def test_no_sign_is_one_that_the_output_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    show([explained(8, [3, 4], list(range(8)))], 129)
    out.flush()
    printed = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]

    assert "        32  ...##|x...\n" in printed
    assert "# needed and held" in printed
