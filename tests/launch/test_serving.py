"""A deployment that is kept: what its messages call the command that keeps it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswa_plugin.cli.main import main
from vswa_plugin.errors import ConfigError


@pytest.mark.parametrize("command", ["launch agg --model-path {model}", "serve"])
def test_messages_name_the_command_that_runs(
    command: str, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def life(name: str) -> None:
        names.append(name)
        raise ConfigError("it goes no further")

    monkeypatch.setattr("vswa_plugin.launch.serving.Life", life)
    argv = command.format(model=model_dir).split()

    assert 2 == main(argv)
    assert [f"vswa {argv[0]}"] == names
