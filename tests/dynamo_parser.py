"""The parser of ``python -m dynamo.trtllm``, out of the package ai-dynamo, which `make test` installs apart.

As a program, with that package on its path, it prints the flags as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

PACKAGE = Path(sys.prefix) / "ai-dynamo"


class TheirFlag(NamedTuple):
    """A flag as argparse has it; ``env``: None where no help names it."""

    names: list[str]
    nargs: str | int | None
    env: str | None
    default: Any
    choices: list[str]


def flags_of_dynamo() -> list[TheirFlag]:
    """All flags of the installed release; the test is skipped where there is none."""
    if not PACKAGE.is_dir():
        pytest.skip(f"ai-dynamo is not installed in {PACKAGE}: `make .venv/installed-dev` does it")
    path = os.pathsep.join((str(PACKAGE), str(Path(__file__).parents[1])))
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "NATS_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.dynamo_parser"],
        env={**environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [TheirFlag(*each) for each in json.loads(done.stdout)]


def _stand_in_for_tensorrt_llm() -> None:
    """Dynamo takes four defaults from it."""
    names = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width")
    fields = {name: SimpleNamespace(default=None) for name in names}
    for name in ("tensorrt_llm", "tensorrt_llm.llmapi", "tensorrt_llm.llmapi.llm_args"):
        module: Any = sys.modules.setdefault(name, ModuleType(name))
        module.__path__ = []
    sys.modules["tensorrt_llm.llmapi.llm_args"].BaseLlmArgs = SimpleNamespace(model_fields=fields)  # type: ignore[attr-defined]


def _print() -> None:
    import argparse

    _stand_in_for_tensorrt_llm()
    from dynamo.common.configuration.groups.router_args import add_worker_router_arguments
    from dynamo.common.configuration.groups.runtime_args import DynamoRuntimeArgGroup
    from dynamo.trtllm.backend_args import DynamoTrtllmArgGroup

    parser = argparse.ArgumentParser()
    DynamoRuntimeArgGroup().add_arguments(parser)
    DynamoTrtllmArgGroup().add_arguments(parser)
    routing = argparse.ArgumentParser(add_help=False)
    add_worker_router_arguments(routing)
    found = []
    for action in (*parser._actions, *routing._actions):
        named = re.search(r"env var: (\S+)", action.help or "") if action in parser._actions else None
        default = None if action.default == argparse.SUPPRESS else action.default
        choices = list(map(str, action.choices or ()))
        found.append((action.option_strings, action.nargs, named and named[1], default, choices))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _print()
