"""``vswa accuracy``: how often a router's promise is kept."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from vswa_plugin.accuracy.replay import replay_with
from vswa_plugin.accuracy.report import Report, as_data, page, plot, summary, table, title
from vswa_plugin.accuracy.scorers import DEFAULT_TTL
from vswa_plugin.accuracy.showing import check_plot, console, progress
from vswa_plugin.accuracy.trace import Trace, open_trace
from vswa_plugin.cli.accuracy_route import configure_route, run_route
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.options import at_least_one, real

_EXAMPLES = """\
examples:
  vswa accuracy replay engine.jsonl.gz                     what each scorer promises, and what is kept
  vswa accuracy replay engine.jsonl.gz --min-exact 1       for a build: exit code 1 where a promise is broken
  vswa accuracy replay a.jsonl b.jsonl --html report.html  several traces on one page
  vswa accuracy route forks                                what better promises are worth, by simulation

A trace is what an engine's cache did: its KV events and, for each request, how much of the prompt it reused.
"""

_REPLAY_EXAMPLES = """\
examples:
  vswa accuracy replay engine.jsonl.gz                     what each scorer promises, and what is kept
  vswa accuracy replay a.jsonl b.jsonl --html report.html --plot report.png
  vswa accuracy replay engine.jsonl.gz --json | jq .reports[0].exact_share

Exit code 1: below --min-exact, or nothing to predict; 2: something to correct. A worker records a trace with
VSWA_RECORD=DIRECTORY; docs/accuracy.md defines the format, for recorders of your own.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    commands = parser.add_subparsers(dest="accuracy", metavar="COMMAND", required=True)
    _configure_replay(
        commands.add_parser(
            "replay",
            help="predict every request of recorded engine traces, and compare",
            description="Feeds an engine's own events through the real event path and predicts each request "
            "from what came before it, by this project's rule and by what others do.",
            epilog=_REPLAY_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    configure_route(
        commands.add_parser(
            "route",
            help="simulate ranks behind routers that differ in what they take to be cached",
            allow_abbrev=False,
        )
    )


def _configure_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "traces", nargs="+", metavar="TRACE", help="an engine trace, .jsonl, .jsonl.gz or .jsonl.xz"
    )
    parser.add_argument(
        "--rule", help="reuse rule of the engine (trtllm: trtllm_v2, vllm: vllm or vllm_hybrid)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every request")
    parser.add_argument(
        "--min-exact",
        type=real,
        metavar="SHARE",
        help="end with exit code 1 where, in any trace, a smaller share of requests (0 to 1) is exact in "
        "whole blocks",
    )
    parser.add_argument(
        "--ttl",
        type=at_least_one,
        default=DEFAULT_TTL,
        metavar="REQUESTS",
        help=f"how long the approximate scorer remembers a prompt ({DEFAULT_TTL})",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw the result to a .png, .svg or .pdf file; needs matplotlib"
    )
    parser.add_argument("--html", metavar="FILE", help="also write the result as an HTML page")


def run(args: argparse.Namespace) -> int:
    return run_route(args) if args.accuracy == "route" else _run_replay(args)


def _run_replay(args: argparse.Namespace) -> int:
    if args.min_exact is not None and not 0 <= args.min_exact <= 1:
        raise ConfigError(f"--min-exact: expected a share from 0 to 1, got {args.min_exact}")
    if args.plot:
        check_plot(Path(args.plot))
    traces = [open_trace(path) for path in args.traces]
    with load_host(args.plugin, args.no_plugin, options=args.plugin_options) as host:
        reports = [_replay(trace, args, host) for trace in traces]
    if args.json:
        print(msgspec.json.encode(as_data(reports)).decode())
    else:
        _show(reports)
    if args.html:
        _write(Path(args.html), page(reports))
    if args.plot:
        plot(reports, Path(args.plot))
    return _verdict(reports, args.min_exact)


def _replay(trace: Trace, args: argparse.Namespace, host: PluginHost) -> Report:
    with progress() as bar:
        task = bar.add_task(trace.name, total=trace.path.stat().st_size)

        def advance(read: int) -> None:
            bar.update(task, completed=read)

        return replay_with(host, trace, rule=args.rule, ttl=args.ttl, progress=advance)


def _show(reports: list[Report]) -> None:
    out = console()
    for number, report in enumerate(reports):
        if number:
            out.print()
        out.print(title(report), style="bold")
        out.print(summary(report))
        out.print(table(report, terminal=out.is_terminal))
        for reason in report.reasons():
            out.print(reason)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"--html: cannot write {path}: {error.strerror}") from error


def _verdict(reports: list[Report], min_exact: float | None) -> int:
    """1 where a trace falls short, and says which. One without requests shows nothing, and does too."""
    if min_exact is None:
        return 0
    short = [report for report in reports if not report.requests or report.exact_share < min_exact]
    for report in short:
        exact = f"{report.exact_share:.2%} of" if report.requests else "no"
        sys.stderr.write(
            f"{report.trace}: {exact} requests are exact in whole blocks, expected at least {min_exact:.2%}\n"
        )
    return 1 if short else 0
