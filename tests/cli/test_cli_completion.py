"""``vswa completion``: what the scripts complete, seen in a real shell where there is one."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vswa_plugin.cli import BUILT_IN, PROGRAMS
from vswa_plugin.cli.main import main

Output = pytest.CaptureFixture[str]
Complete = Callable[..., set[str]]
PLUGIN = """
from vswa_plugin.hookspecs import hookimpl

def configure(parser):
    parser.add_argument("--colour", metavar="red|green|#RGB")

def broken(parser):
    parser.add_argument("--before")
    raise KeyError("no such option")

@hookimpl
def vswa_register_commands(commands):
    commands.add("greet", "say hello", configure, lambda args: 0)
    commands.add("broken", "no options", broken, lambda args: 0)
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "greeter.py"
    path.write_text(PLUGIN)
    return str(path)


@pytest.fixture
def complete(tmp_path: Path, plugin: str, capsys: Output) -> Complete:
    """What bash offers for a command line whose last word is being typed."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    assert 0 == main(["--plugin", plugin, "completion", "bash"])
    script = tmp_path / "vswa.bash"
    script.write_text(capsys.readouterr().out)

    def completed(*words: str) -> set[str]:
        code = (
            f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); '
            "registered=$(complete -p vswa | sed -E 's/.* -F ([^ ]+) .*/\\1/'); "
            "$registered; printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        done = subprocess.run(
            [bash, "--norc", "-c", code, "bash", "vswa", *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            cwd=tmp_path,
        )
        return set(done.stdout.split())

    return completed


def test_commands_of_vswa_and_of_plugins_are_completed(complete: Complete) -> None:
    assert {*PROGRAMS, *BUILT_IN, "simulate", "make-model", "greet", "broken"} <= complete("")
    assert {"worker"} == complete("wor")
    assert {"replay", "route"} == complete("accuracy", "")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("worker", "--mod"), {"--mode", "--model", "--model-path"}),
        (("worker", "--mode", ""), {"agg", "prefill", "decode"}),
        (("router", "--log-level", ""), {"debug", "info", "warning", "error"}),
        (("selector", "--http"), {"--http-port", "--http-host"}),
        (("frontend", "--router-mode", "r"), {"round-robin", "random"}),
        (("launch", "disagg"), {"disagg", "disagg_router"}),
        (("accuracy", "replay", "--mi"), {"--min-exact"}),
        (("brokers", "--e"), {"--etcd-port"}),
        (("completion", ""), {"bash", "zsh"}),
        (("greet", "--c"), {"--colour"}),
        (("greet", "--colour", ""), {"red", "green"}),
        (("broken", "--b"), {"--before"}),
    ],
)
def test_options_and_their_values_are_completed(
    complete: Complete, words: tuple[str, ...], offered: set[str]
) -> None:
    assert offered == complete(*words)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("worker", "--extra-engine-args", "s"), {"settings.yaml", "some"}),
        (("launch", "agg", "--model-path", "s"), {"settings.yaml", "some"}),
        (("brokers", "--data-dir", "s"), {"some"}),
        (("--plugin", "g"), {"greeter.py"}),
    ],
)
def test_files_and_directories_are_completed_where_an_option_takes_one(
    complete: Complete, tmp_path: Path, words: tuple[str, ...], offered: set[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("")
    (tmp_path / "some").mkdir()

    assert offered == {name.rstrip("/") for name in complete(*words)}


def test_the_script_for_zsh_has_every_command_with_its_help_and_options(
    plugin: str, tmp_path: Path, capsys: Output
) -> None:
    assert 0 == main(["--plugin", plugin, "completion", "zsh"])
    script = capsys.readouterr().out

    assert script.startswith("#compdef vswa\n")
    for name, text in {**{n: p.help for n, p in PROGRAMS.items()}, **BUILT_IN}.items():
        assert f"{name}:{shlex.quote(text)}" in script
    for part in ("--colour", "(red green)", "--http-port", "--extra-engine-args"):
        assert part in script
    zsh = shutil.which("zsh")
    if zsh is not None:
        file = tmp_path / "_vswa"
        file.write_text(script)
        subprocess.run([zsh, "-n", file], check=True, timeout=30)


@pytest.mark.parametrize("arguments", [["completion"], ["completion", "fish"]])
def test_another_shell_is_refused(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)

    assert 2 == refused.value.code
    assert "shell" in capsys.readouterr().err
