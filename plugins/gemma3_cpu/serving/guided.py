"""Answers that keep to a format: a JSON schema, a regular expression, a choice or a grammar.

The package llguidance (extra ``guided``) says which tokens may come next; the model chooses among these.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import Fields
from vswa_plugin.errors import InvalidRequest, RequestError

#: Kinds of ``sampling_options.guided_decoding``. ``response_format`` and a ``tool_choice`` that demands a
#: tool come as ``json``.
KINDS = ("json", "regex", "choice", "grammar")
#: Bytes of a schema or grammar. The tools of a large agent have some 100 KB.
MAX_BYTES = 1 << 20
#: Blanks wherever JSON allows them would let an answer consist of them; these are those of json.dumps.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer is to keep to.

    :param kind: one of :data:`KINDS`.
    :param text: the schema as JSON, the expression, the choices as a JSON list, or the grammar.
    :param shown: what the client calls the field.
    """

    kind: str
    text: str
    shown: str


def parse_format(given: Fields) -> Format | None:
    """Read ``sampling_options.guided_decoding``; None: free text.

    :raises InvalidRequest: several of them, or none that could be a format.
    """
    wanted = [kind for kind in KINDS if given.data.get(kind) not in (None, False, [])]
    if len(wanted) > 1:
        names = [given.shown(kind) for kind in wanted]
        raise InvalidRequest(f"{' and '.join(names)}: expected one format of the answer, got {len(names)}")
    if not wanted:
        return None
    (kind,) = wanted
    value = given.data[kind]
    text = value if isinstance(value, str) and kind != "choice" else json.dumps(value)
    right = isinstance(value, str)
    if kind == "json":
        right = isinstance(value, (str, dict))
    elif kind == "choice":
        right = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    if not right:
        expected = {"json": "a JSON schema", "choice": "a list of texts"}.get(kind, "a text")
        raise given.error(kind, expected, type(value).__name__)
    if len(text) > MAX_BYTES:
        raise given.error(kind, f"at most {MAX_BYTES} characters", str(len(text)))
    return Format(kind, text, given.shown(kind))


class Guide:
    """The way of one answer through its format. One thread at a time.

    :param matcher: llguidance's, at the beginning of the answer.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Of each token whether it may come next; end-of-sequence where the answer may end.

        :raises RequestError: the format is too complex for what came so far.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed: npt.NDArray[np.bool_] = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(
            bool
        )
        if not allowed.any():
            raise RequestError("expected a token that the format of the answer allows, got none")
        return allowed

    def take(self, token: int) -> None:
        """The answer goes on with ``token``.

        :raises RequestError: it may not, which is a fault of the engine or of another worker's first token.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"the format of the answer cannot be kept: {_short(self._matcher.get_error())}"
            )


class Grammars:
    """Makes guides for one model. From any thread.

    :param tokenizer: the model's tokenizer.json, read when the first format comes.
    :param eos_ids: tokens that may end an answer where its format allows that.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def guide(self, wanted: Format) -> Guide:
        """A new guide; may take a second.

        :raises InvalidRequest: the package is not installed, or there is no such format.
        """
        package: Any
        try:
            import llguidance as package
        except ImportError as error:
            raise InvalidRequest(
                f"{wanted.shown}: expected none, because this worker lacks the package llguidance; install "
                "'vswa-plugin[guided]' there"
            ) from error
        if wanted.kind == "json":
            make = package.LLMatcher.grammar_from_json_schema
            grammar = _made(wanted, lambda: make(wanted.text, defaults=_JSON_OPTIONS))
        else:
            grammar = _made(wanted, lambda: package.grammar_from(wanted.kind, wanted.text))
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._loaded(package)
        matcher = package.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(wanted, matcher.get_error())
        return Guide(matcher, self._vocab_size)

    def _loaded(self, package: Any) -> Any:
        try:
            text = self._path.read_text("utf-8")
            return package.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)
        except Exception as error:  # the package raises plain exceptions
            raise RequestError(f"{self._path}: expected a tokenizer, got: {_short(str(error))}") from error


def _made(wanted: Format, make: Any) -> str:
    try:
        return str(make())
    except Exception as error:  # of the package, whatever it is: the text is the client's
        raise _refused(wanted, str(error)) from error


def _refused(wanted: Format, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{wanted.shown}: expected a format that can be kept, got: {_short(reason)}")


def _short(text: str) -> str:
    """One line, of bounded length."""
    return " ".join(text.split())[:300]
