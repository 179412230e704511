"""README.md: its plugin runs, its sample output is the demo's, its tables say when they do not help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.test_demo_runs import readme_sample
from tests.two_windows import reused
from vswa_plugin.engine import RequestRecord
from vswa_plugin.testing.host import plugin_host

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def test_the_plugin_in_ten_lines_has_ten_lines_and_does_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"<!-- runs -->\n```python\n(.*?)```", README, re.S)
    path = tmp_path / "slow.py"
    path.write_text(code)
    with plugin_host(path) as host:
        for first_token_s, cached_tokens in ((2.0, 80), (0.1, 80), (2.0, 20), (None, 80)):
            host.request_finished(
                RequestRecord("r1", "m", 1, 0, 100, cached_tokens, 5, "stop", first_token_s, 3.0)
            )

    assert "r1: 2.0 s for a cached prompt\n" == capsys.readouterr().out
    assert 10 >= sum(bool(line.strip()) for line in code.splitlines())


def test_every_section_with_results_says_when_it_does_not_help() -> None:
    sections = re.split(r"^## ", README, flags=re.M)
    results = [
        section for section in sections if re.match(r"(On a GPU|How often a promise|Measured)", section)
    ]

    assert 3 == len(results)
    assert [] == [section.split("\n")[0] for section in results if "**When it does not help**" not in section]


def test_the_sample_output_is_that_of_a_demo_that_kept_its_promises() -> None:
    """Whether a run prints such lines is for tests/cluster/test_demo_runs.py."""
    assert len(readme_sample()) >= 8
    assert any("20 of 20 promises were kept" in line for line in readme_sample())
    assert (8, 5) == (reused(8)[0], reused(6)[0])
