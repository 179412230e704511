"""Small files that say they are huge or deep: refused in a line, before memory or time is spent on them."""

from __future__ import annotations

import gzip
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vswa_plugins.gemma3_cpu.model.config import load_config, parse_config
from vswa_plugins.gemma3_cpu.weights.checkpoint import DEFAULT_CONFIG, make_checkpoint
from vswa_plugins.gemma3_cpu.weights.gguf_file import GgufFile
from vswa_plugins.gemma3_cpu.weights.gguf_import import read_config
from vswa_plugins.gemma3_cpu.weights.safetensors import SafetensorsSource

from tests.gemma3_gguf_helpers import MODEL, needs_gguf, write_gguf
from vswa_plugin.accuracy.trace import open_trace
from vswa_plugin.errors import ConfigError
from vswa_plugin.worker.engine_args import load_engine_args

#: What is no refusal but a fault of the reader.
FAULTS = (RecursionError, MemoryError, ArithmeticError, ValueError, TypeError, LookupError)
MAX_REFUSAL = 2_000
DEEP = 100_000
SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "vocab_size": 300, "num_hidden_layers": 2}


def outcome(read: Callable[[], object]) -> str:
    """``read``, ``refused`` with the reason, or the fault that a reader of the file has run into."""
    try:
        read()
    except ConfigError as error:
        return f"refused: {error}"
    except FAULTS as error:
        return type(error).__name__
    return "read"


def assert_refused(read: Callable[[], object], *named: str) -> None:
    found = outcome(read)
    assert found.startswith("refused: "), found
    assert len(found) <= MAX_REFUSAL
    for word in named:
        assert word in found


# -- depth -----------------------------------------------------------------------------------------------


def test_an_option_file_of_five_hundred_levels_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 500 + "]" * 500)

    assert_refused(lambda: load_engine_args(str(file), None), "deep.yaml")


def test_a_worker_ends_with_one_line_and_code_2_over_an_option_file_that_is_too_deep(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("a: " + "[" * 500 + "]" * 500)
    command = [sys.executable, "-m", "vswa_plugin.worker", "--model-path", str(tmp_path)]
    done = subprocess.run(
        [*command, "--extra-engine-args", str(file)], capture_output=True, text=True, timeout=10
    )

    assert (2, False) == (done.returncode, "Traceback" in done.stderr)
    assert "deep.yaml" in done.stderr


def test_options_on_the_command_line_of_many_levels_are_refused() -> None:
    override = '{"a":' * DEEP + "1" + "}" * DEEP

    assert_refused(lambda: load_engine_args(None, override), "--override-engine-args")


def test_a_trace_with_an_event_of_many_levels_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text(f'{TRACE_HEADER}\n{{"type":"event","event":{"[" * DEEP}{"]" * DEEP}}}\n')

    assert_refused(lambda: list(open_trace(path).records()), "line 2")


def test_a_model_config_of_many_levels_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", overrides=SMALL)
    (tmp_path / "m" / "config.json").write_text('{"a":' * DEEP + "1" + "}" * DEEP)

    assert_refused(lambda: load_config(tmp_path / "m"), "config.json")


def test_a_weights_file_with_a_header_of_many_levels_is_refused(tmp_path: Path) -> None:
    header = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    assert_refused(lambda: SafetensorsSource(tmp_path), "model.safetensors")


# -- size ------------------------------------------------------------------------------------------------

TRACE_HEADER = '{"type":"header","format":"trtllm","tokens_per_block":32,"groups":[{"kind":"full"}]}'
#: Bytes that a reader may have besides what it began with: more than any sensible line, less than this one.
READER_BYTES, LINE_PARTS, PART_BYTES = 192 << 20, 64, 16 << 20


def print_trace(path: str) -> None:
    """In a child process, in little memory."""
    begun_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = begun_with + READER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout.write(outcome(lambda: list(open_trace(Path(path)).records())))


def outcome_in_little_memory(path: Path) -> str:
    code = f"from {__name__} import print_trace; print_trace({str(path)!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def test_a_line_of_a_trace_that_unpacks_to_a_gigabyte_is_refused_before_it_is_read_whole(
    tmp_path: Path,
) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    # A file of several parts is one for every reader, so that the long line need not be packed whole.
    part = gzip.compress(b"a" * PART_BYTES, 9)
    start = gzip.compress(f'{TRACE_HEADER}\n{{"type":"event","event":"'.encode())
    path.write_bytes(start + part * LINE_PARTS + gzip.compress(b'"}\n'))
    found = outcome_in_little_memory(path)

    assert found.startswith("refused: "), found
    assert "line 2" in found


def test_a_line_of_a_trace_that_unpacks_to_some_megabytes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(
        gzip.compress(f'{TRACE_HEADER}\n{{"type":"event","event":"{"a" * (4 << 20)}"}}\n'.encode())
    )

    assert "read" == outcome_in_little_memory(path)


def test_a_model_config_may_have_as_many_layers_as_the_largest_model() -> None:
    config = parse_config({**DEFAULT_CONFIG, "num_hidden_layers": 62}, "config.json")

    assert 62 == config.num_hidden_layers


def test_a_model_config_that_says_a_million_layers_is_refused() -> None:
    config = {**DEFAULT_CONFIG, "num_hidden_layers": 1_000_000}

    assert_refused(lambda: parse_config(config, "config.json"), "config.json", "num_hidden_layers")


@needs_gguf
def test_a_gguf_file_that_says_a_million_layers_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "m", overrides=MODEL)
    path = write_gguf(tmp_path / "m.gguf", tmp_path / "m", block_count=1_000_000)

    assert_refused(lambda: parse_config(read_config(GgufFile(path)), str(path)), "m.gguf")


# -- GGUF files whose numbers make no sense ----------------------------------------------------------------

Shape = tuple[int, ...]


def gguf(path: Path, alignment: tuple[int, bytes] | None, *tensors: tuple[str, Shape, int]) -> Path:
    """A file with one metadata value at most, and tensors of float32: name, dimensions, offset."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1 if alignment else 0)
    if alignment:
        out += text("general.alignment") + struct.pack("<I", alignment[0]) + alignment[1]
    for name, shape, offset in tensors:
        dimensions = b"".join(struct.pack("<Q", size) for size in shape)
        out += text(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", 0, offset)
    path.write_bytes(out + b"\0" * 4096)
    return path


def read_gguf(path: Path) -> list[Shape]:
    file = GgufFile(path)
    return [file.read(name).shape for name in file.tensors]


U32, F32, TEXT, ARRAY = 4, 6, 8, 9
ALIGNMENTS = {
    "0": (U32, struct.pack("<I", 0)),
    "a text": (TEXT, struct.pack("<Q", 3) + b"abc"),
    "not a number": (F32, struct.pack("<f", float("nan"))),
    "an array": (ARRAY, struct.pack("<IQ", U32, 2) + bytes(8)),
}
SHAPES: dict[str, Shape] = {
    "more bytes than there are addresses": (32, 2**58),
    "the largest size": (2**64 - 1,),
    "a product that wraps round": (2**32, 2**32),
    "no values": (0, 5),
}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_gguf_file_whose_alignment_is_no_positive_number_is_refused(tmp_path: Path, alignment: str) -> None:
    path = gguf(tmp_path / "m.gguf", ALIGNMENTS[alignment], ("a", (32,), 0))

    assert_refused(lambda: read_gguf(path), "m.gguf", "alignment")


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gguf_tensor_larger_than_its_file_is_refused_by_its_name(tmp_path: Path, shape: str) -> None:
    path = gguf(tmp_path / "m.gguf", None, ("blk.0.weight", SHAPES[shape], 0))

    assert_refused(lambda: read_gguf(path), "m.gguf", "blk.0.weight")


def test_a_gguf_tensor_without_dimensions_is_read_or_refused(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", None, ("blk.0.weight", (), 0))

    assert outcome(lambda: read_gguf(path)).partition(":")[0] in ("read", "refused")


def test_a_gguf_tensor_beyond_the_end_of_its_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", None, ("blk.0.weight", (32,), 2**64 - 1))

    assert_refused(lambda: read_gguf(path), "m.gguf", "blk.0.weight")


def test_a_gguf_tensor_of_four_thousand_million_dimensions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    name = struct.pack("<Q", 1) + b"a"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<I", 2**32 - 1) + b"\0" * 4096
    )

    assert_refused(lambda: read_gguf(path), "m.gguf")


def test_a_gguf_file_whose_numbers_make_sense_is_read(tmp_path: Path) -> None:
    path = gguf(tmp_path / "m.gguf", (U32, struct.pack("<I", 32)), ("a", (32, 2), 0))

    assert [(2, 32)] == read_gguf(path)
