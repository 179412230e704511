"""What becomes of each field of a request: it is used, refused, or ignored for a reason. Pure.

A worker gets Dynamo's ``PreprocessedRequest``. An engine names every field of it in one table: what it uses,
what it refuses, and what it may ignore because that concerns the frontend, a router, or nobody here::

    FIELDS = FieldUses({
        **SHARED,
        "sampling_options.n": refused("1: send the request several times", 1),
    })
    FIELDS.check(request)  # raises InvalidRequest, with the name by which the client sent the field

A field that no table names is refused where it says how to generate (:data:`WISHES`), and is logged once
elsewhere: a newer frontend may add fields of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from vswa_plugin.engine.contract import RequestDict
from vswa_plugin.engine.requests import Fields, client_name
from vswa_plugin.errors import InvalidRequest

logger = logging.getLogger(__name__)

#: The sections in which a client says how to generate.
WISHES = ("stop_conditions", "sampling_options", "output_options", "extra_args.sampling_options")
#: How many unknown fields are logged, each once.
MAX_LOGGED = 100


class FieldUse(msgspec.Struct, frozen=True):
    """What an engine does with one field.

    :param text: what it is used for, what is expected instead, or why nothing is lost by ignoring it.
    :param accepted: values of a refused field that mean the same as its absence.
    """

    use: Literal["used", "refused", "ignored"]
    text: str
    accepted: tuple[Any, ...] = ()


def used(text: str) -> FieldUse:
    """The engine acts on it: ``text`` says how."""
    return FieldUse("used", text)


def refused(instead: str, *accepted: Any) -> FieldUse:
    """The request is refused, except with the values ``accepted``: ``instead`` follows "expected"."""
    return FieldUse("refused", instead, accepted)


def ignored(reason: str) -> FieldUse:
    """It has no effect in this engine, for ``reason``."""
    return FieldUse("ignored", reason)


class FieldUses:
    """The table of one engine.

    :param uses: by dotted path. A path stands for all that is below it.
    """

    def __init__(self, uses: Mapping[str, FieldUse]) -> None:
        self.uses = uses
        #: Objects of which the table names the parts.
        self._inner = {path[:at] for path in uses for at, each in enumerate(path) if each == "."} - set(uses)
        self._logged: set[str] = set()

    def check(self, request: RequestDict) -> None:
        """Refuse what is not served.

        :raises InvalidRequest: names the field as the client sent it, and what was expected instead.
        """
        for path, value in self._given(Fields(request).data, ""):
            use = self.uses.get(path)
            if use is None:
                self._unknown(path, value)
            elif use.use == "refused" and not _among(value, use.accepted):
                raise InvalidRequest(f"{client_name(path)}: expected {use.text}{_shown(value)}")

    def _given(self, data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in data.items():
            path = f"{prefix}{key}"
            if path in self._inner:
                yield from self._given(Fields(value, path).data, f"{path}.")
            elif value is not None:
                yield path, value

    def _unknown(self, path: str, value: object) -> None:
        if not value:
            return
        if path.startswith(tuple(f"{section}." for section in WISHES)):
            raise InvalidRequest(f"{client_name(path)}: expected no such field; this worker does not know it")
        if path not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(path)
            logger.warning("requests have the field %s, which this worker does not know and ignores", path)


def _among(value: object, accepted: tuple[Any, ...]) -> bool:
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted)


def _shown(value: object) -> str:
    """Numbers only: other values may be long, or hold token ids."""
    return f", got {value!r}" if isinstance(value, (int, float)) else ""


_ROUTERS = ignored("for routers, which have chosen this worker by it")
_NO_QUEUE = ignored("a hint for queues; requests are admitted in the order in which they come")
_FRONTEND = ignored("the frontend does it with the tokens that it gets")
_TEMPLATE = ignored("what the prompt was made from; comes with images, which are refused")
_IMAGES = "no images, audio or video: this worker serves text"

#: What most engines make of the fields that they do not use; an engine's own table goes before it.
SHARED: Mapping[str, FieldUse] = {
    "model": ignored("the frontend and the router have chosen this worker by it"),
    "prompt_embeds": refused("no prompt embeddings: send text or token ids"),
    "multi_modal_data": refused(_IMAGES, {}, []),
    "multi_modal_uuids": refused(_IMAGES, {}, []),
    "mm_routing_info": ignored("for routers; the images themselves are refused"),
    "mm_processor_kwargs": refused(_IMAGES, {}, []),
    "media_io_kwargs": refused(_IMAGES, {}, []),
    "image_cache_scope": ignored("the scope of images that a frontend has cached"),
    "encoder_result": refused("none: no worker here encodes images"),
    "stop_conditions.stop": _FRONTEND,
    "stop_conditions.max_thinking_tokens": refused("none: this worker has no budget for reasoning"),
    "sampling_options.n": refused("1: a worker gives one answer per request; send it several times", 1),
    "sampling_options.best_of": refused("1: a worker gives one answer per request; send it several times", 1),
    "sampling_options.use_beam_search": refused("false: this worker has no beam search", False),
    "sampling_options.length_penalty": refused("1: it is for beams, and this worker has no beam search", 1),
    "sampling_options.include_stop_str_in_output": _FRONTEND,
    **{
        f"sampling_options.guided_decoding.{kind}": refused("none: this worker has no guided decoding")
        for kind in ("json", "regex", "choice", "grammar", "structural_tag", "backend", "whitespace_pattern")
    },
    "output_options.prompt_logprobs": refused("none: this worker gives log probabilities of the answer only"),
    "output_options.skip_special_tokens": _FRONTEND,
    "output_options.no_stop_trim": _FRONTEND,
    "output_options.formatted_prompt": _FRONTEND,
    "output_options.return_tokens_as_token_ids": _FRONTEND,
    "extra_args.sampling_options.detokenize": refused("true: the frontend makes text in any case", True),
    "extra_args.sampling_options.allowed_token_ids": refused("none: all tokens of the model may be drawn"),
    "extra_args.sampling_options.bad_words_token_ids": refused("none: all tokens of the model may be drawn"),
    "extra_args.sampling_options.logprob_token_ids": refused("none: the likeliest tokens are reported"),
    "extra_args.nvext.token_in": ignored("says that the client sent token ids"),
    "extra_args.nvext.extra_fields": ignored("the frontend adds them to the answer"),
    "extra_args.nvext.cache_salt": ignored("equals routing.cache_salt"),
    "extra_args.nvext.metadata_upload": refused("none: this worker uploads nothing"),
    "extra_args.messages": _TEMPLATE,
    "extra_args.formatted_prompt": _TEMPLATE,
    "routing.backend_instance_id": _ROUTERS,
    "routing.prefill_worker_id": _ROUTERS,
    "routing.prefill_dp_rank": _ROUTERS,
    "routing.decode_worker_id": _ROUTERS,
    "routing.allowed_worker_ids": _ROUTERS,
    "routing.routing_constraints": _ROUTERS,
    "routing.lora_name": refused("none: this worker serves no LoRA adapters"),
    "routing.expected_output_tokens": _NO_QUEUE,
    "routing.priority": _NO_QUEUE,
    "routing.priority_jump": _NO_QUEUE,
    "routing.strict_priority": _NO_QUEUE,
    "priority": _NO_QUEUE,
    "router_config_override": _ROUTERS,
    "router": ignored("targets of latency, for routers that plan by time"),
    "bootstrap_info": refused("none: prefill workers hand over with prefill_result"),
    "migration_link": ignored("for traces of requests that have moved"),
    "annotations": ignored("the frontend answers them"),
    "mdc_sum": ignored("checksum of the model card"),
    "agent_context": ignored("names the client's session, for traces"),
    "kv_hint": ignored("a hint on blocks to keep; the engine decides by its own rules"),
    "require_reasoning": ignored("says where guided decoding begins in engines that parse reasoning"),
    "request_timestamp_ms": ignored("when the client sent it"),
    "_HEALTH_CHECK": ignored("marks a health check, which is served as any request"),
}
