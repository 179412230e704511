"""GGUF files imported: values and tokenizer are those of the model that they were made from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vswa_plugins.gemma3_cpu.model.config import load_config
from vswa_plugins.gemma3_cpu.weights.checkpoint import CHAT_TEMPLATE
from vswa_plugins.gemma3_cpu.weights.gguf_file import GgufFile
from vswa_plugins.gemma3_cpu.weights.gguf_import import import_gguf, read_config
from vswa_plugins.gemma3_cpu.weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    tokenizer_json,
)

from tests.gemma3_gguf_helpers import cache as cache
from tests.gemma3_gguf_helpers import checkpoint as checkpoint
from tests.gemma3_gguf_helpers import gguf_file as gguf_file
from tests.gemma3_gguf_helpers import logits, needs_gguf, write_gguf
from tests.properties import examples

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
    from vswa_plugins.gemma3_cpu.weights.gguf_import import _narrow

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


@examples(300)
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
