"""The table of ``vswa index``."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vswa_plugin.cli.index import _table
from vswa_plugin.following.fleet import RankStatus
from vswa_plugin.index import WindowIndex
from vswa_plugin.wire.events import Source


@pytest.mark.parametrize("width", [80, 200])
def test_ids_of_workers_which_differ_in_their_last_digits_are_never_shortened(width: int) -> None:
    ids = (4837888740430554934, 4837888740430554937, 2**64 - 1)
    statuses = [
        RankStatus(
            source=Source("dynamo", "backend", each, 0),
            model="gemma",
            state="live",
            reason="",
            registered=True,
            epoch=1796057351197465251,
            next_event_id=1,
            lag_ms=None,
            blocks={"512": {"device": 1}, "global": {"device": 1}},
        )
        for each in ids
    ]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(_table(statuses, WindowIndex().stats(), terminal=True))

    for each in ids:
        assert str(each) in console.file.getvalue()  # type: ignore[attr-defined]
