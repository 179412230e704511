"""Prompts that are given as text: the tokenizers of served models, read where this process runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from vswa_plugin.errors import ConfigError, InvalidRequest

TOKENIZER = "tokenizer.json"
#: How many tokenizers are kept: one of a large vocabulary takes some 100 MB.
KEPT = 4

Encode = Callable[[str], list[int]]


def load_tokenizer(model_path: str) -> Encode:
    """From a text to its tokens, as ``/v1/completions`` makes them: no ``<bos>``, no chat template.

    :param model_path: of the model's directory, as its workers registered it.
    :raises ConfigError: it cannot be read here, or the package is missing; the message names no remedy.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(
            "expected the package tokenizers for a prompt in words, which is not installed"
        ) from error
    path = Path(model_path) / TOKENIZER
    if not path.is_file():
        raise ConfigError(f"expected the model's tokenizer at {path}, got nothing there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise ConfigError(f"{path}: expected a tokenizer, got: {str(error)[:200]}") from error

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


class Tokenizers:
    """The tokenizers of a router, each read when it is needed first. Event loop only."""

    def __init__(self, load: Callable[[str], Encode] = load_tokenizer) -> None:
        self._load = load
        self._kept: dict[str, Encode] = {}

    async def tokens(self, model_path: str, text: str) -> list[int]:
        """The tokens of ``text``; the event loop goes on meanwhile.

        :raises InvalidRequest: the router cannot read the tokenizer, or the text has no tokens.
        """
        try:
            ids = await asyncio.to_thread(self._encode, model_path, text)
        except ConfigError as error:
            raise InvalidRequest(f"prompt: {error}; give token_ids") from error
        if not ids:
            raise InvalidRequest(f"prompt: expected at least one token, got none from {len(text)} characters")
        return ids

    def _encode(self, model_path: str, text: str) -> list[int]:
        """In a thread: two that need the same one at once may both read it, and one is kept."""
        encode = self._kept.get(model_path)
        if encode is None:
            encode = self._load(model_path)
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[model_path] = encode
        return encode(text)
