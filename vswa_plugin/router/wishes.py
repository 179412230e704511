"""What the client of a request says about its routing: pins, allowed workers, taints. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.errors import InvalidRequest
from vswa_plugin.selection import Constraints


class RoutingConstraints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Labels of workers, as ``--taint`` of a worker sets them.

    :param required_taints: the worker must carry all of them.
    :param preferred_taints: weight by label, a finite number: above 0 attracts, below 0 repels.
    """

    required_taints: frozenset[str] = frozenset()
    preferred_taints: dict[str, float] = {}


class _Routing(msgspec.Struct):
    """What is read of a request's ``routing``; None and missing mean the same."""

    backend_instance_id: int | None = None
    dp_rank: int | None = None
    prefill_worker_id: int | None = None
    prefill_dp_rank: int | None = None
    decode_worker_id: int | None = None
    allowed_worker_ids: frozenset[int] | None = None
    routing_constraints: RoutingConstraints | None = None


#: Fields of ``routing`` that pin a request to a worker and a rank, the first that is given.
_PINS = {
    "agg": (("backend_instance_id",), "dp_rank"),
    "prefill": (("prefill_worker_id",), "prefill_dp_rank"),
    "decode": (("decode_worker_id", "backend_instance_id"), "dp_rank"),
}


def constraints_of(routing: Mapping[str, Any], own_id: int | None, phase: str = "agg") -> Constraints:
    """The constraints in a request's ``routing``.

    :raises InvalidRequest: one cannot be read; says which.
    """
    if not routing:
        return Constraints()
    try:
        fields = msgspec.convert(routing, _Routing)
    except (msgspec.ValidationError, OverflowError) as error:
        raise InvalidRequest(f"routing: {error}") from error
    allowed = fields.allowed_worker_ids
    workers, rank = _PINS[phase]
    pins = {name: getattr(fields, name) for name in workers if getattr(fields, name) not in (None, own_id)}
    name, worker_id = next(iter(pins.items()), (workers[0], None))
    if allowed is not None and own_id in allowed:
        allowed = None
    taints = fields.routing_constraints or RoutingConstraints()
    _check_preferred(taints.preferred_taints)
    return Constraints(
        worker_id,
        getattr(fields, rank),
        allowed,
        taints.required_taints,
        taints.preferred_taints,
        (name, rank),
    )


def _check_preferred(weights: Mapping[str, float]) -> None:
    for taint, weight in weights.items():
        if not math.isfinite(weight):
            raise InvalidRequest(
                f"routing_constraints.preferred_taints: expected finite numbers, got {weight} for {taint!r}"
            )
