"""What routing simulations found: averages over seeds, where exactness helped and where not, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vswa_plugin.accuracy import showing
from vswa_plugin.accuracy.scorers import EXACT
from vswa_plugin.engine.presets import preset_named
from vswa_plugin.simulation.policies import ORACLE
from vswa_plugin.simulation.sweep import Measures, Plan, Run

if TYPE_CHECKING:
    from rich.table import Table

#: What exactness is measured against.
BASELINE = "global only"
#: What is measured against the oracle.
PLACEMENT = "placement"
#: Smaller differences are called none: of computed tokens, and of the time to first token.
CLEAR_TOKENS, CLEAR_TTFT = 0.01, 0.05
#: Share of promises or choices from which on the rest is not reported.
_MOSTLY = 0.97


class Report(NamedTuple):
    """All runs of one plan."""

    plan: Plan
    runs: list[Run]


class Row(Measures, frozen=True, kw_only=True):
    """One policy in one cell, averaged over the seeds.

    :param computed: prompt tokens that were not reused.
    :param regret: prompt tokens computed beyond the oracle's, as a share of the oracle's. Below 0: fewer,
        by luck of a later request.
    """

    preset: str
    blocks: int
    policy: str
    computed: float
    regret: float | None


class Comparison(msgspec.Struct, frozen=True):
    """Exact against global only in one cell, per seed: relative change, below 0 where exact is better.

    :param true_promises: share of global only's promises that were true when they were made.
    :param agreed: share of its choices that the same cost makes with the truth.
    :param oracle: computed tokens of the oracle against global only's, per seed.
    """

    preset: str
    blocks: int
    computed: tuple[float, ...]
    ttft_p90: tuple[float, ...]
    true_promises: float = 0.0
    agreed: float = 0.0
    oracle: tuple[float, ...] = ()

    @property
    def helps(self) -> bool:
        """Significantly better in one of the two, and worse in neither."""
        return "fewer" in (verdicts := self.verdicts) and "more" not in verdicts

    @property
    def hurts(self) -> bool:
        """Significantly worse in one of the two."""
        return "more" in self.verdicts

    @property
    def even(self) -> bool:
        """No relevant difference on average."""
        return abs(fmean(self.computed)) <= CLEAR_TOKENS and abs(fmean(self.ttft_p90)) <= CLEAR_TTFT

    @property
    def verdicts(self) -> tuple[str, str]:
        """Of computed tokens and of the time to first token: ``fewer``, ``more`` or ``same``."""
        return _verdict(self.computed, CLEAR_TOKENS), _verdict(self.ttft_p90, CLEAR_TTFT)

    def sentence(self) -> str:
        """The measured numbers in words."""
        tokens, ttft = _span(self.computed), _span(self.ttft_p90)
        return (
            f"{self.preset}, {self.blocks} blocks: computed tokens {tokens}, time to first token p90 {ttft}"
        )

    def cause(self) -> str:
        """Why truth about the caches made no difference, as far as the runs show it."""
        if self.true_promises >= _MOSTLY:
            return f"global only is right too, in {self.true_promises:.1%} of its promises"
        if self.agreed >= _MOSTLY:
            return f"its wrong promises seldom change a choice: {self.agreed:.1%} are as with the truth"
        agreement = f"{self.agreed:.1%} of global only's choices are as with the truth"
        if len(self.oracle) > 1 and _verdict(self.oracle, CLEAR_TOKENS) != "fewer":
            tokens = f"the oracle's computed tokens {_span(self.oracle)}"
            return f"{agreement}, and the truth gains nothing significant: {tokens}"
        return agreement


def _verdict(changes: Sequence[float], clear: float) -> str:
    """Beyond ``clear`` on average, and not by chance."""
    least, most = interval(changes)
    if fmean(changes) < -clear and most < 0:
        return "fewer"
    return "more" if fmean(changes) > clear and least > 0 else "same"


def interval(changes: Sequence[float]) -> tuple[float, float]:
    """Where the mean of many seeds lies with 95 % confidence, by Student's t; one seed says nothing."""
    if len(changes) < 2:
        return -math.inf, math.inf
    mean, degrees = fmean(changes), len(changes) - 1
    quantile = _T_975[degrees - 1] if degrees <= len(_T_975) else 1.96 + 2.4 / degrees
    half = quantile * stdev(changes) / math.sqrt(len(changes))
    return mean - half, mean + half


#: Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def _span(changes: Sequence[float]) -> str:
    if len(changes) == 1:
        return f"{changes[0]:+.1%}"
    least, most = interval(changes)
    return f"{fmean(changes):+.1%} ({least:+.1%} to {most:+.1%})"


def _change(ours: float, theirs: float) -> float:
    return round(ours / theirs - 1, 5) if theirs else 0.0


_Cell = tuple[str, int]


def _cells(runs: Sequence[Run]) -> dict[_Cell, dict[str, list[Run]]]:
    """Preset and blocks -> policy -> runs, by seed."""
    cells: dict[_Cell, dict[str, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: run.case.seed):
        cell = cells.setdefault((run.case.preset, run.case.blocks), {})
        cell.setdefault(run.case.policy, []).append(run)
    return cells


def rows(runs: Sequence[Run]) -> list[Row]:
    """One per cell and policy, in the order of ``runs``."""
    return [
        _row(preset, blocks, policy, of_policy, cell.get(ORACLE))
        for (preset, blocks), cell in _cells(runs).items()
        for policy, of_policy in cell.items()
    ]


def _row(preset: str, blocks: int, policy: str, runs: Sequence[Run], oracle: Sequence[Run] | None) -> Row:
    def mean(value: Callable[[Run], float | None]) -> Any:
        values = [value(run) for run in runs]
        return None if None in values else round(fmean(each for each in values if each is not None), 5)

    regret = None
    if oracle is not None:
        pairs = zip(runs, oracle, strict=True)
        regret = fmean(_change(ours.computed_tokens, theirs.computed_tokens) for ours, theirs in pairs)
    return Row(
        preset=preset,
        blocks=blocks,
        policy=policy,
        computed=mean(lambda run: 1 - run.hit_rate),
        regret=regret,
        **{name: mean(attrgetter(name)) for name in Measures.__struct_fields__},
    )


def comparisons(runs: Sequence[Run], policy: str = EXACT, baseline: str = BASELINE) -> list[Comparison]:
    """Of the cells in which both were run."""
    return [
        _comparison(where, cell[policy], cell[baseline], cell.get(ORACLE, ()))
        for where, cell in _cells(runs).items()
        if policy in cell and baseline in cell
    ]


def _comparison(
    where: _Cell, ours: Sequence[Run], theirs: Sequence[Run], oracle: Sequence[Run]
) -> Comparison:
    def changes(runs: Sequence[Run], name: str) -> tuple[float, ...]:
        pairs = zip(runs, theirs if runs else (), strict=True)
        return tuple(_change(getattr(run, name), getattr(other, name)) for run, other in pairs)

    return Comparison(
        *where,
        computed=changes(ours, "computed_tokens"),
        ttft_p90=changes(ours, "ttft_p90_s"),
        true_promises=fmean(run.true_promises or 0.0 for run in theirs),
        agreed=fmean(run.agreed or 0.0 for run in theirs),
        oracle=changes(oracle, "computed_tokens"),
    )


def as_data(reports: Sequence[Report]) -> dict[str, Any]:
    """All of it as built-in types, for JSON; shares are 0 to 1."""
    return {
        "reports": [
            {
                "plan": msgspec.to_builtins(report.plan),
                "seeds": _seeds(report.runs),
                "requests": report.runs[0].requests,
                "refused": max(run.refused for run in report.runs),
                "rows": msgspec.to_builtins(rows(report.runs)),
                "runs": [_by_seed(run) for run in report.runs],
                "exact_against_global_only": [
                    {**msgspec.to_builtins(each), "helps": each.helps, "hurts": each.hurts}
                    for each in comparisons(report.runs)
                ],
            }
            for report in reports
        ]
    }


def _by_seed(run: Run) -> dict[str, Any]:
    """What is compared seed by seed."""
    return {
        **msgspec.to_builtins(run.case),
        "computed": run.computed_tokens,
        "prompts": run.prompt_tokens,
        **{
            name: round(getattr(run, name), 5)
            for name in ("recomputed", "ttft_p50_s", "ttft_p90_s", "imbalance")
        },
    }


def _seeds(runs: Sequence[Run]) -> list[int]:
    return sorted({run.case.seed for run in runs})


# -- for people --------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """What was simulated, in one line."""
    plan, first = report.plan, report.runs[0]
    refused = max(run.refused for run in report.runs)
    left_out = f" (up to {refused} more are larger than a cache and left out)" if refused else ""
    mean = first.prompt_tokens // first.requests
    return (
        f"{plan.workload}: {first.requests} requests{left_out}, {mean} prompt tokens on average, "
        f"{plan.ranks} ranks, blocks of {_block_sizes(report)}, other groups {plan.sliding_share:g} of the "
        f"room of global ones, seeds {', '.join(map(str, _seeds(report.runs)))}"
    )


def _block_sizes(report: Report) -> str:
    """In which tokens are counted."""
    names = dict.fromkeys(run.case.preset for run in report.runs)
    sizes = {preset_named(name).layout(name, report.plan.block_size).block_size for name in names}
    return " and ".join(map(str, sorted(sizes)))


def conclusions(report: Report) -> list[str]:
    """Where exactness helped and where it did not, and why; empty unless both sides were run."""
    compared = comparisons(report.runs)
    seeds = len(_seeds(report.runs))
    if seeds == 1:
        chance = "One seed cannot tell a difference of some percent from chance; try --seeds 10."
    else:
        chance = (
            f"In brackets: where the mean of many seeds lies (95 % confidence, {seeds} seeds). Of cells "
            "without any difference up to one in ten is called better or worse, by chance."
        )
    placed = comparisons(report.runs, PLACEMENT, ORACLE)
    sentences = [chance] if compared or placed else []
    for title, holds in _PLACED:
        if cells := [each for each in placed if holds(each)]:
            sentences += [title, *(f"  {each.sentence()}" for each in cells)]
    for title, holds, tell in _CONCLUSIONS:
        if cells := [each for each in compared if holds(each)]:
            sentences += [title, *(f"  {tell(each)}" for each in cells)]
    return sentences


def _with_cause(compared: Comparison) -> str:
    return f"{compared.sentence()}; {compared.cause()}"


_CONCLUSIONS: tuple[tuple[str, Callable[[Comparison], bool], Callable[[Comparison], str]], ...] = (
    ("Exact was better than global only:", lambda each: each.helps, Comparison.sentence),
    ("Exact was worse than global only:", lambda each: each.hurts, Comparison.sentence),
    (
        "Exactness did not help here, compared with global only:",
        lambda each: each.even and not (each.helps or each.hurts),
        _with_cause,
    ),
    (
        "Not significant, exact against global only:",
        lambda each: not (each.even or each.helps or each.hurts),
        _with_cause,
    ),
)


_PLACED: tuple[tuple[str, Callable[[Comparison], bool]], ...] = (
    ("Placement was better than the oracle's greedy choice:", lambda each: each.helps),
    ("Placement was worse than the oracle's greedy choice:", lambda each: each.hurts),
    (
        "Placement against the oracle's greedy choice, within chance or no difference:",
        lambda each: not (each.helps or each.hurts),
    ),
)


HEADINGS = (
    "policy",
    "computed",
    "recomputed",
    "hits",
    "true",
    "kept",
    "best choice",
    "TTFT p50",
    "p90",
    "p99 s",
    "imbalance",
    "regret",
)


def cells_of(row: Row) -> tuple[str, ...]:
    """Cells under :data:`HEADINGS`."""
    return (
        row.policy,
        f"{row.computed:.1%}",
        f"{row.recomputed:.1%}",
        f"{row.hit_rate:.1%}",
        _share(row.true_promises),
        _share(row.kept),
        _share(row.agreed),
        f"{row.ttft_p50_s:.3f}",
        f"{row.ttft_p90_s:.3f}",
        f"{row.ttft_p99_s:.3f}",
        f"{row.imbalance:.2f}",
        "-" if row.regret is None else f"{row.regret:+.1%}",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def tables(report: Report, *, terminal: bool = True) -> list[tuple[str, Table]]:
    """Title and table of each cell."""
    shown: dict[str, Table] = {}
    for row in rows(report.runs):
        title = f"{row.preset}, {row.blocks} blocks"
        if title not in shown:
            shown[title] = showing.table(HEADINGS, terminal=terminal)
        showing.add_row(shown[title], cells_of(row))
    return list(shown.items())


def plot(reports: Sequence[Report], path: Path) -> None:
    """Computed tokens over memory: a line per policy, a row per workload, a column per model.

    :raises ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    presets = list(dict.fromkeys(run.case.preset for report in reports for run in report.runs))
    figure = showing.figure(1 + 3.6 * len(presets), 0.5 + 2.8 * len(reports))
    panels = figure.subplots(len(reports), len(presets), squeeze=False, sharex="col")
    for line, report in enumerate(reports):
        for panel, preset in zip(panels[line], presets, strict=True):
            _draw(panel, [row for row in rows(report.runs) if row.preset == preset])
            panel.set_title(f"{Path(report.plan.workload).name}, {preset}", fontsize=9)
        panels[line, 0].set_ylabel("prompt tokens computed (%)", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("blocks per rank", fontsize=8)
    panels[0, 0].legend(fontsize=6)
    showing.save(figure, path)


def _draw(panel: Any, rows: Sequence[Row]) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        points = [(row.blocks, 100 * row.computed) for row in rows if row.policy == policy]
        width = 2.0 if policy == EXACT else 1.0
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=policy)
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
