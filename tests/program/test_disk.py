"""Temporary files that cannot be written, and disks that are full: said in one line, never passed over."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from vswa_plugin.cli.main import main
from vswa_plugin.errors import ConfigError
from vswa_plugin.program.disk import temporary_folder, why_full
from vswa_plugin.program.run import run_program

Output = pytest.CaptureFixture[str]
#: Mounts a disk, which needs a namespace of its own, of the first argument's size at the second one; goes on.
_ON_A_DISK = """
mount -t tmpfs -o size="$1" small "$2" || exit 77
if [ "$1" = 64k ]; then head -c 100000 /dev/zero > "$2/filling" 2> /dev/null; fi
shift 2
exec "$@"
"""
#: The size of a disk that is full already.
FULL_DISK = "64k"


def on_a_disk(size: str, folder: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """``command`` where ``folder`` is a disk of that size."""
    line = ["unshare", "-rm", "env", *(f"{name}={value}" for name, value in environ.items())]
    line += ["sh", "-c", _ON_A_DISK, "sh", size, str(folder), *command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=50, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("this user may not mount a disk in a namespace")
    return done


@pytest.mark.parametrize("variable", ["TMPDIR", "TEMP", "TMP"])
def test_a_folder_that_is_not_there_is_refused_by_its_variable_before_anything_starts(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    for other in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "none"))

    assert 2 == main(["brokers", "--nats-port", "0", "--etcd-port", "0"])
    assert (
        f"vswa: error: {variable}: expected a directory in which files can be written, got "
        f"'{tmp_path}/none': No such file or directory; create it, or name another one\n"
    ) == capsys.readouterr().err


def test_a_folder_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    assert tmp_path == temporary_folder()
    assert "" == why_full(tmp_path)
    assert "" == why_full(tmp_path / "none"), "not there, which is another reason"


def test_where_no_folder_can_be_written_there_is_a_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(variable, raising=False)

    def nothing() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nothing)
    with pytest.raises(ConfigError, match=r"TMPDIR: expected .* found in \['/tmp'\]; free some space"):
        temporary_folder()


def test_a_full_folder_is_refused_and_not_replaced_by_another(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "vswa_plugin", "brokers", "--nats-port", "0", "--etcd-port", "0")
    done = on_a_disk(FULL_DISK, tmp_path, *command, TMPDIR=str(tmp_path))

    assert (2, "") == (done.returncode, done.stdout)
    assert (
        "vswa: error: TMPDIR: expected a directory in which files can be written, got "
        f"'{tmp_path}': No space left on device; free some space there, or name another one\n"
    ) == done.stderr


def test_a_launch_without_room_for_its_etcd_says_how_much_is_needed(tmp_path: Path, model_dir: Path) -> None:
    command = (sys.executable, "-m", "vswa_plugin.launch", "agg", "--model-path", str(model_dir))
    done = on_a_disk("4m", tmp_path, *command, "--http-port", "0", TMPDIR=str(tmp_path))

    assert 2 == done.returncode, done.stderr
    assert "expected 136 MiB free for the embedded etcd in " in done.stderr
    assert "got 3 MiB: free some space there, or name another disk with TMPDIR" in done.stderr
    assert 1 == done.stderr.count("\n")


_CHILD = """
import asyncio, sys
from pathlib import Path
from vswa_plugin.launch.processes import Child, ChildDied

async def body():
    child = await Child.start("x", ["sh", "-c", "echo the reason; exit 3"], Path(sys.argv[1]))
    await child.wait()
    print(child.last_words())
    try:
        child.check()
    except ChildDied as error:
        print(error)

asyncio.run(body())
"""


def test_of_a_child_that_could_write_no_reason_the_full_disk_is_named(tmp_path: Path) -> None:
    done = on_a_disk(FULL_DISK, tmp_path, sys.executable, "-c", _CHILD, str(tmp_path))
    full = (
        f"No space left on device in {tmp_path}: free some space there, or name another disk with --log-dir "
        "or TMPDIR"
    )

    assert [
        f"it could write nothing; {full}",
        f"x ended with exit code 3; {full}; the end of its log, {tmp_path}/x.log:",
        "",
    ] == done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize(
    ("code", "step"),
    [
        (errno.ENOSPC, "free some space there"),
        (errno.EDQUOT, "free some space there"),
        (errno.EACCES, "check the path and its permissions"),
    ],
)
def test_a_full_disk_is_no_question_of_permissions(code: int, step: str, capsys: Output) -> None:
    def body() -> int:
        raise OSError(code, "the reason", "/x")

    assert 2 == run_program("p", body)
    assert f"p: error: cannot use /x: the reason; {step}\n" == capsys.readouterr().err
