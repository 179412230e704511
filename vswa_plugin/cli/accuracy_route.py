"""``vswa accuracy route``: what better promises are worth, by simulation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import msgspec

from vswa_plugin.accuracy.showing import check_plot, console, progress
from vswa_plugin.engine.presets import DEFAULT_BLOCK_SIZE, listed_models
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.program.options import (
    at_least_one,
    excludes,
    integer,
    positive,
    real,
    requires,
    whole_number,
)
from vswa_plugin.simulation.costs import CostModel
from vswa_plugin.simulation.policies import ORACLE
from vswa_plugin.simulation.report import Report, as_data, conclusions, plot, summary, tables
from vswa_plugin.simulation.sweep import DEFAULT_POLICIES, Bench, Case, Plan, Run, cases
from vswa_plugin.simulation.workloads import WORKLOADS

_EXAMPLES = f"""\
examples:
  vswa accuracy route forks                                  1,000 requests, 4 ranks, three sizes of memory
  vswa accuracy route chat forks --model gpt-oss --blocks 512,4096
  vswa accuracy route mooncake.jsonl --requests 500          a file in Mooncake's format
  vswa accuracy route forks --seeds 10 --json > route.json
  vswa accuracy route forks --model gemma-4-31b,qwen3.5-9b   hybrid models, as vLLM caches them

models (cache groups: window, chunk or kind / tokens per block where the engine chooses them):
{listed_models()}

Nothing is computed: caches and their events are simulated, times come from a cost model whose numbers are
options. What matters are differences between policies, not seconds. A difference of some percent is worth
believing only if it comes with many seeds: --seeds 10.

The cost model: prefill = fixed + per token * computed tokens + per pair * pairs of a computed token and one
before it; then a time per output token. The defaults are calibrated on NVIDIA's published times of Llama 3.3
70B in fp8 on two H100 (docs/accuracy.md). For another engine: measure the first token of two prompt lengths.
"""

_DESCRIPTION = """\
Simulate ranks behind routers that differ in one thing, what they believe each rank would reuse: nothing
(random, round robin), the global groups (as Dynamo does), one tree for all groups (boundary projection),
every group by the engine's rule (exact), or what the caches really hold (oracle)."""

_COST_OPTIONS = (
    ("fixed_s", "SECONDS", "time that every prompt takes"),
    ("per_token_s", "SECONDS", "time that each computed prompt token takes"),
    ("per_pair_s", "SECONDS", "time for each pair of a computed prompt token and a token before it"),
    ("per_output_token_s", "SECONDS", "time that each generated token takes"),
)


def configure_route(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    add, plan = parser.add_argument, Plan("")
    known = ", ".join(WORKLOADS)
    add("workloads", nargs="+", metavar="WORKLOAD", help=f"{known}, or a file in Mooncake's format")
    add(
        "--requests",
        type=at_least_one,
        metavar="N",
        help="how many requests are simulated (default: 1000, or all of the file)",
    )
    add(
        "--workers",
        type=at_least_one,
        default=plan.ranks,
        metavar="N",
        help="how many ranks serve (default: %(default)s)",
    )
    add(
        "--model",
        default="gemma-3-1b",
        metavar="M,...",
        help="a model of the list below (default: %(default)s)",
    )
    add(
        "--blocks",
        default="1024,2048,4096",
        metavar="N,...",
        help="blocks of each rank for global attention, of 32 tokens where the engine chooses the block "
        "sizes; one run for each number (default: %(default)s)",
    )
    add(
        "--sliding-share",
        type=real,
        default=plan.sliding_share,
        metavar="SHARE",
        help="room for every other cache group, as a share of --blocks; vLLM has one pool for all of it "
        "(default: %(default)s)",
    )
    add(
        "--block-size",
        type=at_least_one,
        metavar="TOKENS",
        help="tokens of a block; not for models of vLLM, which chooses itself "
        f"(default: {DEFAULT_BLOCK_SIZE})",
    )
    add(
        "--policies",
        metavar="P,...",
        help="policies of routers, of which every scorer is one; also placement, dynamo, sglang, preble, "
        "lbgr, and one cache with the blocks of all ranks "
        f"(default: {', '.join(DEFAULT_POLICIES)}; the projection only where all groups are windows "
        "or global, in blocks of one size)",
    )
    add(
        "--rate",
        type=positive,
        metavar="R",
        help="requests per second (default: what --load makes of it; for a file, its own times)",
    )
    add(
        "--load",
        type=positive,
        metavar="L",
        help="the rate of a made-up workload, instead of --rate: seconds of prefill that arrive per second "
        f"and rank if nothing were cached (default: {plan.load})",
    )
    add(
        "--slow-rank",
        type=positive,
        default=plan.slow_rank,
        metavar="FACTOR",
        help="the first rank takes so many times as long to compute (default: %(default)g)",
    )
    add(
        "--small-rank",
        type=real,
        default=plan.small_rank,
        metavar="SHARE",
        help="the first rank has this share of the others' blocks (default: %(default)g)",
    )
    add(
        "--restart-after",
        type=at_least_one,
        metavar="N",
        help="the first rank begins anew, empty, when N requests have come (default: never)",
    )
    for name, unit, help_ in _COST_OPTIONS:
        option = f"--cost-{name.removesuffix('_s').replace('_', '-')}"
        default = getattr(plan.cost, name)
        add(
            option,
            dest=name,
            type=real,
            default=default,
            metavar=unit,
            help=f"{help_} (default: {default:g})",
        )
    add(
        "--seed",
        type=integer,
        default=0,
        help="seed of made-up requests and times, and of the choice between equal ranks (default: 0)",
    )
    add(
        "--seeds",
        type=at_least_one,
        default=1,
        metavar="N",
        help="repeat each run with N seeds, from --seed on (default: 1)",
    )
    add(
        "--jobs",
        type=at_least_one,
        default=os.cpu_count() or 1,
        metavar="N",
        help="how many processes work side by side (default: one per CPU)",
    )
    add(
        "--json", action="store_true", help="print one JSON object with averages and with comparisons by seed"
    )
    add("--plot", metavar="FILE", help="also draw the result to a .png, .svg or .pdf file; needs matplotlib")


def run_route(args: argparse.Namespace) -> int:
    excludes("--load", args.load, "--rate", args.rate)
    made_up = any(workload in WORKLOADS for workload in args.workloads)
    requires("--load", args.load, f"a made-up workload ({', '.join(WORKLOADS)})", made_up)
    wanted = [(_plan(args, workload), case) for workload in args.workloads for case in _cases(args)]
    plugins = (tuple(args.plugin), tuple(args.no_plugin), args.plugin_options)
    if args.plot:
        check_plot(Path(args.plot))
    with progress(counted=True) as bar:
        task = bar.add_task("runs", total=len(wanted))
        runs = _run_all(wanted, plugins, args.jobs, lambda: bar.advance(task))
    reports: dict[str, Report] = {}
    for (plan, _), run in zip(wanted, runs, strict=True):
        reports.setdefault(plan.workload, Report(plan, [])).runs.append(run)
    if args.json:
        print(msgspec.json.encode(as_data(list(reports.values()))).decode())
    else:
        _show(list(reports.values()))
    if args.plot:
        plot(list(reports.values()), Path(args.plot))
    return 0


def _plan(args: argparse.Namespace, workload: str) -> Plan:
    requests = args.requests
    if requests is None and workload in WORKLOADS:
        requests = 1_000
    return Plan(
        workload=workload,
        requests=requests,
        ranks=args.workers,
        block_size=args.block_size,
        sliding_share=args.sliding_share,
        rate=args.rate,
        load=Plan(workload).load if args.load is None else args.load,
        slow_rank=args.slow_rank,
        small_rank=args.small_rank,
        restart_after=args.restart_after,
        cost=CostModel(**{name: getattr(args, name) for name, _, _ in _COST_OPTIONS}),
    ).check()


def _cases(args: argparse.Namespace) -> list[Case]:
    names = None if args.policies is None else _words("--policies", args.policies)
    if names is not None and ORACLE not in names:
        names.append(ORACLE)
    blocks = []
    for word in _words("--blocks", args.blocks):
        if not (number := whole_number(word)):
            raise ConfigError(f"--blocks: expected numbers of at least 1, got {word!r}")
        blocks.append(number)
    return cases(_words("--model", args.model), blocks, names, range(args.seed, args.seed + args.seeds))


def _words(option: str, text: str) -> list[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise ConfigError(f"{option}: expected at least one word, got {text!r}")
    return words


# -- running -----------------------------------------------------------------------------------------

_Plugins = tuple[tuple[str, ...], tuple[str, ...], str | None]
_host: PluginHost | None = None


def _run_all(
    wanted: Sequence[tuple[Plan, Case]], plugins: _Plugins, jobs: int, advance: Callable[[], None]
) -> list[Run]:
    """The runs of all cases, in their order."""
    if jobs == 1 or len(wanted) == 1:
        runs = []
        with _host_of(*plugins) as host:
            for plan, case in wanted:
                runs.append(Bench(plan, host).run(case))
                advance()
        return runs
    with ProcessPoolExecutor(
        min(jobs, len(wanted)), get_context("spawn"), initializer=_begin, initargs=plugins
    ) as pool:
        futures = [pool.submit(_run_one, plan, case) for plan, case in wanted]
        try:
            for future in as_completed(futures):
                future.result()
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _host_of(plugin: Sequence[str], no_plugin: Sequence[str], options: str | None) -> PluginHost:
    return load_host(plugin, no_plugin, options=options)


def _begin(plugin: Sequence[str], no_plugin: Sequence[str], options: str | None) -> None:
    """Of one process: its own plugins, for as long as it lives."""
    global _host
    _host = _host_of(plugin, no_plugin, options)


def _run_one(plan: Plan, case: Case) -> Run:
    assert _host is not None, "the process has begun"
    return Bench(plan, _host).run(case)


# -- showing -----------------------------------------------------------------------------------------


def _show(reports: Sequence[Report]) -> None:
    out = console()
    for number, report in enumerate(reports):
        if number:
            out.print()
        out.print(summary(report), style="bold")
        for title, table in tables(report, terminal=out.is_terminal):
            out.print()
            out.print(title)
            out.print(table)
        out.print()
        for line in conclusions(report):
            out.print(line)
