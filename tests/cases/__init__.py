"""Small inputs that failed, or still fail: each is a test with the right value, marked until it holds.

A fault that is known and not yet mended is a strict xfail: when it is mended, its test passes, the suite
fails, and the mark goes. Only an assertion may fail: an import that breaks must not look like the fault.
"""

from __future__ import annotations

import pytest

#: The plan of this round, by number, for the reasons that reports show.
PARTS = {
    1: "layout, lifetimes, wire plan",
    2: "public surface, testing, one command",
    3: "nothing hangs, is ignored, or lies",
    4: "TensorRT-LLM as its users have it",
    5: "any hybrid model",
    6: "vLLM as a live engine",
    7: "forecast and placement",
    8: "picker, native data path",
    9: "package, deploy, observe",
    10: "pages, docs, plugins",
    11: "faults, load, bad actors",
}


def mended_by(part: int, fault: str) -> pytest.MarkDecorator:
    """A strict xfail: ``fault`` is known, and part ``part`` of the plan mends it."""
    reason = f"{fault} (part {part}: {PARTS[part]})"
    return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)
