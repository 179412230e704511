"""A request as this engine runs it, read from Dynamo's ``PreprocessedRequest``.

What the engine does not have (images, LoRA) is refused, see fields.py: an answer that
ignores half of the request would be worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass

from vswa_plugin.engine import Fields, RequestDict, dp_rank, outside, prefill_result, token_ids
from vswa_plugin.errors import InvalidRequest

from ..model.sampling import SamplingParams, parse_sampling
from ..transfer.params import TransferParams, parse_params
from .fields import FIELDS
from .guided import Format, parse_format


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are checked against.

    :param context_length: prompt and answer together, in tokens.
    :param pool_tokens: tokens that the smallest pool of a global group holds; bounds the answer of a request
        that does not say ``max_tokens``.
    :param eos_ids: end-of-sequence ids where the request names none.
    :param mode: of the worker, one of ``vswa_plugin.engine.MODES``.
    :param data_parallel_size: ranks.
    """

    context_length: int
    pool_tokens: int
    vocab_size: int
    eos_ids: frozenset[int] = frozenset()
    mode: str = "agg"
    data_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One request, checked.

    :param prompt: token ids, at least one.
    :param max_new_tokens: at least 1; prompt and answer fit the context.
    :param min_tokens: tokens before which nothing in ``stop_ids`` ends the answer.
    :param stop_ids: token ids that end it: end-of-sequence and the request's own.
    :param dp_rank: the rank that is to serve it; None: any.
    :param handover: what a prefill worker has computed of it.
    :param format: what the answer is to keep to; None: free text.
    """

    prompt: list[int]
    max_new_tokens: int
    min_tokens: int
    stop_ids: frozenset[int]
    sampling: SamplingParams
    cache_salt: str | None = None
    dp_rank: int | None = None
    handover: TransferParams | None = None
    format: Format | None = None


def parse_request(request: RequestDict, limits: Limits) -> GenerationRequest:
    """Check and read one request; None anywhere means the default.

    :raises InvalidRequest: states what was expected and what came.
    """
    FIELDS.check(request)
    fields = Fields(request)
    prompt = token_ids(fields, limits.context_length)
    if out_of_range := outside(prompt, limits.vocab_size):
        raise fields.error("token_ids", f"ids in [0, {limits.vocab_size - 1}]", out_of_range)
    routing, stop = fields.object("routing"), fields.object("stop_conditions")
    max_new = stop.integer("max_tokens", None, low=1)
    if limits.mode == "prefill":
        max_new = 1
    elif max_new is None:
        max_new = max(1, limits.pool_tokens - len(prompt))
    sampling, output = fields.object("sampling_options"), fields.object("output_options")
    ranks = limits.data_parallel_size
    return GenerationRequest(
        prompt=prompt,
        max_new_tokens=min(max_new, limits.context_length - len(prompt)),
        min_tokens=stop.integer("min_tokens", 0, low=0),
        stop_ids=_stop_ids(fields, stop, limits),
        sampling=parse_sampling(sampling.data, output.data),
        cache_salt=routing.text("cache_salt"),
        dp_rank=dp_rank(routing, ranks, f"this worker's --data-parallel-size is {ranks}"),
        handover=_handover(fields, limits),
        format=parse_format(sampling.object("guided_decoding")),
    )


def _handover(request: Fields, limits: Limits) -> TransferParams | None:
    params = prefill_result(request, limits.mode).data.get("disaggregated_params")
    if params is None:
        return None
    handover = parse_params(params)
    if handover.first_token >= limits.vocab_size:
        raise InvalidRequest(
            "prefill_result.disaggregated_params.first_token: expected a token id below "
            f"{limits.vocab_size}, got {handover.first_token}"
        )
    return handover


def _stop_ids(request: Fields, stop: Fields, limits: Limits) -> frozenset[int]:
    kinds = ("stop_token_ids", "stop_token_ids_visible", "stop_token_ids_hidden")
    own = {token for kind in kinds for token in stop.ids(kind)}
    eos = set(request.ids("eos_token_ids")) or limits.eos_ids
    if stop.data.get("ignore_eos"):
        # Dynamo lists the eos ids among the hidden stop ids as well.
        return frozenset(own - eos)
    return frozenset(own | eos)
