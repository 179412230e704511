"""The knobs of the cost, by the names that users of Dynamo's router know, and their override per request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from vswa_plugin.errors import ConfigError, InvalidRequest, unknown_choice

#: The largest value of a knob. No cost overflows below it, whatever the prompts and the load.
MAX_WEIGHT = 1e9
#: The range is checked by hand, because a refusal is to say what came; it is written here for OpenAPI.
_Weight = Annotated[float, msgspec.Meta(extra_json_schema={"minimum": 0, "maximum": MAX_WEIGHT})]


class Weights(msgspec.Struct, frozen=True):
    """What a block costs. Names, defaults and meaning are those of Dynamo's KV router, but for the last two.

    :param overlap_score_credit: credit of a cached block on the device; 0 ignores the cache.
    :param overlap_score_credit_decay: how fast that credit fades for a rank whose prompts in flight exceed
        the least loaded rank's; 0: never.
    :param prefill_load_scale: weight of the prompt blocks to compute against the blocks held for decoding.
    :param host_cache_hit_weight: credit of a cached block in host memory.
    :param disk_cache_hit_weight: credit of a cached block on disk.
    :param decode_active_request_weight: cost of each request that is active on the rank, in blocks.
    :param router_temperature: 0 takes the cheapest; above, a softmax over the costs draws.
    :param assume_kv_reuse: prompt blocks that requests share count once in the load.
    :param track_prefill_tokens: prompts that wait for their first token count as load.
    :param track_active_blocks: blocks that active requests hold count as load.
    :param track_output_blocks: blocks of generated tokens count as load.
    :param in_flight_credit: how far a prefix that the rank is computing for another request counts as cached;
        0 as in Dynamo, where a burst of one new prefix scatters over all ranks.
    :param transfer_credit: credit of a block that a decode worker holds and that need not be moved to it,
        on top of ``overlap_score_credit``; 0 as behind Dynamo's PrefillRouter, which decodes by load alone.
    """

    overlap_score_credit: float = 1.0
    overlap_score_credit_decay: float = 0.0
    prefill_load_scale: float = 1.0
    host_cache_hit_weight: float = 0.75
    disk_cache_hit_weight: float = 0.25
    decode_active_request_weight: float = 0.0
    router_temperature: float = 0.0
    assume_kv_reuse: bool = True
    track_prefill_tokens: bool = True
    track_active_blocks: bool = True
    track_output_blocks: bool = False
    in_flight_credit: float = 1.0
    transfer_credit: float = 1.0

    def check(self) -> Weights:
        """Return self, or raise :class:`ConfigError` that names the knob."""
        for name in self.__struct_fields__:
            if (wrong := _out_of_range(getattr(self, name))) is not None:
                raise ConfigError(f"{name}: {wrong}")
        return self


class Override(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``router_config_override`` of one request; what is None stays as configured.

    :param overlap_score_weight: deprecated in Dynamo: it means ``prefill_load_scale``, and 0 also switches
        the overlap credit off.
    :param shared_cache_multiplier: has no effect: no worker here has a cache that workers share.
    """

    overlap_score_credit: _Weight | None = None
    prefill_load_scale: _Weight | None = None
    overlap_score_weight: _Weight | None = None
    router_temperature: _Weight | None = None
    assume_kv_reuse: bool | None = None
    track_prefill_tokens: bool | None = None
    shared_cache_multiplier: float | None = None

    def applied(self, weights: Weights) -> Weights:
        """``weights`` with what this request asks for.

        :raises InvalidRequest: a number that is negative, too large, or none.
        """
        changes = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        changes.pop("shared_cache_multiplier", None)
        for name, value in changes.items():
            if (wrong := _out_of_range(value)) is not None:
                raise InvalidRequest(f"router_config_override.{name}: {wrong}")
        if (legacy := changes.pop("overlap_score_weight", None)) is not None:
            changes["prefill_load_scale"] = legacy
            if legacy == 0:
                changes["overlap_score_credit"] = 0.0
        return msgspec.structs.replace(weights, **changes)


def _out_of_range(value: float) -> str | None:
    """What is wrong with the value of a knob, or None."""
    if math.isfinite(value) and 0 <= value <= MAX_WEIGHT:
        return None
    return f"expected a finite number, 0 or more and at most {MAX_WEIGHT:g}, got {value:g}"


#: Dynamo's PrefillRouter puts these on every decode request: no client wants them, so they are not followed.
OF_PREFILL_ROUTER = {"overlap_score_credit": 0.0, "assume_kv_reuse": False, "track_prefill_tokens": False}


def of_phase(weights: Weights, phase: str) -> Weights:
    """``weights`` as one phase of a request needs them: ``agg`` (as they are), ``prefill`` or ``decode``.

    A prefill worker is chosen by what it must compute: the blocks that it holds are not read there. A
    decode worker is chosen by the blocks that it reads at each step, also those that requests share, and
    one more for each request: the one that it writes to. What it holds of the prompt saves their transfer.
    """
    if phase == "prefill":
        return msgspec.structs.replace(weights, track_active_blocks=False)
    if phase == "decode":
        return msgspec.structs.replace(
            weights,
            assume_kv_reuse=False,
            track_prefill_tokens=False,
            track_active_blocks=True,
            overlap_score_credit=weights.overlap_score_credit * weights.transfer_credit,
            decode_active_request_weight=max(1.0, weights.decode_active_request_weight),
        )
    return weights


def overridden(weights: Weights, given: Mapping[str, Any] | None) -> Weights:
    """``weights`` as ``router_config_override`` of a request wants them.

    :raises InvalidRequest: an unknown key, or a value of the wrong type or range; says which.
    """
    if not given:
        return weights
    known = Override.__struct_fields__
    for name in given if isinstance(given, Mapping) else ():
        if name not in known:
            raise InvalidRequest(f"router_config_override: {unknown_choice('knob', str(name), known)}")
    try:
        override = msgspec.convert(given, Override)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidRequest(f"router_config_override: {error}") from error
    if all(getattr(override, name) == value for name, value in OF_PREFILL_ROUTER.items()):
        override = msgspec.structs.replace(override, **dict.fromkeys(OF_PREFILL_ROUTER))
    return override.applied(weights)
