"""``vswa accuracy``: how often a router's promise is kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from vswa_plugin.accuracy.replay import replay_with
from vswa_plugin.accuracy.report import Report, as_data, page, plot, summary, table, title
from vswa_plugin.accuracy.scorers import DEFAULT_TTL
from vswa_plugin.accuracy.trace import Trace, open_trace
from vswa_plugin.commands.accuracy_route import configure_route, run_route
from vswa_plugin.errors import ConfigError
from vswa_plugin.host import PluginHost
from vswa_plugin.plugin_loading import load_host

_EXAMPLES = """\
examples:
  vswa accuracy replay engine.jsonl.gz                     what each scorer promises, and what is kept
  vswa accuracy replay engine.jsonl.gz --min-exact 1       for a build: exit code 1 where a promise is broken
  vswa accuracy replay a.jsonl b.jsonl --html report.html  several traces on one page
  vswa accuracy route forks                                what better promises are worth, by simulation

A trace is what an engine's cache did: its KV events and, for each request, how much of the prompt it reused.
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
            "from what came before it.",
            allow_abbrev=False,
        )
    )
    configure_route(
        commands.add_parser(
            "route",
            help="simulate ranks behind routers that differ in what they believe is cached",
            allow_abbrev=False,
        )
    )


def _configure_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="an engine trace, .jsonl or .jsonl.gz")
    parser.add_argument("--rule", help="reuse rule of the engine (trtllm: trtllm_v2, vllm: vllm)")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every request")
    parser.add_argument(
        "--min-exact",
        type=float,
        metavar="SHARE",
        help="exit code 1 where, in any trace, fewer requests than this are exact in whole blocks (0 to 1)",
    )
    parser.add_argument(
        "--ttl",
        type=int,
        default=DEFAULT_TTL,
        metavar="REQUESTS",
        help=f"how long the approximate scorer remembers a prompt ({DEFAULT_TTL})",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .png, .svg or .pdf; needs matplotlib")
    parser.add_argument("--html", metavar="FILE", help="also write a page")


def run(args: argparse.Namespace) -> int:
    return run_route(args) if args.accuracy == "route" else _run_replay(args)


def _run_replay(args: argparse.Namespace) -> int:
    if args.min_exact is not None and not 0 <= args.min_exact <= 1:
        raise ConfigError(f"--min-exact: expected a share from 0 to 1, got {args.min_exact}")
    if args.ttl < 1:
        raise ConfigError(f"--ttl: expected at least one request, got {args.ttl}")
    traces = [open_trace(path) for path in args.traces]
    with load_host(args.plugin, args.no_plugin) as host:
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
    with _progress(trace) as progress:
        return replay_with(host, trace, rule=args.rule, ttl=args.ttl, progress=progress)


@contextmanager
def _progress(trace: Trace) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error, which goes when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(trace.name, total=trace.path.stat().st_size)
        yield lambda read: bar.update(task, completed=read)


def _show(reports: list[Report]) -> None:
    from rich.console import Console

    # A pipe has no width, and whoever greps wants whole lines.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    for number, report in enumerate(reports):
        if number:
            console.print()
        console.print(title(report), style="bold")
        console.print(summary(report))
        console.print(table(report, terminal=console.is_terminal))
        for reason in report.reasons():
            console.print(reason)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"--html: cannot write {path}: {error.strerror}") from error


def _verdict(reports: list[Report], min_exact: float | None) -> int:
    """1 where a trace falls short, and says which."""
    short = [report for report in reports if min_exact is not None and report.exact_share < min_exact]
    for report in short:
        sys.stderr.write(
            f"{report.trace}: {report.exact_share:.2%} of requests are exact in whole blocks, expected at "
            f"least {min_exact:.2%}\n"
        )
    return 1 if short else 0
