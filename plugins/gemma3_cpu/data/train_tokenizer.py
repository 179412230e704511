"""Train ``tokenizer.json.gz`` of the small random checkpoints: ``python train_tokenizer.py``.

Needs the package ``tokenizers``.

Text: documentation strings of Python's standard library and the language topics of ``pydoc``, so that the
file can be made again on any machine. Only word pieces and their merges end up in it. The format is Gemma's:
BPE over text whose spaces are written as U+2581, with a token for each byte to fall back on.
"""

from __future__ import annotations

import ast
import gzip
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"


def standard_library_text() -> Iterator[str]:
    """Docstrings of every module, and pydoc's topics."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def train(texts: Iterator[str]) -> dict[str, Any]:
    """The parsed tokenizer.json."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPACE, "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    tokenizer.add_special_tokens(list(SPECIAL))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(BYTES),
        special_tokens=list(SPECIAL),
        limit_alphabet=160,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_byte_tokens(json.loads(tokenizer.to_str()))


def _with_byte_tokens(raw: dict[str, Any]) -> dict[str, Any]:
    """Give the bytes the ids after the special tokens; the trainer cannot place them there itself."""
    model = raw["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)[len(SPECIAL) :]
    model["vocab"] = {piece: token_id for token_id, piece in enumerate((*SPECIAL, *BYTES, *pieces))}
    return raw


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("tokenizer.json.gz")
    text = json.dumps(train(standard_library_text()), ensure_ascii=False, separators=(",", ":"))
    # No time stamp in the archive: the same input gives the same file.
    target.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
