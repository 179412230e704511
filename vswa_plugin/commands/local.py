"""What ``vswa demo`` and ``vswa serve`` share: their options, the default model, progress lines."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from vswa_plugin.errors import VswaError
from vswa_plugin.processes import python_module

Progress = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="a Gemma 3 checkpoint (default: a small random one is made)"
    )
    parser.add_argument("--served-model-name", default="gemma", help="what clients call the model (gemma)")
    parser.add_argument("--workers", type=int, default=2, help="how many workers (2)")
    parser.add_argument("--http-port", type=int, default=0, help="port of the frontend (default: a free one)")
    parser.add_argument(
        "--engine-args", metavar="FILE", help="engine options, as --extra-engine-args of a worker"
    )
    parser.add_argument("--log-dir", metavar="DIR", help="keep the logs of all processes there")


def progress_from(began: float) -> Progress:
    """Prints a line with the seconds since ``began``."""

    def show(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", flush=True)

    return show


async def model_path(args: argparse.Namespace, folder: Path, progress: Progress) -> Path:
    """The model that was asked for, or a small random one in ``folder``."""
    if args.model is not None:
        return Path(args.model)
    directory = folder / "model"
    progress(f"making a small random Gemma 3 in {directory}: its words mean nothing, all else is real")
    # Through the command line, because the host knows no engine: gemma3_cpu's plugin provides it.
    command = python_module("vswa_plugin", "make-model", str(directory))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
    if await process.wait() != 0:
        raise VswaError("`vswa make-model` failed; its message is above")
    return directory


def log_folder(args: argparse.Namespace, scratch: Path) -> Path:
    """Where logs go: kept where the user asked, else thrown away with ``scratch``."""
    folder = Path(args.log_dir) if args.log_dir else scratch
    folder.mkdir(parents=True, exist_ok=True)
    return folder
