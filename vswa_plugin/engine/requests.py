"""Reading the fields of a Dynamo ``PreprocessedRequest``: typed, every refusal with the field's name. Pure.

    fields = Fields(request)
    prompt = token_ids(fields)
    max_tokens = fields.object("stop_conditions").integer("max_tokens", None, low=1)

A field that is missing or null means its default. All raise :class:`InvalidRequest` where a value cannot be
used: it names the field as the client sent it, what was expected, and what came. Token ids never stand in it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vswa_plugin.engine.options import is_integer
from vswa_plugin.errors import InvalidRequest

_Integer = TypeVar("_Integer", int, None)

#: Sections whose fields a client sends at the top of its request, and what else is called otherwise there.
_SECTIONS = ("stop_conditions.", "sampling_options.", "output_options.", "extra_args.sampling_options.")
_CLIENT_NAMES = {
    "output_options.prompt_logprobs": "prompt_logprobs (or echo)",
    "sampling_options.guided_decoding.json": "response_format, tool_choice or guided_json",
    "sampling_options.guided_decoding.regex": "guided_regex",
    "sampling_options.guided_decoding.choice": "guided_choice",
    "sampling_options.guided_decoding.grammar": "guided_grammar",
    "sampling_options.guided_decoding.structural_tag": "tools or tool_choice",
    "sampling_options.guided_decoding.backend": "guided_decoding_backend",
    "sampling_options.guided_decoding.whitespace_pattern": "guided_whitespace_pattern",
    "stop_conditions.max_thinking_tokens": "thinking_token_budget (or nvext.max_thinking_tokens)",
    "multi_modal_data": "messages (multi_modal_data)",
    "routing.cache_salt": "cache_salt",
    "routing.dp_rank": "nvext.dp_rank",
    "extra_args.nvext.metadata_upload": "nvext.metadata_upload",
}


#: Options that say that sampling is meant.
_SAMPLES = ("top_p", "top_k", "min_p", "seed")


def client_name(path: str) -> str:
    """What a client calls the field that has come as ``path``; the path itself where no client sends it."""
    if path in _CLIENT_NAMES:
        return _CLIENT_NAMES[path]
    return next((path.removeprefix(each) for each in _SECTIONS if path.startswith(each)), path)


class Fields:
    """One object of a request with the words for its refusals.

    :param data: as it came; None where there is none.
    :param path: dotted path of the object; empty for the request itself.
    :raises InvalidRequest: it is no object.
    """

    def __init__(self, data: object, path: str = "") -> None:
        if data is not None and not isinstance(data, Mapping):
            raise InvalidRequest(f"{path or 'request'}: expected an object, got {type(data).__name__}")
        self.data: Mapping[str, Any] = {} if data is None else data
        self.path = path

    def name(self, key: str) -> str:
        """Dotted path of ``key``."""
        return f"{self.path}.{key}" if self.path else key

    def shown(self, key: str) -> str:
        """``key`` as the client calls it, for messages."""
        return client_name(self.name(key))

    def error(self, key: str, expected: str, actual: str = "") -> InvalidRequest:
        """What is wrong with the value of ``key``, to be raised."""
        tail = f", got {actual}" if actual else ""
        return InvalidRequest(f"{self.shown(key)}: expected {expected}{tail}")

    def object(self, key: str) -> Fields:
        """The object that is the value of ``key``."""
        return Fields(self.data.get(key), self.name(key))

    def text(self, key: str) -> str | None:
        """A string; None where it is missing or empty."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string", type(value).__name__)
        return value or None

    def integer(self, key: str, default: _Integer, *, low: int) -> int | _Integer:
        """An integer of at least ``low``."""
        value = self.data.get(key)
        if value is None:
            return default
        if not is_integer(value) or value < low:
            raise self.error(key, f"an integer of at least {low}", repr(value))
        return int(value)

    def ids(self, key: str) -> list[int]:
        """A list of token ids, e.g. those to stop at; empty where it is missing."""
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise self.error(key, "a list of token ids", type(value).__name__)
        if not all(map(is_integer, value)):
            raise self.error(key, "a list of token ids", "something else among them")
        return list(value)


def unchecked_token_ids(request: Fields) -> Sequence[int]:
    """The prompt as it came, unpacked, for callers that do not check its elements; may be empty."""
    value = request.data.get("token_ids")
    if isinstance(value, (bytes, bytearray)):
        # Dynamo may pack token ids as little-endian 32-bit integers.
        if len(value) % 4:
            raise request.error("token_ids", "4 bytes per token", f"{len(value)} bytes")
        words = array("I", bytes(value))
        if sys.byteorder == "big":
            words.byteswap()
        return words
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise request.error("token_ids", "a list of integers", type(value).__name__)
    return value


def temperature(sampling_options: Mapping[str, Any]) -> object:
    """The temperature as it was meant, unchecked; None: greedy.

    Where none is given, another option of sampling says that sampling is meant, at OpenAI's default of 1.
    """
    given = sampling_options.get("temperature")
    if given is None and any(sampling_options.get(name) is not None for name in _SAMPLES):
        return 1.0
    return given


def reads_cache(request: Fields) -> bool:
    """Whether an engine may reuse blocks for this request.

    Log probabilities of the prompt need all of it computed, and a client may switch the cache off.
    """
    if request.object("output_options").data.get("prompt_logprobs") is not None:
        return False
    extra = request.object("extra_args")
    sections = (extra.object("sampling_options"), extra, request.object("sampling_options"))
    return not any(section.data.get("skip_reading_prefix_cache") for section in sections)


def token_ids(request: Fields, context_length: int) -> list[int]:
    """The prompt: at least one token, and room for one of the answer.

    :param context_length: prompt and answer together, in tokens.
    """
    tokens = unchecked_token_ids(request)
    if not tokens:
        raise request.error("token_ids", "at least one token id", "none")
    if set(map(type, tokens)) != {int}:
        raise request.error("token_ids", "a list of integers", "something else")
    if len(tokens) >= context_length:
        raise InvalidRequest(
            f"prompt of {len(tokens)} tokens: expected at most {context_length - 1}, so that one token of "
            f"the answer fits the context of {context_length} tokens; shorten the prompt"
        )
    return list(tokens)


def outside(tokens: Sequence[int], vocab_size: int | None) -> str:
    """The lowest and the highest of ``tokens`` in words where one is not in [0, vocab_size), else "".

    :param vocab_size: None where it is not known: 32 bits.
    """
    low, high = min(tokens), max(tokens)
    return f"{low} to {high}" if low < 0 or high >= (vocab_size or 1 << 32) else ""


def dp_rank(routing: Fields, ranks: int, advice: str) -> int | None:
    """The rank that is to serve the request; None: any.

    :param ranks: of this worker.
    :param advice: says where their number comes from.
    """
    rank = routing.data.get("dp_rank")
    if rank is None:
        return None
    if not is_integer(rank) or not 0 <= rank < ranks:
        raise routing.error("dp_rank", f"a rank in [0, {ranks - 1}]", f"{rank!r}; {advice}")
    return int(rank)


def prefill_result(request: Fields, mode: str) -> Fields:
    """What a prefill worker has handed over with the request; empty where there was none.

    :param mode: of this worker, one of ``vswa_plugin.engine.MODES``.
    """
    result = request.object("prefill_result")
    if result.data and mode != "decode":
        raise request.error(
            "prefill_result",
            f"none in mode {mode}; only a worker with --mode decode goes on where a prefill worker ended",
        )
    return result
