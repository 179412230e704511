"""What the demo prints."""

from __future__ import annotations

import pytest

from vswa_plugin.cli.demo.report import Tally, show_windows

IDS = (1, 2**64 - 1)


@pytest.mark.parametrize("names", [{}, {1: "prefill", 2**64 - 1: "decode"}])
def test_columns_stand_apart_and_under_their_headings_for_any_worker_id(
    capsys: pytest.CaptureFixture[str], names: dict[int, str]
) -> None:
    tally = Tally()
    tally.stored.update({(each, "window global"): 3 for each in IDS})
    show_windows(tally, names)
    _, _, heading, *lines = capsys.readouterr().out.splitlines()

    assert [line.index("window global") for line in lines] == [heading.index("window")] * len(IDS)
    assert [str(each) for each in IDS] == [line.split()[1 if names else 0] for line in lines]
