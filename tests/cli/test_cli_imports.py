"""What ``vswa`` imports before it knows what is asked for: little, so that it answers at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: What takes long to import, or starts threads, and is needed by single commands only.
HEAVY = {
    *("aiohttp", "dynamo", "etcd3", "grpc", "matplotlib", "nats", "numpy", "pygments", "rich", "shtab"),
    *("tokenizers", "uvloop", "yaml"),
}


def imported(*arguments: str) -> set[str]:
    """The modules in a process that has run ``vswa`` with these arguments."""
    code = """
import sys
from vswa_plugin.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.stderr.write(" ".join(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout
    return set(done.stderr.split())


def test_version_imports_its_own_two_modules_and_the_standard_library() -> None:
    modules = imported("--version")
    ours = {name for name in modules if name.partition(".")[0] in ("vswa_plugin", "vswa_plugins")}

    assert {
        "vswa_plugin",
        "vswa_plugin.cli",
        "vswa_plugin.cli.main",
        "vswa_plugin.errors",
        "vswa_plugin.program",
        "vswa_plugin.program.run",
    } == ours
    assert set() == modules & {*HEAVY, "msgspec", "pluggy", "asyncio"}


@pytest.mark.parametrize("arguments", [["--help"], [], ["plugins", "--help"]])
def test_help_and_small_commands_import_no_engine_no_broker_client_and_no_other_command(
    arguments: list[str],
) -> None:
    modules = imported(*arguments)
    commands = {name for name in modules if name.startswith("vswa_plugin.cli.")}

    assert set() == {name.partition(".")[0] for name in modules} & HEAVY
    assert commands <= {"vswa_plugin.cli.main", "vswa_plugin.cli.parsers", "vswa_plugin.cli.plugins"}
    for program in ("worker", "router", "launch", "frontend"):
        assert f"vswa_plugin.{program}" not in modules
