"""What Dynamo's frontend makes of each field of a client's request, measured with ai-dynamo-runtime 1.6.1.

Workers see what the frontend passes on, and nothing else: a field that it drops can be refused by no worker.
docs/request-fields.md shows this table, and a test sends each field to the real frontend.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Fate(msgspec.Struct, frozen=True):
    """What becomes of a field at one endpoint of the frontend.

    :param kind: ``passed`` on to the worker, ``done`` by the frontend itself, ``dropped`` without a word, or
        ``refused`` with a status of 400 (501: deprecated).
    :param paths: where it comes to the worker.
    :param changes_answer: of a dropped field: whether the client gets something else than it wants.
    """

    kind: Literal["passed", "done", "dropped", "refused"]
    text: str = ""
    paths: tuple[str, ...] = ()
    changes_answer: bool = False


class ClientField(msgspec.Struct, frozen=True):
    """:param name: dotted, as the client sends it."""

    name: str
    chat: Fate
    completions: Fate


_REFUSED = Fate("refused")


def _passed(*paths: str, text: str = "") -> Fate:
    return Fate("passed", text, paths)


def _done(text: str) -> Fate:
    return Fate("done", text)


def _dropped(text: str = "") -> Fate:
    return Fate("dropped", text)


def _lost(text: str = "") -> Fate:
    return Fate("dropped", text, changes_answer=True)


def _both(name: str, fate: Fate) -> ClientField:
    return ClientField(name, fate, fate)


def _chat(name: str, fate: Fate) -> ClientField:
    return ClientField(name, fate, _REFUSED)


def _completions(name: str, fate: Fate) -> ClientField:
    return ClientField(name, _REFUSED, fate)


_GUIDED = "sampling_options.guided_decoding."
_PROMPT = _passed("output_options.prompt_logprobs", text="the text is not echoed")
_STOP = "dropped together with ignore_eos"
_CHOSEN = "400 where no such worker is known"

CLIENT_FIELDS: tuple[ClientField, ...] = (
    _both("model", _passed("model")),
    _chat("messages", _passed("token_ids", text="images: multi_modal_data")),
    _completions("prompt", _passed("token_ids")),
    _completions("prompt_embeds", _passed("prompt_embeds")),
    _both("stream", _done("the answer comes in pieces")),
    _both("stream_options", _done("usage in the last piece")),
    _both("max_tokens", _passed("stop_conditions.max_tokens")),
    _chat("max_completion_tokens", _passed("stop_conditions.max_tokens")),
    _both("min_tokens", _passed("stop_conditions.min_tokens")),
    _both("stop", _passed("stop_conditions.stop", text=_STOP)),
    _both("stop_token_ids", _passed("stop_conditions.stop_token_ids", text=_STOP)),
    _both("ignore_eos", _passed("stop_conditions.ignore_eos")),
    _both("include_stop_str_in_output", _passed("sampling_options.include_stop_str_in_output")),
    _completions("no_stop_trim", _passed("output_options.no_stop_trim")),
    _both("skip_special_tokens", _passed("output_options.skip_special_tokens")),
    _both("detokenize", _passed("extra_args.sampling_options.detokenize")),
    _both("n", _passed("sampling_options.n")),
    _completions("best_of", _passed("sampling_options.best_of")),
    _both("temperature", _passed("sampling_options.temperature")),
    _both("top_p", _passed("sampling_options.top_p")),
    _both("top_k", _passed("sampling_options.top_k")),
    _both("min_p", _passed("sampling_options.min_p")),
    _both("seed", _passed("sampling_options.seed")),
    _both("presence_penalty", _passed("sampling_options.presence_penalty")),
    _both("frequency_penalty", _passed("sampling_options.frequency_penalty")),
    _both("repetition_penalty", _passed("sampling_options.repetition_penalty")),
    _both("logit_bias", _lost()),
    _both("allowed_token_ids", _passed("extra_args.sampling_options.allowed_token_ids")),
    _both("bad_words_token_ids", _passed("extra_args.sampling_options.bad_words_token_ids")),
    _both("logprobs", _passed("output_options.logprobs")),
    _chat("top_logprobs", _passed("output_options.logprobs", text="dropped without logprobs")),
    _both("prompt_logprobs", _passed("output_options.prompt_logprobs")),
    _completions("echo", _PROMPT),
    _both("logprob_token_ids", _passed("extra_args.sampling_options.logprob_token_ids")),
    _both("return_tokens_as_token_ids", _passed("output_options.return_tokens_as_token_ids")),
    _completions("suffix", _lost("a model of this project cannot fill in the middle")),
    _chat("response_format", _passed(f"{_GUIDED}json", text="json_object and json_schema; text: nothing")),
    _chat("tools", _done("in chat templates that know them, and in the parser of the answer")),
    _chat(
        "tool_choice", _passed(f"{_GUIDED}json", text="required and a named function; none, auto: done there")
    ),
    _chat(
        "parallel_tool_calls", _passed(f"{_GUIDED}json", text="with tool_choice required; dropped otherwise")
    ),
    _both("guided_json", _passed(f"{_GUIDED}json")),
    _both("guided_regex", _passed(f"{_GUIDED}regex")),
    _both("guided_choice", _passed(f"{_GUIDED}choice")),
    _both("guided_grammar", _passed(f"{_GUIDED}grammar")),
    _both("guided_decoding_backend", _passed(f"{_GUIDED}backend", text="with another guide only")),
    _both(
        "guided_whitespace_pattern", _passed(f"{_GUIDED}whitespace_pattern", text="with another guide only")
    ),
    _chat("reasoning_effort", _done("in chat templates that know it")),
    _chat("thinking", _done("in chat templates that know it")),
    _chat("thinking_token_budget", _passed("stop_conditions.max_thinking_tokens")),
    _chat("chat_template_args", _done("in chat templates that know them")),
    _chat("chat_template_kwargs", _done("in chat templates that know them")),
    _chat("add_generation_prompt", _passed("token_ids", text="by the chat template")),
    _chat("continue_final_message", _passed("token_ids", text="by the chat template")),
    _chat("mm_processor_kwargs", _passed("mm_processor_kwargs")),
    _chat("media_io_kwargs", _passed("media_io_kwargs")),
    _both("cache_salt", _passed("routing.cache_salt", "extra_args.nvext.cache_salt")),
    _both("user", _dropped()),
    _both("metadata", _dropped()),
    _chat("store", _dropped()),
    _chat("service_tier", _dropped()),
    _chat("prompt_cache_key", _dropped("prefixes are reused without it")),
    _chat("prediction", _dropped("changes speed alone")),
    _chat("modalities", _lost("the answer is text")),
    _chat("audio", _lost("the answer is text")),
    _chat("web_search_options", _lost("nothing is searched")),
    _both("function_call", _REFUSED),
    _both("functions", _REFUSED),
    _both("verbosity", _REFUSED),
    _both("prompt_cache_retention", _REFUSED),
    _both("safety_identifier", _REFUSED),
    _both("use_beam_search", _REFUSED),
    _both("length_penalty", _REFUSED),
    _both("truncate_prompt_tokens", _REFUSED),
    _both("skip_reading_prefix_cache", _REFUSED),
    _both("nvext.greed_sampling", _done("temperature and its like are taken off")),
    ClientField(
        "nvext.use_raw_prompt", _lost("the chat template is applied"), _done("there is no template anyway")
    ),
    _both("nvext.annotations", _passed("annotations")),
    _both("nvext.token_data", _passed("token_ids", "extra_args.nvext.token_in")),
    _both("nvext.max_thinking_tokens", _passed("stop_conditions.max_thinking_tokens")),
    _both("nvext.cache_salt", _passed("routing.cache_salt", "extra_args.nvext.cache_salt")),
    _both("nvext.extra_fields", _passed("extra_args.nvext.extra_fields")),
    _both("nvext.metadata_upload", _passed("extra_args.nvext.metadata_upload")),
    _both("nvext.backend_instance_id", _passed("routing.backend_instance_id", text=_CHOSEN)),
    _both("nvext.decode_worker_id", _passed("routing.decode_worker_id", text=_CHOSEN)),
    _both("nvext.dp_rank", _passed("routing.dp_rank", text="400 without a worker")),
    _both("nvext.prefill_worker_id", _passed("routing.prefill_worker_id")),
    _both("nvext.prefill_dp_rank", _passed("routing.prefill_dp_rank")),
    _both("nvext.agent_hints.priority", _passed("routing.priority", "routing.priority_jump")),
    _both("nvext.agent_hints.strict_priority", _passed("routing.strict_priority")),
    _both("nvext.agent_hints.osl", _passed("routing.expected_output_tokens")),
    _both("nvext.agent_hints.latency_sensitivity", _passed("routing.priority_jump")),
    _both(
        "nvext.agent_hints.speculative_prefill",
        _done("of chat: a request for the next turn's prompt follows"),
    ),
    _both("nvext.routing_constraints.required_taints", _passed("routing.routing_constraints")),
    _both("nvext.routing_constraints.preferred_taints", _passed("routing.routing_constraints")),
    ClientField("nvext.router.ttft_target", _passed("router"), _dropped()),
    ClientField("nvext.router.itl_target", _passed("router"), _dropped()),
    _both("nvext.request_timestamp_ms", _passed("request_timestamp_ms")),
)

#: What clients lose without a word: fields that the frontend takes and drops, and that change the answer.
LOST = tuple(
    field.name for field in CLIENT_FIELDS if field.chat.changes_answer or field.completions.changes_answer
)
