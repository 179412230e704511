"""What becomes of each field of a request in this engine."""

from __future__ import annotations

from vswa_plugin.engine import SHARED, FieldUses, ignored, used

from .guided import KINDS

_FORMAT = used("the answer keeps to it, where the extra `guided` is installed; else refused")
_PENALTY = used("lowers or raises the logits of tokens that were there already")

FIELDS = FieldUses(
    {
        **SHARED,
        "token_ids": used("the prompt"),
        "eos_token_ids": used("end the answer; none given: those of the model"),
        "stop_conditions.max_tokens": used("length of the answer; none given: as long as the pools allow"),
        "stop_conditions.min_tokens": used("the answer is not ended by a token before"),
        "stop_conditions.stop_token_ids": used("end the answer"),
        "stop_conditions.stop_token_ids_visible": used("end the answer; the frontend keeps them in the text"),
        "stop_conditions.stop_token_ids_hidden": used("end the answer; the frontend takes them off the text"),
        "stop_conditions.ignore_eos": used("end-of-sequence tokens do not end the answer"),
        "sampling_options.temperature": used(
            "0: greedy; none given: 1 where another option of sampling is given, else greedy"
        ),
        "sampling_options.top_p": used("the likeliest tokens that together reach it"),
        "sampling_options.top_k": used("so many of the likeliest tokens; -1 and 0: all"),
        "sampling_options.min_p": used("tokens of at least this share of the likeliest one's probability"),
        "sampling_options.seed": used("equal seeds draw equal tokens"),
        "sampling_options.presence_penalty": _PENALTY,
        "sampling_options.frequency_penalty": _PENALTY,
        "sampling_options.repetition_penalty": _PENALTY,
        **{f"sampling_options.guided_decoding.{kind}": _FORMAT for kind in KINDS},
        "output_options.logprobs": used("of each token of the answer, and of the likeliest, up to 20"),
        "routing.dp_rank": used("the rank that serves it"),
        "routing.cache_salt": used("blocks are shared with requests of the same salt only"),
        "prefill_result.disaggregated_params": used("where a decode worker fetches the prompt's blocks"),
        "prefill_result.prompt_tokens_details": ignored("disaggregated_params has the same count"),
    }
)
