"""What becomes of each field of a request in TensorRT-LLM, and from where each sampling parameter comes."""

from __future__ import annotations

from vswa_plugin.engine import SHARED, FieldUses, refused, used

#: Dynamo's sampling option -> TensorRT-LLM's; both mean the same.
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "include_stop_str_in_output": "include_stop_str_in_output",
}
#: Parameters of ``GuidedDecodingParams``, of which a request may have one.
GUIDED = ("json", "regex", "grammar", "json_object", "structural_tag")

FIELDS = FieldUses(
    {
        **SHARED,
        **{
            f"sampling_options.{name}": used(f"`SamplingParams.{theirs}`")
            for name, theirs in SAMPLING.items()
        },
        **{
            f"sampling_options.guided_decoding.{kind}": used(f"`GuidedDecodingParams.{kind}`")
            for kind in GUIDED
        },
        "sampling_options.guided_decoding.choice": used("`GuidedDecodingParams.regex`"),
        "sampling_options.guided_decoding.backend": refused("none: an option of the engine chooses it"),
        "sampling_options.guided_decoding.whitespace_pattern": refused(
            "none: TensorRT-LLM has no such thing"
        ),
        "token_ids": used("the prompt"),
        "eos_token_ids": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.max_tokens": used("`SamplingParams.max_tokens`; none given: all that fits"),
        "stop_conditions.min_tokens": used("`SamplingParams.min_tokens`"),
        "stop_conditions.stop_token_ids": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.stop_token_ids_visible": used(
            "`SamplingParams.ignore_eos`: the engine would drop them, the frontend stops there"
        ),
        "stop_conditions.stop_token_ids_hidden": used("`SamplingParams.stop_token_ids`"),
        "stop_conditions.ignore_eos": used("`SamplingParams.ignore_eos`"),
        "output_options.logprobs": used("`SamplingParams.logprobs`, at least 1"),
        "routing.dp_rank": used("`SchedulingParams.attention_dp_rank`"),
        "routing.cache_salt": used("`cache_salt` of `generate_async`"),
        "routing.lora_name": used("`lora_request` of `generate_async`"),
        "extra_args.nvext.cache_salt": used("`cache_salt`, where routing has none"),
        "priority": used("`priority` of `generate_async`, from 0 to 1; Dynamo's health checks send it"),
        "prefill_result.disaggregated_params": used("`disaggregated_params` of `generate_async`"),
        "prefill_result.prompt_tokens_details": used("the cached tokens that the client sees"),
    }
)

#: Parameters of ``SamplingParams`` that no request sets, and why.
NOT_SET = {
    "end_id": "the frontend names the end-of-sequence ids in each request",
    "pad_id": "nothing is padded",
    "bad": "no field of a request has it",
    "bad_token_ids": "bad_words_token_ids is refused",
    "stop": "the frontend stops there",
    "embedding_bias": "logit_bias does not reach a worker",
    "logits_processor": "no field of a request has it",
    "apply_batched_logits_processor": "no field of a request has it",
    "n": "one answer per request; more are refused",
    "best_of": "one answer per request; more are refused",
    "use_beam_search": "refused",
    "top_p_min": "no field of a request has it",
    "top_p_reset_ids": "no field of a request has it",
    "top_p_decay": "no field of a request has it",
    "beam_search_diversity_rate": "beams are refused",
    "length_penalty": "refused, but for 1",
    "early_stopping": "beams are refused",
    "no_repeat_ngram_size": "no field of a request has it",
    "beam_width_array": "beams are refused",
    "prompt_logprobs": "refused",
    "return_context_logits": "no field of a request has it",
    "return_generation_logits": "no field of a request has it",
    "exclude_input_from_output": "the prompt is never part of the answer",
    "return_encoder_output": "no model here has an encoder",
    "return_perf_metrics": "cached_tokens of the result is enough",
    "additional_model_outputs": "no field of a request has it",
    "lookahead_config": "an option of the engine",
    "add_special_tokens": "the frontend makes the token ids",
    "truncate_prompt_tokens": "prompts are never cut; too long ones are refused",
    "skip_special_tokens": "the frontend makes the text",
    "spaces_between_special_tokens": "the frontend makes the text",
}
