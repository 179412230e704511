"""The embedded engine before it starts: what it refuses, its plugin and commands."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import vswa_plugins.gemma3_cpu as plugin
from vswa_plugins.gemma3_cpu import commands
from vswa_plugins.gemma3_cpu.model.blas import choose_threads
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine

from tests.gemma3_engine_helpers import OPTIONS, settings_for
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.errors import ConfigError


def test_an_unknown_mode_is_refused_with_the_known_ones(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown mode 'prefil'.*Known: agg, decode, prefill"):
        Gemma3CpuEngine(settings_for(small, mode="prefil"))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_directory_that_lacks_a_file_is_refused_at_once(
    small: Path, tmp_path: Path, missing: str
) -> None:
    for path in small.iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)

    with pytest.raises(ConfigError, match=missing):
        Gemma3CpuEngine(settings_for(tmp_path))


def test_a_block_size_that_does_not_divide_the_window_is_refused(small: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"window that is a multiple of the block size \(20 tokens\), got 32"
    ):
        Gemma3CpuEngine(settings_for(small, {"kv_cache_config": {"tokens_per_block": 20}}))


def test_ignored_options_are_reported_in_one_line(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        Gemma3CpuEngine(settings_for(small, {**OPTIONS, "backend": "pytorch", "cuda_graph_config": {}}))

    assert ["options without effect in gemma3_cpu: backend, cuda_graph_config"] == [
        record.getMessage() for record in caplog.records if "without effect" in record.getMessage()
    ]


def test_a_narrow_model_uses_one_thread_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    assert [1, 3, None] == [choose_threads(None, 64), choose_threads(3, 64), choose_threads(None, 640)]
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert choose_threads(None, 64) is None


def test_threads_are_set_in_the_library_that_numpy_uses() -> None:
    from vswa_plugins.gemma3_cpu.model import blas

    assert blas.set_threads(1) == bool(blas._loaded_openblas())


def test_the_plugin_answers_for_its_own_name_and_where_nobody_has_named_an_engine(small: Path) -> None:
    settings = settings_for(small)

    assert ["gemma3_cpu"] == plugin.vswa_engine_names()
    assert isinstance(plugin.vswa_engine(settings), Gemma3CpuEngine)
    unnamed = plugin.vswa_engine(msgspec.structs.replace(settings, engine=""))
    assert unnamed is not None and unnamed.info.engine == "gemma3_cpu"
    assert plugin.vswa_engine(type(settings)("other", "agg", "", "")) is None


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, vswa_plugins.gemma3_cpu as p; from vswa_plugin.hookspecs.commands import Commands;"
        "p.vswa_register_commands(Commands('gemma3_cpu', {}, None));"
        "print(sorted({'numpy', 'yaml', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "[]" == done.stdout.strip()


def test_make_model_writes_a_directory_that_the_committed_config_can_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    parser = argparse.ArgumentParser()
    commands.configure_make_model(parser)
    code = commands.run_make_model(parser.parse_args([str(tmp_path / "model"), "--seed", "3"]))
    file = Path(__file__).parents[3] / "engine_configs" / "gemma3" / "vswa_agg.yaml"
    engine = Gemma3CpuEngine(settings_for(tmp_path / "model", yaml.safe_load(file.read_text())))

    assert 0 == code
    assert "6 layers, windows 512, global, context 8192 tokens, seed 3" in capsys.readouterr().out
    assert [512, None] == [group.window_size for group in engine.info.layout.groups]
    assert engine.info.context_length >= 4096


def test_make_model_with_few_layers_keeps_a_global_one(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    commands.configure_make_model(parser)
    sizes = ["--layers", "2", "--window", "64", "--context", "256"]
    commands.run_make_model(parser.parse_args([str(tmp_path / "model"), *sizes]))
    engine = Gemma3CpuEngine(settings_for(tmp_path / "model", {}))

    assert [64, None] == [group.window_size for group in engine.info.layout.groups]
