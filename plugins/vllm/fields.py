"""What becomes of each field of a request in vLLM, and from where each sampling parameter comes."""

from __future__ import annotations

from vswa_plugin.engine import SHARED, FieldUses, refused, used

#: Dynamo's sampling option and vLLM's sampling parameter: both have the same name and mean the same.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)  # fmt: skip
#: Parameters of ``StructuredOutputsParams``, of which a request may have one.
GUIDED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
#: Switches the cache off for one request.
NO_CACHE = "skip_reading_prefix_cache"
_NO_CACHE_USE = used(f"`SamplingParams.{NO_CACHE}`")

FIELDS = FieldUses(
    {
        **SHARED,
        **{f"sampling_options.{name}": used(f"`SamplingParams.{name}`") for name in SAMPLING},
        **{
            f"sampling_options.guided_decoding.{kind}": used(f"`StructuredOutputsParams.{kind}`")
            for kind in (*GUIDED, "whitespace_pattern")
        },
        "sampling_options.guided_decoding.backend": refused("none: an option of the engine chooses it"),
        f"sampling_options.{NO_CACHE}": _NO_CACHE_USE,
        f"extra_args.sampling_options.{NO_CACHE}": _NO_CACHE_USE,
        f"extra_args.{NO_CACHE}": _NO_CACHE_USE,
        "extra_args.kv_cache_report_mode": refused("none: it would announce blocks that are not held"),
        "extra_args.sampling_options.extra_args": refused("none: they may change what the engine announces"),
        "token_ids": used("the prompt"),
        "eos_token_ids": used("`SamplingParams.stop_token_ids`, unless ignore_eos is set"),
        "stop_conditions.max_tokens": used("`SamplingParams.max_tokens`; none given: all that fits"),
        "stop_conditions.min_tokens": used("`SamplingParams.min_tokens`"),
        "stop_conditions.stop_token_ids": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.stop_token_ids_visible": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.stop_token_ids_hidden": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.ignore_eos": used("`SamplingParams.ignore_eos`"),
        "output_options.logprobs": used("`SamplingParams.logprobs`"),
        "routing.dp_rank": used("`data_parallel_rank` of `generate`"),
        "routing.cache_salt": used("`cache_salt` of the prompt"),
        "routing.lora_name": used("`lora_request` of `generate`"),
        "routing.priority": used("`priority` of `generate`, where scheduling_policy is priority"),
        "extra_args.nvext.cache_salt": used("`cache_salt`, where routing has none"),
        "prefill_result.disaggregated_params": used("`kv_transfer_params` of the connector, in mode decode"),
        "prefill_result.prompt_tokens_details": used("the cached tokens, where the connector names none"),
    }
)

#: Parameters of ``SamplingParams`` that no request sets, and why.
NOT_SET = {
    "n": "one answer per request; more are refused",
    "watermarking": "an option of the engine",
    "stop": "the frontend stops there",
    "prompt_logprobs": "refused",
    "prompt_logprob_token_ids": "refused with prompt_logprobs",
    "prompt_logprob_start": "refused with prompt_logprobs",
    "logprob_token_ids": "refused",
    "flat_logprobs": "a form of the answer inside the worker",
    "skip_special_tokens": "the frontend makes the text",
    "spaces_between_special_tokens": "the frontend makes the text",
    "include_stop_str_in_output": "the frontend makes the text",
    "stream_interval": "an option of the engine",
    "skip_clone": "vLLM's own",
    "output_text_buffer_length": "vLLM's own",
    "logit_bias": "does not reach a worker",
    "allowed_token_ids": "refused",
    "extra_args": "of a request they may change what the engine announces; kv_transfer_params go there",
    "bad_words": "bad_words_token_ids is refused",
    "thinking_token_budget": "refused",
    "repetition_detection": "no field of a request has it",
    "routed_experts_prompt_start": "no field of a request has it",
    "trace_decode_token_ids": "no field of a request has it",
}
