"""What routing simulations found: averages, where exactness helped and where not, plots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.simulation.policies import ORACLE
from vswa_plugin.simulation.report import (
    Comparison,
    Report,
    as_data,
    comparisons,
    conclusions,
    interval,
    plot,
    rows,
)
from vswa_plugin.simulation.simulation import Totals
from vswa_plugin.simulation.sweep import Case, Plan, Run, run_of


def totals(cached: int, ttft: float = 1.0, **changes: Any) -> Totals:
    given = Totals(2, 0, 100, 20, cached, 50, 40, 2, 1, 1, 10.0, [ttft, ttft], [1.0, 3.0])
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def run(policy: str, cached: int, seed: int = 0, ttft: float = 1.0, **changes: Any) -> Run:
    return run_of(Case("gemma-3-1b", 64, policy, seed), totals(cached, ttft, **changes))


def test_a_run_is_summed_up() -> None:
    done = run("exact", 60)

    assert (40, 0.6, 0.2) == (done.computed_tokens, done.hit_rate, done.recomputed)
    assert (0.8, 1.0, 0.5, 0.5) == (done.kept, done.true_promises, done.kept_promises, done.agreed)
    assert (1.5, 0.2) == (done.imbalance, done.utilisation)
    nothing = run("random", 60, promised=None, agreed=None)
    assert (None, None, None, None) == (
        nothing.kept,
        nothing.true_promises,
        nothing.kept_promises,
        nothing.agreed,
    )
    with pytest.raises(ConfigError, match="raise --blocks"):
        run("exact", 0, requests=0, refused=3)
    with pytest.raises(ConfigError, match="the workload has no requests"):
        run("exact", 0, requests=0)


def test_rows_average_over_seeds_and_regret_is_paired_with_the_oracles_seed() -> None:
    runs = [run("exact", 60, 0), run("exact", 20, 1), run(ORACLE, 80, 1), run(ORACLE, 60, 0)]
    exact, oracle = rows(runs)

    assert (0.4, 0.6) == (exact.hit_rate, exact.computed)
    assert 1.5 == exact.regret  # as much as the oracle's with one seed, four times as much with the other
    assert 0 == oracle.regret


def compared(computed: Sequence[float], ttft: Sequence[float]) -> Comparison:
    return Comparison("gemma-3-1b", 64, tuple(computed), tuple(ttft))


NONE = (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("computed", "ttft", "found"),
    [
        ((-0.02, -0.03, -0.025), NONE, "helps"),
        ((-0.02, -0.03, -0.09), NONE, "chance"),
        ((-0.02, 0.03, -0.05), NONE, "chance"),
        ((-0.009, -0.008, -0.0085), NONE, "even"),
        ((-0.02,), (-0.5,), "chance"),
        (NONE, (-0.06, -0.08, -0.07), "helps"),
        (NONE, (-0.06, -0.3, -0.01), "chance"),
        (NONE, (-0.04, -0.045, -0.042), "even"),
        ((-0.1, -0.11, -0.1), (0.06, 0.07, 0.065), "hurts"),
        ((0.1, 0.1, 0.11), (-0.2, -0.2, -0.21), "hurts"),
        ((0.0595, 0.0122, 0.0264), (0.0452, 0.2898, 0.1419), "chance"),
    ],
)
def test_exactness_helps_or_hurts_only_where_seeds_tell_it_from_chance(
    computed: Sequence[float], ttft: Sequence[float], found: str
) -> None:
    each = compared(computed, ttft)
    said = "helps" if each.helps else "hurts" if each.hurts else "even" if each.even else "chance"

    assert (found, False) == (said, each.helps and each.hurts)


@pytest.mark.parametrize("count", [2, 3, 6, 20])
def test_the_interval_holds_the_true_mean_of_nineteen_in_twenty_draws(count: int) -> None:
    rng = random.Random(count)
    drawn = [interval([rng.gauss(0.3, 2.0) for _ in range(count)]) for _ in range(4_000)]

    assert 0.94 < sum(least <= 0.3 <= most for least, most in drawn) / len(drawn) < 0.96
    assert interval([0.3]) == (-float("inf"), float("inf"))


def several(policy: str, *cached: int, **changes: Any) -> list[Run]:
    """One run per seed."""
    return [run(policy, each, seed, **changes) for seed, each in enumerate(cached)]


def said(*runs: list[Run]) -> list[str]:
    return conclusions(Report(Plan("chat"), [each for of_policy in runs for each in of_policy]))


def test_the_report_says_where_exactness_helped_and_where_it_hurt() -> None:
    better = said(several("exact", 60, 61, 62), several("global only", 50, 50, 52))
    worse = said(several("exact", 50, 50, 52), several("global only", 60, 61, 62))

    assert "95 % confidence, 3 seeds" in better[0]
    assert ["Exact was better than global only:", "Exact was worse than global only:"] == [
        better[1],
        worse[1],
    ]
    assert (
        "gemma-3-1b, 64 blocks: computed tokens -20.9% (-23.4% to -18.4%), time to first token" in better[2]
    )


@pytest.mark.parametrize(
    ("of_global", "oracle", "cause"),
    [
        ({"true_promises": 2}, 60, "global only is right too, in 100.0% of its promises"),
        ({"agreed": 2}, 60, "its wrong promises seldom change a choice: 100.0% are as with the truth"),
        (
            {},
            60,
            "50.0% of global only's choices are as with the truth, and the truth gains nothing significant:",
        ),
        ({}, 90, "50.0% of global only's choices are as with the truth"),
    ],
)
def test_the_report_says_why_exactness_did_not_help(
    of_global: dict[str, Any], oracle: int, cause: str
) -> None:
    exact, other = (
        several("exact", 60, 60),
        several("global only", 60, 60, **{"true_promises": 1, **of_global}),
    )
    found = said(exact, other, several(ORACLE, oracle, oracle))

    assert "Exactness did not help here, compared with global only:" == found[1]
    assert cause in found[2]
    assert ("gains nothing" in found[2]) == ("gains nothing" in cause)


def test_one_seed_tells_nothing_from_chance() -> None:
    found = said([run("exact", 60, ttft=0.5)], [run("global only", 50)])

    assert "One seed cannot tell" in found[0]
    assert "Not significant, exact against global only:" == found[1]
    assert "computed tokens -20.0%, time to first token p90 -50.0%" in found[2]


def test_without_both_sides_nothing_is_compared() -> None:
    assert [] == said([run("exact", 60)], [run(ORACLE, 60)])
    assert [] == comparisons([run("exact", 60)])
    runs = [run(name, 60) for name in ("exact", "global only", ORACLE)]
    (data,) = as_data([Report(Plan("chat"), runs)])["reports"]
    assert [(False, False)] == [(each["helps"], each["hurts"]) for each in data["exact_against_global_only"]]


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"vswa-plugin\[plot\]"):
        plot([Report(Plan("chat"), [run("exact", 60)])], tmp_path / "p.png")


def test_a_plot_has_a_panel_per_workload_and_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    plot([Report(Plan("chat"), [run("exact", 60), run(ORACLE, 60)])], tmp_path / "p.png")

    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
