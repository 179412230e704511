"""Files that are almost what they should be, read in little memory: a result or one refusal, nothing else.

``python -m tests.files.hostile READER FOLDER`` runs the property of one reader in this process, whose address
space is limited first: an allocation of a size that a file only claims is a MemoryError here.
"""

from __future__ import annotations

import json
import logging
import resource
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import vswa_plugins.gemma3_cpu.serving.engine as serving
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint
from vswa_plugins.gemma3_cpu.weights.gguf_import import import_gguf
from vswa_plugins.gemma3_cpu.weights.source import find_model, load_model
from vswa_plugins.tensorrt_llm.model_shape import load_shape

from tests.accuracy_helpers import replayed
from tests.gemma3_gguf_helpers import write_gguf
from tests.properties import examples, register_profiles
from tests.registry_helpers import entry
from vswa_plugin.dynamo.chat import chat_obstacle
from vswa_plugin.engine.contract import EngineSettings
from vswa_plugin.errors import ConfigError, ProtocolError
from vswa_plugin.registry import decode_entry, encode_entry
from vswa_plugin.registry.watching import RegistryState
from vswa_plugin.simulation.workloads import mooncake

register_profiles()

#: Bytes that a reader may have besides what the process began with; the engine's own cache is 64 MiB.
READER_BYTES = 1 << 30
MAX_REFUSAL = 2_000
SMALL = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 2}
SMALL |= {"sliding_window_pattern": 2, "sliding_window": 64, "max_position_embeddings": 512}
DATA = Path(__file__).parents[1] / "data"

NUMBERS = [0, -1, 1, 2, 31, 1_000, 2**20, 2**31 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
#: Values of a key of JSON, as text: some are none that Python's json would write.
TEXTS = st.sampled_from(
    [
        *map(str, NUMBERS),
        *("1e400", "-1e400", "1e308", "0.5", "-0.0", "NaN", "Infinity", "1" * 5_000, "null", "true", "false"),
        *('""', '"linear"', '"sliding_attention"', '"\\ud800"', '"' + "x" * 5_000 + '"', "[]", "{}", "[[]]"),
        *('{"a": 1}', "[1, 2]", "[" * 200 + "]" * 200, '["sliding_attention", "full_attention"]', "[null]"),
        '{"rope_type": "linear", "factor": 1e400}',
        '{"full_attention": 1, "sliding_attention": {"rope_theta": -1}}',
    ]
)


def reads(read: Callable[[], object], refusal: type[Exception] = ConfigError) -> None:
    """Run ``read``; what it raises must be a refusal, in one line that is not long."""
    try:
        read()
    except refusal as error:
        assert len(str(error)) <= MAX_REFUSAL, len(str(error))
        assert "\n" not in str(error), str(error)


def object_text(pairs: dict[str, str], repeated: list[str]) -> str:
    """A JSON object of values that are texts already, with some keys a second time."""
    members = [*pairs.items(), *((key, pairs[key]) for key in repeated if key in pairs)]
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in members) + "}"


def mutated(base: dict[str, Any], *more: str) -> st.SearchStrategy[str]:
    """The text of ``base`` with some keys of it, and of ``more``, replaced, removed or repeated."""
    keys = st.sampled_from([*base, *more])
    texts = {key: json.dumps(value) for key, value in base.items()}
    return st.builds(
        lambda changes, gone, repeated: object_text(
            {key: value for key, value in {**texts, **changes}.items() if key not in gone}, repeated
        ),
        st.dictionaries(keys, TEXTS, max_size=3),
        st.lists(keys, max_size=1),
        st.lists(keys, max_size=1) | st.just([]),
    )


FOLDER = Path(".")


@cache
def checkpoint() -> Path:
    """A small model, of which each example changes one file and puts it back."""
    directory = FOLDER / "model"
    make_checkpoint(directory, overrides=SMALL)
    return directory


# -- a Hugging Face directory -----------------------------------------------------------------------------

CONFIG_KEYS = ("text_config", "layer_types", "rope_parameters", "use_bidirectional_attention")


def with_file(name: str, content: bytes, read: Callable[[Path], object]) -> None:
    path = checkpoint() / name
    before = path.read_bytes() if path.is_file() else None
    path.write_bytes(content)
    try:
        reads(lambda: read(checkpoint()))
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def engine(directory: Path) -> None:
    """All that a worker does with a directory before it starts, and the weights."""
    settings = EngineSettings("gemma3_cpu", "agg", str(directory), "m", {"gemma3_cpu": {"kv_memory_mb": 64}})
    serving.Gemma3CpuEngine(settings)
    load_model(directory)


@given(st.data())
@examples(150)
def config(data: st.DataObject) -> None:
    base = json.loads((checkpoint() / "config.json").read_text())
    text = data.draw(mutated(base, *CONFIG_KEYS))
    if data.draw(st.booleans()):
        text = object_text({"model_type": '"gemma3"', "text_config": text}, [])
    with_file("config.json", text.encode("utf-8", "surrogatepass"), engine)
    with_file("config.json", text.encode(), lambda d: load_shape(str(d), weights=True))


@given(st.data())
@examples(60)
def others(data: st.DataObject) -> None:
    """The files beside config.json that are read."""
    name = data.draw(
        st.sampled_from(["generation_config.json", "tokenizer_config.json", "chat_template.json"])
    )
    text = data.draw(mutated({"eos_token_id": [1], "chat_template": "{{ a }}"}) | TEXTS)
    with_file(name, text.encode(), engine)
    with_file(name, text.encode(), chat_obstacle)


# -- safetensors ------------------------------------------------------------------------------------------

FIELDS = {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}
TYPES = ["F32", "F16", "BF16", "I64", "I32", "U8", "F8_E4M3", "F4", "", "x" * 1_000]


def changed_tensor(draw: Any, entry: dict[str, Any]) -> str:
    changes = draw(st.lists(st.sampled_from(["dtype", "shape", "offsets", "value"]), max_size=2))
    texts = {key: json.dumps(value) for key, value in entry.items()}
    for change in changes:
        if change == "dtype":
            texts["dtype"] = json.dumps(draw(st.sampled_from(TYPES)))
        elif change == "shape":
            texts["shape"] = json.dumps(draw(st.lists(st.sampled_from(NUMBERS), max_size=10)))
        elif change == "offsets":
            texts["data_offsets"] = json.dumps(draw(st.lists(st.sampled_from(NUMBERS), max_size=3)))
        else:
            texts[draw(st.sampled_from([*FIELDS]))] = draw(TEXTS)
    return object_text(texts, [])


@given(st.data())
@examples(150)
def safetensors(data: st.DataObject) -> None:
    raw = (checkpoint() / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    texts = {name: json.dumps(entry) for name, entry in header.items()}
    for name in data.draw(st.lists(st.sampled_from([*texts]), max_size=2, unique=True)):
        whole = name == "__metadata__" or data.draw(st.booleans())
        texts[name] = data.draw(TEXTS) if whole else changed_tensor(data.draw, header[name])
    for name in data.draw(
        st.lists(st.sampled_from(["lm_head.weight", "vision_tower.a", "model.x", "é"]), max_size=1)
    ):
        texts[name] = changed_tensor(data.draw, FIELDS)
    text = object_text(texts, data.draw(st.lists(st.sampled_from([*texts]), max_size=1))).encode()
    length = data.draw(st.just(len(text)) | st.sampled_from([n for n in NUMBERS if 0 <= n < 2**64]))
    body = raw[8 + size :]
    body = body[: data.draw(st.just(len(body)) | st.integers(0, len(body)))]
    with_file("model.safetensors", length.to_bytes(8, "little") + text + body, engine)


@given(mutated({"metadata": {}, "weight_map": {"a": "model.safetensors"}}) | TEXTS)
@examples(40)
def shards(text: str) -> None:
    """With no file of one shard beside it."""
    whole = checkpoint() / "model.safetensors"
    aside = whole.rename(whole.with_suffix(".aside"))
    try:
        with_file("model.safetensors.index.json", text.encode("utf-8", "surrogatepass"), engine)
    finally:
        aside.rename(whole)


# -- GGUF -------------------------------------------------------------------------------------------------


@cache
def gguf_parts() -> tuple[list[tuple[str, int, bytes]], list[tuple[str, tuple[int, ...], int, int]], bytes]:
    """Of a file that llama.cpp's own writer made: values as bytes, tensors, and data."""
    from gguf import GGUFReader

    path = write_gguf(FOLDER / "whole.gguf", checkpoint(), skip=None)
    reader = GGUFReader(path)
    values = []
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            # Parts are the key's length, the key, the type, and what the value consists of.
            values.append((name, int(field.types[0]), b"".join(part.tobytes() for part in field.parts[3:])))
    start = reader.data_offset
    tensors = [
        (t.name, tuple(int(n) for n in t.shape), int(t.tensor_type), t.data_offset - start)
        for t in reader.tensors
    ]
    return values, tensors, path.read_bytes()[start:]


def text_of(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def numbers() -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in NUMBERS if 0 <= n < 2**64])


VALUES: st.SearchStrategy[tuple[int, bytes]] = st.one_of(
    numbers().map(lambda n: (10, struct.pack("<Q", n))),
    numbers().map(lambda n: (4, struct.pack("<I", n & 0xFFFFFFFF))),
    st.sampled_from([float("nan"), float("inf"), -1.0, 0.5, 1e38]).map(lambda x: (6, struct.pack("<f", x))),
    st.booleans().map(lambda b: (7, struct.pack("?", b))),
    st.sampled_from(["", "llama", "gemma3", "x" * 5_000, "linear"]).map(lambda s: (8, text_of(s))),
    st.tuples(st.sampled_from([0, 4, 6, 7, 8, 9, 99]), numbers()).map(
        lambda each: (9, struct.pack("<IQ", *each) + bytes(64))
    ),
    st.lists(st.sampled_from(["a", "b", "<bos>", "y" * 300]), max_size=5).map(
        lambda texts: (9, struct.pack("<IQ", 8, len(texts)) + b"".join(map(text_of, texts)))
    ),
    st.integers(11, 300).map(lambda kind: (kind, bytes(8))),
)


@given(st.data())
@examples(150)
def gguf(data: st.DataObject) -> None:
    values, tensors, body = gguf_parts()
    keys = [name for name, _, _ in values]
    changes = data.draw(
        st.dictionaries(
            st.sampled_from([*keys, "general.alignment", "split.count", *ROPE]), VALUES, max_size=2
        )
    )
    pairs = {name: (kind, raw) for name, kind, raw in values} | changes
    for gone in data.draw(st.lists(st.sampled_from(keys), max_size=1)):
        pairs.pop(gone, None)
    entries = [*pairs.items()]
    entries += [
        (key, pairs[key]) for key in data.draw(st.lists(st.sampled_from(keys), max_size=1)) if key in pairs
    ]
    out = b"".join(text_of(name) + struct.pack("<I", kind) + raw for name, (kind, raw) in entries)
    changed = data.draw(st.lists(st.integers(0, len(tensors) - 1), max_size=2))
    for number, (name, shape, kind, offset) in enumerate(tensors):
        if number in changed:
            shape = tuple(data.draw(st.just(list(shape)) | st.lists(numbers(), max_size=6)))
            kind = data.draw(st.just(kind) | st.integers(0, 60))
            offset = data.draw(st.just(offset) | numbers())
        out += text_of(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        out += struct.pack("<IQ", kind, offset)
    counts = [data.draw(st.just(true) | numbers()) for true in (len(tensors), len(entries))]
    head = b"GGUF" + struct.pack("<IQQ", data.draw(st.just(3) | st.integers(0, 5)), *counts) + out
    body = body[: data.draw(st.just(len(body)) | st.integers(0, len(body)))]
    path = FOLDER / "m.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    reads(lambda: find_model(path))
    reads(lambda: import_gguf(path, FOLDER / "imported", overwrite=True))


ROPE = ("gemma3.rope.freq_base", "gemma3.rope.scaling.type", "gemma3.rope.scaling.factor")


# -- traces and workloads ---------------------------------------------------------------------------------

HEADERS = {
    "trtllm": {"type": "header", "format": "trtllm", "tokens_per_block": 32, "groups": [{"kind": "full"}]},
    "vllm": {"type": "header", "format": "vllm", "block_size": 16, "groups": [{"kind": "full"}]},
}
GROUPS = st.sampled_from(
    [*NUMBERS, -5, 0.5, None, "swa"],
).map(lambda n: json.dumps([{"kind": "swa", "window": 32, "count": n}, {"kind": "full", "window": n}]))
REQUEST = {"type": "request", "token_ids": [1] * 64, "cached_tokens": 32, "output_len": 4, "id": 1}
RESULT = {"type": "result", "id": 1, "cached_tokens": 0, "seen": 1}
HOLE = {"type": "hole", "events": 1, "requests": 0}


@cache
def recorded() -> list[dict[str, Any]]:
    lines = (DATA / "trtllm-events-v2.jsonl").read_text().splitlines()[:20]
    return [json.loads(line) for line in lines]


@given(st.data())
@examples(200)
def traces(data: st.DataObject) -> None:
    header = HEADERS[data.draw(st.sampled_from([*HEADERS]))]
    text = data.draw(st.just(json.dumps(header)) | mutated(header, "rule", "layers", "max_attention_window"))
    if data.draw(st.booleans()):
        texts = {key: json.dumps(value) for key, value in header.items()}
        text = object_text({**texts, "groups": data.draw(GROUPS)}, [])
    lines = [text]
    for kind in data.draw(st.lists(st.sampled_from(["event", "request", "result", "hole"]), max_size=6)):
        if kind == "event":
            base = data.draw(st.sampled_from(recorded()))
            inner = dict(base.get("event", base))
            event = data.draw(mutated(inner) | TEXTS)
            lines.append(object_text({"type": '"event"', "event": event}, []))
        else:
            lines.append(data.draw(mutated({"request": REQUEST, "result": RESULT, "hole": HOLE}[kind])))
    path = FOLDER / "t.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    reads(lambda: replayed(path))


@given(mutated({"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1, 2]}) | TEXTS)
@examples(60)
def workloads(text: str) -> None:
    path = FOLDER / "w.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    reads(lambda: list(mooncake(path)))


# -- registry ---------------------------------------------------------------------------------------------


@given(mutated(msgspec.json.decode(encode_entry(entry(0)))) | TEXTS)
@examples(200)
def entries(text: str) -> None:
    payload, key = text.encode("utf-8", "surrogatepass"), entry(0).key
    reads(lambda: decode_entry(key, payload), ProtocolError)
    RegistryState(lambda _: None).put(key, payload)


def whole() -> None:
    """What the properties begin with is read in the same memory; else a refusal would mean nothing."""
    engine(checkpoint())
    load_shape(str(checkpoint()), weights=True)
    assert chat_obstacle(checkpoint()) is None
    find_model(FOLDER / "whole.gguf" if gguf_parts() else FOLDER)
    import_gguf(FOLDER / "whole.gguf", FOLDER / "imported")
    for name, header in HEADERS.items():
        path = FOLDER / f"{name}.jsonl"
        path.write_text(f"{json.dumps(header)}\n{json.dumps(REQUEST)}\n")
        assert 1 == replayed(path).requests
    decode_entry(entry(0).key, encode_entry(entry(0)))


READERS = (whole, config, others, safetensors, shards, gguf, traces, workloads, entries)


def limit_memory() -> None:
    begun_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = begun_with + READER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(reader: str, folder: str) -> None:
    global FOLDER
    FOLDER = Path(folder)
    logging.disable(logging.CRITICAL)
    np.seterr(all="raise")  # a number that overflows is a fault here, not a warning
    limit_memory()
    next(each for each in READERS if each.__name__ == reader)()


if __name__ == "__main__":
    main(*sys.argv[1:])
