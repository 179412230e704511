"""Requests and answers of the HTTP API. The OpenAPI document is made from these structs.

Fields of Dynamo's standalone indexer and selection service have their names and meaning, in tokens; what
windows need is beside them. Unknown fields are ignored, as there. Worker ids are text in answers, see
``id_text``; only in ``nvext`` they are numbers, because Dynamo's frontend takes nothing else there.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from vswa_plugin.blocks.layout import CacheGroup, Resumption
from vswa_plugin.index import Explanation, GroupExplanation, IndexStats
from vswa_plugin.router.wishes import RoutingConstraints
from vswa_plugin.selection import Override
from vswa_plugin.wire.events import id_text

#: Limits of a request. A body of the largest lists fits into the largest body.
MAX_BODY_BYTES = 4 << 20
MAX_TOKENS = 262_144
MAX_HASHES = 65_536
MAX_MESSAGES = 4_096
MAX_TTL_S = 3_600.0

_U64_MAX = 2**64 - 1
_Hash = Annotated[int, Meta(ge=0, extra_json_schema={"maximum": _U64_MAX})]
_Name = Annotated[str, Meta(min_length=1, max_length=512)]
_Tokens = Annotated[list[Annotated[int, Meta(ge=0, le=2**32 - 1)]], Meta(min_length=1, max_length=MAX_TOKENS)]
_Hashes = Annotated[list[_Hash], Meta(min_length=1, max_length=MAX_HASHES)]
#: A worker's id as an answer has it, or as a number.
_WorkerId = Annotated[int, Meta(ge=0)] | Annotated[str, Meta(pattern="^[0-9]{1,20}$")]
_DpRank = Annotated[int, Meta(ge=0, le=2**31)]
_Text = Annotated[str, Meta(min_length=1, max_length=MAX_BODY_BYTES)]
_Length = Annotated[int, Meta(ge=1, le=2**31)]


class ModelWish(msgspec.Struct, kw_only=True):
    """Which model. ``model`` is what Mooncake calls it; neither: the only one that is served."""

    model_name: _Name | None = None
    model: _Name | None = None


class Query(ModelWish, kw_only=True):
    """A prompt as tokens. Salt and LoRA go into the hashes: equal tokens under another salt do not match."""

    token_ids: _Tokens
    lora_name: _Name | None = None
    cache_salt: _Name | None = None


class ExplainQuery(ModelWish, kw_only=True):
    """A prompt as tokens, or as text.

    :param prompt: taken as ``/v1/completions`` takes it, without a chat template; ``token_ids`` go before it.
        The router must be able to read the model's tokenizer.
    """

    token_ids: _Tokens | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    lora_name: _Name | None = None
    cache_salt: _Name | None = None


class HashQuery(ModelWish, kw_only=True):
    """A prompt as hashes of its full blocks: chained (``sequence_hashes``, which go before ``block_hashes``),
    or each block's own (``block_hashes``).

    Without ``isl_tokens``, its length, it is taken as one token longer than its blocks, and the answer says
    so. A salt or LoRA is in the hashes already: ``cache_salt`` must be left out.
    """

    block_hashes: _Hashes | None = None
    sequence_hashes: _Hashes | None = None
    isl_tokens: _Length | None = None
    cache_salt: None = None


class RankAnswer(msgspec.Struct, frozen=True):
    """One data-parallel rank.

    :param cached_tokens: what its engine would reuse, exactly; may end inside a block.
    :param cached_blocks: whole blocks of these.
    :param tiers: whole blocks by the slowest tier that must be loaded for them.
    :param global_only_tokens: what a router would promise that knows of global attention only.
    :param state: of our view: live, stale, silent, unreadable or waiting.
    :param scored: False: it scores 0 whatever it holds.
    """

    cached_tokens: int
    cached_blocks: int
    tiers: dict[str, int]
    global_only_tokens: int
    state: str
    scored: bool


class InstanceAnswer(msgspec.Struct, frozen=True):
    """One worker, best of its ranks. ``gpu`` <= ``cpu`` <= ``disk``: each includes the faster tiers.

    :param longest_matched: what the best rank would reuse.
    :param dp: rank -> tokens that it would reuse from the device.
    """

    longest_matched: int
    gpu: int
    dp: dict[str, int]
    cpu: int
    disk: int
    ranks: dict[str, RankAnswer]


class QueryAnswer(msgspec.Struct, frozen=True):
    """:param assumed: what the request did not give and was assumed; null: nothing.
    :param scores: worker -> rank -> tokens that it would reuse from the device.
    :param frequencies: per block, how many ranks would reuse it; as far as any would.
    """

    model_name: str
    block_size: int
    prompt_tokens: int
    assumed: str | None
    scores: dict[str, dict[str, int]]
    frequencies: list[int]
    instances: dict[str, InstanceAnswer]


class Listener(msgspec.Struct, frozen=True, omit_defaults=True):
    """The state of one rank's event stream.

    :param endpoint: NATS subject of its events.
    :param status: as of the worker.
    :param state: of our view: live, stale, silent, unreadable or waiting.
    :param blocks: window -> tier -> blocks held.
    """

    endpoint: str
    status: str
    state: str
    epoch: int
    next_event_id: int
    lag_ms: float | None
    blocks: dict[str, dict[str, int]]
    last_error: str = ""


class WorkerAnswer(msgspec.Struct, frozen=True):
    """One worker in the registry.

    :param status: the worst of its ranks: failed, pending (not known yet), paused (silent or stale), active.
    :param mode: agg, prefill or decode.
    :param rule: how its engine resumes a prompt.
    """

    instance_id: str
    source: str
    status: str
    model_name: str
    routing_group: str
    block_size: int
    endpoints: dict[str, str]
    listeners: dict[str, Listener]
    endpoint: str
    mode: str
    engine: str
    rule: str
    groups: tuple[CacheGroup, ...]


class GroupDump(msgspec.Struct, frozen=True):
    """:param window: in tokens, or ``global``.
    :param blocks: tier -> sequence hashes, ascending.
    """

    group_id: int
    window: str
    blocks: dict[str, list[int]]


class DumpLayout(msgspec.Struct, frozen=True):
    groups: tuple[CacheGroup, ...]
    rule: str
    model: str
    hash_scheme: str
    resumption: Resumption | None = None


class RankDump(msgspec.Struct, frozen=True):
    """Of one instant: what was held when ``next_event_id`` came next."""

    worker_id: str
    dp_rank: int
    scored: bool
    epoch: int
    next_event_id: int
    layout: DumpLayout
    groups: list[GroupDump]


class DumpAnswer(msgspec.Struct, frozen=True):
    """Ranks follow each other, each of its own instant."""

    version: int
    ranks: list[RankDump]


class RankText(NamedTuple):
    worker_id: str
    dp_rank: int


class ExplanationAnswer(msgspec.Struct, frozen=True):
    """One rank and one prompt; the fields of ``vswa_plugin.index.Explanation``."""

    rank: RankText
    model: str
    rule: str
    scored: bool
    boundaries: int
    boundary: int
    cached_tokens: int
    groups: tuple[GroupExplanation, ...]
    failed: str | None = None

    @classmethod
    def of(cls, found: Explanation) -> ExplanationAnswer:
        rank = RankText(id_text(found.rank.worker_id), found.rank.dp_rank)
        return cls(**{**msgspec.structs.asdict(found), "rank": rank})


class ChoiceAnswer(msgspec.Struct, frozen=True):
    """What one rank would cost a request with a prompt, and whether it would be chosen.

    :param phase: ``agg``, or ``prefill`` or ``decode`` where these are apart.
    :param cost: in blocks, with what plugins add to it.
    :param added: of it, what plugins add.
    :param terms: what the plugin that makes the cost says of it, by name.
    """

    rank: RankText
    phase: str
    cached_tokens: int
    cost: float
    added: float
    chosen: bool
    terms: dict[str, float]


class HealthAnswer(msgspec.Struct, frozen=True):
    status: str
    reason: str | None


class ReadyAnswer(msgspec.Struct, frozen=True):
    """:param models: model -> ranks that are known exactly."""

    ready: bool
    reason: str | None
    models: dict[str, int]
    index: IndexStats


class SelectQuery(Query, kw_only=True):
    """A request that looks for its worker, or for two: where prefill and decode workers are apart.

    Its prompt is ``token_ids``, or where Dynamo's preprocessor is at hand (``vswa picker``) ``prompt`` or
    ``messages``, as in a request to Dynamo's frontend.

    :param tools: with ``messages``, as there; ``chat_template_args`` likewise.
    :param selection_id: chosen by the caller, unique among active ones; None: a new one.
    :param reserve: False: choose only, without counting it as load.
    :param ttl_s: when the reservation ends by itself.
    :param backend_instance_id: only this worker; ``decode_worker_id``: only this one to generate.
    :param dp_rank: only this rank of it.
    :param prefill_worker_id: only this worker to compute the prompt; ``prefill_dp_rank``: only this rank.
    :param allowed_worker_ids: only these, for both phases.
    :param router_config_override: knobs of the cost, by Dynamo's names.
    :param routing_constraints: ``required_taints``, ``preferred_taints``.
    :param session_id: of the conversation that the request belongs to, for plugins.
    :param prompt_logprobs: as in the request: where it is given, engines reuse nothing, so nothing is
        promised; ``skip_reading_prefix_cache`` likewise.
    """

    token_ids: _Tokens | None = None  # type: ignore[assignment]
    prompt: _Text | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_MESSAGES)] | None = None
    chat_template_args: dict[str, Any] | None = None
    selection_id: _Name | None = None
    reserve: bool = True
    ttl_s: Annotated[float, Meta(gt=0, le=MAX_TTL_S)] = 120.0
    backend_instance_id: _WorkerId | None = None
    dp_rank: _DpRank | None = None
    prefill_worker_id: _WorkerId | None = None
    prefill_dp_rank: _DpRank | None = None
    decode_worker_id: _WorkerId | None = None
    allowed_worker_ids: Annotated[list[_WorkerId], Meta(max_length=1_024)] | None = None
    router_config_override: Override | None = None
    routing_constraints: RoutingConstraints | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=2**31)] | None = None
    skip_reading_prefix_cache: bool = False
    session_id: _Name | None = None


class Chosen(msgspec.Struct, frozen=True):
    """A worker for one phase.

    :param overlap: what it would reuse, best of its ranks.
    """

    worker_id: str
    dp_rank: int
    endpoint: str
    overlap: InstanceAnswer
    cost: float


class SelectAnswer(msgspec.Struct, frozen=True):
    """``worker_id``, ``dp_rank``, ``endpoint``, ``overlap`` and ``cost`` are of the worker that generates.

    :param prefill: the worker that computes the prompt for it; null: the same worker.
    :param cached_tokens: of the prompt, what the one that computes it would reuse.
    :param effective_prefill_tokens: what it would compute.
    :param headers: put these on the request to Dynamo's frontend, and it goes there.
    :param nvext: the same as fields of the request's ``nvext``.
    :param expires_at: Unix time at which the reservation ends by itself; null: nothing is reserved.
    """

    selection_id: str
    model_name: str
    routing_group: str
    worker_id: str
    dp_rank: int
    endpoint: str
    block_size: int
    overlap: InstanceAnswer
    cost: float
    prefill: Chosen | None
    cached_tokens: int
    effective_prefill_tokens: int
    headers: dict[str, str]
    nvext: dict[str, int]
    reserved: bool
    expires_at: float | None


class SelectionWish(msgspec.Struct, kw_only=True):
    """A reservation."""

    selection_id: _Name


class Release(SelectionWish, kw_only=True):
    """The request has ended.

    :param cached_tokens: what the engine reported as reused, if known, to be compared with the prediction.
    """

    cached_tokens: Annotated[int, Meta(ge=0, le=2**31)] | None = None


class ReleaseAnswer(msgspec.Struct, frozen=True):
    """:param predicted_tokens: what ``/select`` had promised."""

    selection_id: str
    predicted_tokens: int


class ErrorAnswer(msgspec.Struct, frozen=True):
    """:param error: what was expected, what came, and what to do."""

    error: str
    code: int
