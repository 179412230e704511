"""What routing simulations found: averages over seeds, where exactness helped and where not, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from vswa_plugin.accuracy.policies import ORACLE
from vswa_plugin.accuracy.route_sweep import Plan, Run
from vswa_plugin.accuracy.scorers import EXACT
from vswa_plugin.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

#: What exactness is measured against.
BASELINE = "global only"
#: Smaller differences are called none: of computed tokens, and of the time to first token.
CLEAR_TOKENS, CLEAR_TTFT = 0.01, 0.05


class Report(NamedTuple):
    """All runs of one plan."""

    plan: Plan
    runs: list[Run]


class Row(msgspec.Struct, frozen=True):
    """One policy in one cell, averaged over the seeds; fields as in :class:`Run`.

    :param regret: prompt tokens computed beyond the oracle's, as a share of the oracle's. Below 0: fewer,
        by luck of a later request.
    """

    preset: str
    blocks: int
    policy: str
    computed: float
    hit_rate: float
    recomputed: float
    kept: float | None
    true_promises: float | None
    kept_promises: float | None
    agreed: float | None
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    imbalance: float
    utilisation: float
    regret: float | None


class Comparison(msgspec.Struct, frozen=True):
    """Exact against global only in one cell, per seed: relative change, below 0 where exact is better."""

    preset: str
    blocks: int
    computed: tuple[float, ...]
    ttft_p90: tuple[float, ...]

    @property
    def helps(self) -> bool:
        """Clearly and with every seed, in one of the two, and clearly worse in none."""
        return "fewer" in (verdicts := self.verdicts) and "more" not in verdicts

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


def _verdict(changes: Sequence[float], clear: float) -> str:
    if all(change < -clear for change in changes):
        return "fewer"
    return "more" if all(change > clear for change in changes) else "same"


def _span(changes: Sequence[float]) -> str:
    if len(changes) == 1:
        return f"{changes[0]:+.1%}"
    return f"{fmean(changes):+.1%} ({min(changes):+.1%} to {max(changes):+.1%})"


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
        hit_rate=mean(lambda run: run.hit_rate),
        recomputed=mean(lambda run: run.recomputed),
        kept=mean(lambda run: run.kept),
        true_promises=mean(lambda run: run.true_promises),
        kept_promises=mean(lambda run: run.kept_promises),
        agreed=mean(lambda run: run.agreed),
        ttft_p50_s=mean(lambda run: run.ttft_p50_s),
        ttft_p90_s=mean(lambda run: run.ttft_p90_s),
        ttft_p99_s=mean(lambda run: run.ttft_p99_s),
        imbalance=mean(lambda run: run.imbalance),
        utilisation=mean(lambda run: run.utilisation),
        regret=regret,
    )


def comparisons(runs: Sequence[Run], policy: str = EXACT, baseline: str = BASELINE) -> list[Comparison]:
    """Of the cells in which both were run."""
    found = []
    for (preset, blocks), cell in _cells(runs).items():
        if policy in cell and baseline in cell:
            pairs = list(zip(cell[policy], cell[baseline], strict=True))
            computed = tuple(_change(ours.computed_tokens, theirs.computed_tokens) for ours, theirs in pairs)
            ttft = tuple(_change(ours.ttft_p90_s, theirs.ttft_p90_s) for ours, theirs in pairs)
            found.append(Comparison(preset, blocks, computed, ttft))
    return found


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
                "exact_against_global_only": [
                    {**msgspec.to_builtins(each), "helps": each.helps} for each in comparisons(report.runs)
                ],
            }
            for report in reports
        ]
    }


def _seeds(runs: Sequence[Run]) -> list[int]:
    return sorted({run.case.seed for run in runs})


# -- for people --------------------------------------------------------------------------------------


def summary(report: Report) -> str:
    """What was simulated, in one line."""
    plan, first = report.plan, report.runs[0]
    refused = max(run.refused for run in report.runs)
    said = f" (up to {refused} more are larger than a cache and left out)" if refused else ""
    mean = first.prompt_tokens // first.requests
    return (
        f"{plan.workload}: {first.requests} requests{said}, {mean} prompt tokens on average, "
        f"{plan.ranks} ranks, blocks of {plan.block_size}, sliding pools {plan.sliding_share:g} of the "
        f"global one, seeds {', '.join(map(str, _seeds(report.runs)))}"
    )


def conclusions(report: Report) -> list[str]:
    """Where exactness helped and where it did not; empty unless both sides were run."""
    compared = comparisons(report.runs)
    one = " (one seed: differences of a few percent may be chance, try --seeds 3)"
    chance = one if len(_seeds(report.runs)) == 1 else " with every seed"
    helped = [each for each in compared if each.helps]
    not_helped = [each for each in compared if not each.helps]
    said = []
    if helped:
        said.append(f"Exact was clearly better than global only{chance}:")
        said += [f"  {each.sentence()}" for each in helped]
    if not_helped:
        said.append("Exactness did not help here, compared with global only:")
        said += [f"  {each.sentence()}" for each in not_helped]
    return said


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
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown: dict[str, Table] = {}
    for row in rows(report.runs):
        title = f"{row.preset}, {row.blocks} blocks"
        if title not in shown:
            table = shown[title] = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
            for heading in HEADINGS:
                table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right", no_wrap=True)
        shown[title].add_row(*map(Text, cells_of(row)))
    return list(shown.items())


def plot(reports: Sequence[Report], path: Path) -> None:
    """Computed tokens over memory: a line per policy, a row per workload, a column per model.

    :raises ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figures = import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'vswa-plugin[plot]'") from error
    presets = list(dict.fromkeys(run.case.preset for report in reports for run in report.runs))
    figure = figures.Figure(figsize=(1 + 3.6 * len(presets), 0.5 + 2.8 * len(reports)))
    panels = figure.subplots(len(reports), len(presets), squeeze=False, sharex="col")
    for line, report in enumerate(reports):
        for panel, preset in zip(panels[line], presets, strict=True):
            _draw(panel, [row for row in rows(report.runs) if row.preset == preset])
            panel.set_title(f"{Path(report.plan.workload).name}, {preset}", fontsize=9)
        panels[line, 0].set_ylabel("prompt tokens computed (%)", fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("blocks per rank", fontsize=8)
    panels[0, 0].legend(fontsize=6)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: cannot write {path}: {error}") from error


def _draw(panel: Any, found: Sequence[Row]) -> None:
    for policy in dict.fromkeys(row.policy for row in found):
        points = [(row.blocks, 100 * row.computed) for row in found if row.policy == policy]
        width = 2.0 if policy == EXACT else 1.0
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=policy)
    panel.set_ylim(bottom=0)
    panel.spines[["top", "right"]].set_visible(False)
