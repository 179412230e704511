"""The results of a replay: numbers, JSON, a table, a plot, a page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vswa_plugin.accuracy import showing
from vswa_plugin.accuracy.exceptions import EXCEPTIONS
from vswa_plugin.accuracy.scorers import EXACT
from vswa_plugin.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Outcome",
    "Report",
    "Score",
    "assert_exact",
]


class Outcome(msgspec.Struct, frozen=True):
    """One request, in tokens.

    :param line: of the trace.
    :param predicted: by scorer.
    :param exception: why our own prediction could not be exact; None: it is, or nothing explains it.
    """

    line: int
    prompt_len: int
    actual: int
    predicted: dict[str, int]
    exception: str | None = None


class Score(msgspec.Struct, frozen=True):
    """One scorer over all requests.

    :param exact_blocks: requests predicted in whole blocks.
    :param exact_tokens: requests predicted to the token.
    :param over: requests of which more whole blocks were promised than reused.
    :param under: requests of which fewer were.
    :param mean_abs_error: tokens per request.
    :param over_tokens: tokens promised and then computed again, in all.
    :param under_tokens: tokens reused that were not promised, in all.
    """

    scorer: str
    requests: int
    exact_blocks: int
    exact_tokens: int
    over: int
    under: int
    mean_abs_error: float
    over_tokens: int
    under_tokens: int = 0

    @property
    def exact_share(self) -> float:
        """In whole blocks, 0 to 1; 1 where there was nothing to predict."""
        return self.exact_blocks / self.requests if self.requests else 1.0


class Report(msgspec.Struct, frozen=True):
    """One trace.

    :param provenance: of the rule, see :attr:`~vswa_plugin.blocks.ReuseRule.provenance`.
    :param exceptions: requests that hashes cannot predict, by kind; not exact, and not counted as mistakes.
    :param restarts: engine events lost, or a layout corrected: nothing was known to be resident any more.
    :param unattributed: stored blocks that could not be named, so that less was promised.
    :param lagged: requests that were predicted right later, by events from before the engine's match.
    :param unfinished: requests whose results are not in the trace; they count nowhere.
    :param failed_scorers: scorers of plugins that failed on the way, and of which nothing is shown.
    """

    trace: str
    format: str
    engine: str
    rule: str
    provenance: str
    block_size: int
    windows: tuple[str, ...]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    restarts: int
    unattributed: int
    exceptions: dict[str, int]
    scores: tuple[Score, ...]
    outcomes: tuple[Outcome, ...]
    lagged: int = 0
    unfinished: int = 0
    failed_scorers: tuple[str, ...] = ()

    def score(self, scorer: str = EXACT) -> Score:
        """:raises ConfigError: there is no such scorer; the known ones are listed."""
        for score in self.scores:
            if score.scorer == scorer:
                return score
        raise ConfigError(f"unknown scorer {scorer!r}. Known: {', '.join(s.scorer for s in self.scores)}")

    @property
    def exact_share(self) -> float:
        """Of our own predictions: requests right in whole blocks, 0 to 1. Exceptions are not right."""
        return self.score().exact_share

    @property
    def mistakes(self) -> list[Outcome]:
        """Our own predictions that are wrong in whole blocks and that no exception explains."""
        size = self.block_size
        return [
            each
            for each in self.outcomes
            if each.exception is None and each.predicted[EXACT] // size != each.actual // size
        ]

    def reasons(self) -> list[str]:
        """Sentences on why not every request could be predicted; empty where all were."""
        sentences = []
        if not self.requests:
            sentences.append("no requests: there was nothing to predict, and nothing is shown")
        counts = self.exceptions.items()
        sentences += [f"{count} requests: {REASONS[kind]}" for kind, count in counts if count]
        if self.lagged:
            sentences.append(
                f"{self.lagged} requests: the cache changed between arrival and the engine's match, or the "
                "events of a change came after the arrival"
            )
        if self.unfinished:
            sentences.append(f"{self.unfinished} requests have no result and are left out")
        if self.restarts:
            sentences.append(f"{self.restarts} times engine events were lost or the layout was corrected")
        if self.unattributed:
            sentences.append(
                f"{self.unattributed} stored blocks could not be named: their parents are not in the trace"
            )
        for name in self.failed_scorers:
            sentences.append(f"scorer {name!r} of a plugin failed and is left out; the log says how")
        if mistakes := self.mistakes:
            lines = ", ".join(str(each.line) for each in mistakes[:5])
            more = ", ..." if len(mistakes) > 5 else ""
            sentences.append(
                f"{len(mistakes)} requests differ and nothing above explains them (lines {lines}{more}): is "
                f"{self.rule} this engine's rule, and does each request stand before the events it caused?"
            )
        return sentences


REASONS = dict(
    zip(
        EXCEPTIONS,
        (
            "the engine reused another block up to one token short of its edge, which hashes do not show",
            "the engine did not match the last block of a repeated prompt, which hashes do not show",
        ),
        strict=True,
    )
)


def scores_of(outcomes: Sequence[Outcome], scorers: Sequence[str], block_size: int) -> tuple[Score, ...]:
    """One score per scorer, in their order."""
    return tuple(_score(scorer, outcomes, block_size) for scorer in scorers)


def _score(scorer: str, outcomes: Sequence[Outcome], block_size: int) -> Score:
    pairs = [(each.predicted[scorer], each.actual) for each in outcomes]
    blocks = [(predicted // block_size) - (actual // block_size) for predicted, actual in pairs]
    errors = [predicted - actual for predicted, actual in pairs]
    return Score(
        scorer=scorer,
        requests=len(pairs),
        exact_blocks=blocks.count(0),
        exact_tokens=errors.count(0),
        over=sum(each > 0 for each in blocks),
        under=sum(each < 0 for each in blocks),
        mean_abs_error=sum(map(abs, errors)) / max(1, len(errors)),
        over_tokens=sum(each for each in errors if each > 0),
        under_tokens=-sum(each for each in errors if each < 0),
    )


def exceptions_in(outcomes: Sequence[Outcome]) -> dict[str, int]:
    counts = Counter(each.exception for each in outcomes)
    return {kind: counts[kind] for kind in EXCEPTIONS}


def assert_exact(report: Report, at_least: float = 1.0) -> None:
    """Fail unless our predictions are right, in whole blocks, in that share of the requests.

    :raises AssertionError: with the share, what explains it, and the first wrong requests.
    """
    if report.requests == 0:
        raise AssertionError(f"{report.trace}: expected requests to predict, got none")
    if report.exact_share >= at_least:
        return
    size = report.block_size
    wrong = [each for each in report.outcomes if each.predicted[EXACT] // size != each.actual // size]
    shown = [
        f"line {each.line}: {each.prompt_len} tokens, predicted {each.predicted[EXACT]}, "
        f"the engine reused {each.actual}" + (f" ({each.exception})" if each.exception else "")
        for each in wrong[:10]
    ]
    raise AssertionError(
        f"{report.trace}: expected {at_least:.2%} of {report.requests} requests to be exact in whole blocks "
        f"by the rule {report.rule}, got {report.exact_share:.2%}\n" + "\n".join([*report.reasons(), *shown])
    )


def as_data(reports: Sequence[Report]) -> dict[str, Any]:
    """All of it as built-in types, for JSON; shares are 0 to 1."""
    return {
        "reports": [
            {
                **msgspec.to_builtins(report),
                "exact_share": report.exact_share,
                "reasons": report.reasons(),
                "scores": [
                    {**msgspec.to_builtins(score), "exact_share": score.exact_share}
                    for score in report.scores
                ],
            }
            for report in reports
        ]
    }


# -- for people --------------------------------------------------------------------------------------


def title(report: Report) -> str:
    return f"{report.trace}: {report.engine or report.format}, rule {report.rule}"


def summary(report: Report) -> str:
    """What was replayed, in one line."""
    checked = {
        "run": "",
        "transcribed": " (rule checked against a transcription of the engine's code, not the engine)",
    }
    read = checked.get(report.provenance, " (rule read in the engine's sources, never run against it)")
    return (
        f"{report.requests} requests, {report.prompt_tokens} prompt tokens of which the engine reused "
        f"{report.cached_tokens}; blocks of {report.block_size}, windows {' '.join(report.windows)}{read}"
    )


HEADINGS = ("scorer", "exact", "in tokens", "over", "under", "error", "broken tokens", "missed tokens")


def row(score: Score) -> tuple[str, ...]:
    """Cells under :data:`HEADINGS`."""
    tokens = score.exact_tokens / max(1, score.requests)
    return (
        score.scorer,
        f"{score.exact_share:.1%}",
        f"{tokens:.1%}",
        str(score.over),
        str(score.under),
        f"{score.mean_abs_error:.1f}",
        str(score.over_tokens),
        str(score.under_tokens),
    )


def table(report: Report, *, terminal: bool = True) -> Table:
    """All scorers of one report."""
    shown = showing.table(HEADINGS, terminal=terminal)
    for score in report.scores:
        showing.add_row(shown, row(score))
    return shown


def page(reports: Sequence[Report]) -> str:
    """A self-contained HTML page."""
    parts = [_PAGE_HEAD]
    for report in reports:
        parts.append(f"<h2>{html.escape(title(report))}</h2><p>{html.escape(summary(report))}</p><table>")
        parts.append("<tr>" + "".join(f"<th>{heading}</th>" for heading in HEADINGS) + "<th></th></tr>")
        for score in report.scores:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row(score))
            bar = f'<td><div style="width:{score.exact_share:.1%}"></div></td>'
            parts.append(f"<tr>{cells}{bar}</tr>")
        parts.append("</table>" + "".join(f"<p>{html.escape(each)}</p>" for each in report.reasons()))
    return "\n".join([*parts, "</body></html>\n"])


_PAGE_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>Router accuracy</title><style>
body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}td:last-child{width:30%;background:#eee;padding:0}
td:last-child div{background:#4a7fb5;height:1rem}tr:nth-child(2){font-weight:bold}</style></head><body>
<h1>Router accuracy</h1>
<p>Share of requests whose reused whole blocks were predicted exactly; over and under: requests of which
more or fewer whole blocks were promised than reused; error: mean, in tokens per request; broken tokens:
promised, and computed again; missed tokens: reused, and not promised.</p>"""


#: Part of a bar -> its colour.
_PARTS = {"promised what was reused": "#4a7fb5", "promised more": "#e0a458", "promised less": "#ccd2d8"}


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars of what became of the promises, one panel per trace.

    :raises ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    across = 1 if len(reports) < 3 else 2
    down = -(-len(reports) // across)
    most = max(len(report.scores) for report in reports)
    figure = showing.figure(3 + 4.2 * across, 0.9 + down * (0.5 + 0.27 * most))
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey="row")
    for panel, report in zip(panels.flat, reports, strict=False):
        _draw(panel, report)
    for panel in panels.flat[len(reports) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("requests (%), compared in whole blocks", fontsize=8)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), ncols=3, fontsize=8, frameon=False, loc="lower center"
    )
    showing.save(figure, path, below=0.25 / figure.get_figheight())


def _draw(panel: Any, report: Report) -> None:
    scores = list(reversed(report.scores))
    names, offsets = [score.scorer for score in scores], [0.0] * len(scores)
    for attribute, (part, colour) in zip(("exact_blocks", "over", "under"), _PARTS.items(), strict=True):
        shares = [100 * getattr(score, attribute) / max(1, score.requests) for score in scores]
        panel.barh(names, shares, left=offsets, color=colour, label=part)
        offsets = [before + share for before, share in zip(offsets, shares, strict=True)]
    for place, score in enumerate(scores):
        weight = "bold" if score.scorer == EXACT else "normal"
        panel.text(101.5, place, f"{score.exact_share:.1%}", va="center", fontsize=8, fontweight=weight)
    panel.set_xlim(0, 118)
    panel.set_xticks(range(0, 101, 20))
    panel.tick_params(labelsize=8)
    panel.set_title(title(report), fontsize=9, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
