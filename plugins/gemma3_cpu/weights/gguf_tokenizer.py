"""A Hugging Face ``tokenizer.json`` from the pieces and scores of a SentencePiece BPE in a GGUF file.

SentencePiece joins, again and again, the two neighbours whose joined piece has the best score, leftmost
first. A ``tokenizer.json`` ranks pairs instead. So every way to cut a piece into two pieces becomes a pair,
ranked by the score of the piece. Different from SentencePiece only where one piece can be made of different
pairs at overlapping places, as in a long run of one letter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vswa_plugin.errors import ConfigError, shown

from .checkpoint import CHAT_TEMPLATE

SPACE = "▁"
#: Kinds of pieces in ``tokenizer.ggml.token_type``.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PREFIX = "tokenizer.ggml."
#: Special tokens by role: the key that may name the id, and the piece that has it otherwise.
_ROLES = {
    "bos_token": ("bos_token_id", "<bos>"),
    "eos_token": ("eos_token_id", "<eos>"),
    "pad_token": ("padding_token_id", "<pad>"),
    "unk_token": ("unknown_token_id", "<unk>"),
}
END_OF_TURN = "<end_of_turn>"
#: Characters of a piece, as all ways to cut one are tried; by default SentencePiece makes none above 16.
_MAX_PIECE = 256


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces by id, with score and kind each.

    :param special: role (``bos_token`` ...) -> id, for the roles that the file knows.
    :param add_bos: whether an encoded text begins with bos where special tokens are asked for.
    :param chat_template: the file's own, or Gemma's.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    special: Mapping[str, int]
    add_bos: bool = True
    chat_template: str = CHAT_TEMPLATE

    @property
    def end_ids(self) -> list[int]:
        """Ids that end an answer: end of text, end of turn."""
        ids = [self.special["eos_token"]] if "eos_token" in self.special else []
        turn = [i for i, piece in enumerate(self.pieces) if piece == END_OF_TURN]
        return list(dict.fromkeys([*ids, *turn]))


def read_vocabulary(metadata: Mapping[str, Any], where: str | Path) -> Vocabulary:
    """The vocabulary in a GGUF file's metadata; ``where`` is its path, for messages.

    :raises ConfigError: not a SentencePiece vocabulary with scores, or a damaged one.
    """
    model = metadata.get(f"{_PREFIX}model")
    if model != "llama":
        raise ConfigError(
            f"{where}: {_PREFIX}model: expected 'llama' (a SentencePiece vocabulary, as Gemma 3 has it), "
            f"got {model!r}"
        )
    pieces = metadata.get(f"{_PREFIX}tokens")
    scores, kinds = metadata.get(f"{_PREFIX}scores"), metadata.get(f"{_PREFIX}token_type")
    if pieces is None or scores is None or kinds is None:
        raise ConfigError(f"{where}: expected {_PREFIX}tokens, scores and token_type, got no complete set")
    if not isinstance(pieces, list) or not _is_array(scores, "fiu") or not _is_array(kinds, "iu"):
        raise ConfigError(
            f"{where}: expected {_PREFIX}tokens as texts, scores as numbers and token_type as whole numbers, "
            f"got {type(pieces).__name__}, {type(scores).__name__} and {type(kinds).__name__}"
        )
    if not len(pieces) == len(scores) == len(kinds):
        raise ConfigError(
            f"{where}: expected a score and a type for each of {len(pieces)} tokens, "
            f"got {len(scores)} scores and {len(kinds)} types"
        )
    if not np.isfinite(scores).all():
        raise ConfigError(f"{where}: {_PREFIX}scores: expected finite numbers, got another one")
    if (longest := max(map(len, pieces), default=0)) > _MAX_PIECE:
        raise ConfigError(
            f"{where}: {_PREFIX}tokens: expected at most {_MAX_PIECE} characters each, got {longest}"
        )
    kinds = kinds.tolist()
    # Some files spell the spaces of user-defined pieces as spaces; text meets them after normalization.
    pieces = [p.replace(" ", SPACE) if k == USER_DEFINED else p for p, k in zip(pieces, kinds, strict=True)]
    if len(set(pieces)) != len(pieces):
        raise ConfigError(f"{where}: expected {len(pieces)} different tokens, got {len(set(pieces))}")
    return Vocabulary(
        pieces,
        scores.tolist(),
        kinds,
        _special_ids(metadata, pieces, where),
        bool(metadata.get(f"{_PREFIX}add_bos_token", True)),
        _chat_template(metadata, where),
    )


def _is_array(value: object, kinds: str) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in kinds


def _chat_template(metadata: Mapping[str, Any], where: str | Path) -> str:
    template = metadata.get("tokenizer.chat_template") or CHAT_TEMPLATE
    if not isinstance(template, str):
        raise ConfigError(f"{where}: tokenizer.chat_template: expected a text, got {type(template).__name__}")
    return template


def derive_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair of normal pieces that makes a normal piece: best score first, then the lower id.

    Of several pairs for one piece the one with the longer left part comes first.
    """
    pieces, scores, kinds = vocabulary.pieces, vocabulary.scores, vocabulary.kinds
    # The other kinds never come out of a merge: SentencePiece keeps them apart from text.
    normal = [i for i, kind in enumerate(kinds) if kind == NORMAL]
    normal_pieces = {pieces[i] for i in normal}
    normal.sort(key=lambda i: (-scores[i], i))
    return [
        (piece[:cut], piece[cut:])
        for piece in (pieces[i] for i in normal)
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in normal_pieces and piece[cut:] in normal_pieces
    ]


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The content of ``tokenizer.json``."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": replace,
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _role_pieces(vocabulary).get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(vocabulary.pieces)},
            "merges": derive_merges(vocabulary),
        },
    }


def tokenizer_config(vocabulary: Vocabulary, context_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``, with the chat template."""
    decoder = {
        str(token["id"]): {key: token[key] for key in token if key != "id"}
        for token in _added_tokens(vocabulary)
    }
    return {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_role_pieces(vocabulary),
    }


def _special_ids(metadata: Mapping[str, Any], pieces: Sequence[str], where: str | Path) -> dict[str, int]:
    ids: dict[str, int] = {}
    by_piece = {piece: i for i, piece in enumerate(pieces)}
    for role, (key, piece) in _ROLES.items():
        number = metadata.get(f"{_PREFIX}{key}", by_piece.get(piece))
        if number is None:
            continue
        if not isinstance(number, int) or not 0 <= number < len(pieces):
            raise ConfigError(
                f"{where}: {_PREFIX}{key}: expected an id below {len(pieces)}, got {shown(number)}"
            )
        ids[role] = int(number)
    return ids


def _role_pieces(vocabulary: Vocabulary) -> dict[str, str]:
    return {role: vocabulary.pieces[i] for role, i in vocabulary.special.items()}


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Control pieces, found in raw text; user-defined ones, found where spaces are already marked."""
    special = set(vocabulary.special.values())
    return [
        {
            "id": i,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind == USER_DEFINED and i not in special,
            "special": kind != USER_DEFINED or i in special,
        }
        for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) or i in special
    ]


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    if not vocabulary.add_bos or "bos_token" not in vocabulary.special:
        return None
    i = vocabulary.special["bos_token"]
    piece = vocabulary.pieces[i]

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": piece, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {piece: {"id": piece, "ids": [i], "tokens": [piece]}},
    }
