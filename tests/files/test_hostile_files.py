"""Each reader of files, over files that are almost right, in a process with little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

#: The properties of hostile.py; named here, as importing it would load all that they need.
READERS = ("whole", "config", "others", "safetensors", "shards", "gguf", "traces", "workloads", "entries")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("reader", READERS)
def test_whatever_a_file_holds_it_is_read_or_refused_in_a_line_and_in_little_memory(
    tmp_path: Path, reader: str
) -> None:
    if reader == "gguf" and find_spec("gguf") is None:
        pytest.skip("needs the package gguf: pip install 'vswa-plugin[gguf]'")
    command = [sys.executable, "-m", "tests.files.hostile", reader, str(tmp_path)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=290
    )

    assert 0 == done.returncode, done.stderr[-8_000:]


def test_every_property_of_a_reader_is_run() -> None:
    source = (Path(__file__).parent / "hostile.py").read_text()

    assert f"READERS = ({', '.join(READERS)})" in source
