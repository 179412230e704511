"""The relay's command line, up to where it would run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vswa_plugin.errors import ConfigError
from vswa_plugin.relay.__main__ import main
from vswa_plugin.relay.args import RelayArgs, parse


def parsed(*words: str, **environ: str) -> RelayArgs:
    return parse(words, environ)


def test_a_worker_of_the_command_line(model_dir: Path) -> None:
    given = (
        "--events",
        "tcp://h:1",
        "--replay",
        "tcp://h:2",
        "--worker-id",
        "7",
        "--data-parallel-size",
        "2",
    )
    what = ("--model-path", str(model_dir), "--engine-options", '{"block_size": 32}', "--hidden")
    (one,) = parsed(*given, *what, DYN_NAMESPACE="there").workers

    assert ("there.backend.generate", 7, False) == (str(one.endpoint), one.worker_id, one.visible)
    source = one.source
    assert ("tcp://h:1", "tcp://h:2", (0, 1)) == (source.endpoint, source.replay, source.dp_ranks)
    assert ({"block_size": 32}, "gemma") == (source.options, source.served_model_name)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_the_default_endpoint_is_that_of_the_mode(mode: str, model_dir: Path) -> None:
    (one,) = parsed("--events", "tcp://h:1", "--model-path", str(model_dir), "--mode", mode).workers

    assert {"prefill": "prefill", "decode": "backend"}[mode] == one.endpoint.component


def test_a_file_that_is_wrong_is_refused_with_the_worker_it_is_about(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    workers = [
        {"events": "tcp://10.0.0.1:1", "model_path": str(model_dir)},
        {"events": "tcp://10.0.0.2:1", "model_path": str(empty)},
    ]
    file = tmp_path / "fleet.yaml"
    file.write_text(json.dumps({"workers": workers}))

    assert 2 == main(["--workers", str(file)])
    error = capsys.readouterr().err
    assert "config.json" in error and "this is about workers[1] (tcp://10.0.0.2:1)" in error
    assert 1 == len([line for line in error.splitlines() if line.startswith("vswa relay: error:")])


def test_a_file_without_a_model_says_how_to_name_one(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text('{"workers": [{"events": "tcp://h:1"}]}')

    with pytest.raises(ConfigError, match=r"workers\[0\]\.model_path: expected the directory or name"):
        parsed("--workers", str(file))
