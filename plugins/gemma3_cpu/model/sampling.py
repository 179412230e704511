"""From logits to a token: penalties, temperature, top-k, top-p, min-p. Pure functions.

The order is penalties, temperature, top-k, top-p, min-p. Log probabilities are those of the model itself:
before penalties and temperature, so that they mean the same whatever the request asked for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vswa_plugin.engine import temperature
from vswa_plugin.errors import InvalidRequest

MAX_LOGPROBS = 20
_LOWEST, _HIGHEST = float(np.finfo(np.float32).min) / 2, float(np.finfo(np.float32).max) / 2

#: Candidates sorted first when looking for the nucleus; sorting a vocabulary of 262,144 costs 20 ms.
_NUCLEUS_HEAD = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request draws its tokens.

    :param temperature: 0 means greedy: the likeliest token, the lower id where two are equal.
    :param top_p: the smallest set of likeliest tokens whose probabilities reach it; at least one token.
    :param top_k: how many of the likeliest tokens are kept; 0 means all.
    :param min_p: tokens below this fraction of the likeliest one's probability are dropped.
    :param repetition_penalty: divides positive and multiplies negative logits of tokens of prompt and output.
    :param presence_penalty: taken off the logit of each token that was generated.
    :param frequency_penalty: taken off the logit once per time that the token was generated.
    :param seed: the same seed draws the same tokens from the same logits; None draws afresh.
    :param logprobs: how many alternatives are reported per token; 0 only the token's own; None nothing.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One drawn token; where asked for, its ``logprob`` and ``top``: (token, logprob), likeliest first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def parse_sampling(sampling: Mapping[str, Any], output: Mapping[str, Any]) -> SamplingParams:
    """Read ``sampling_options`` and ``output_options`` of a request; None means default.

    Without a temperature, another option of sampling means one of 1, as everywhere at OpenAI.

    :raises InvalidRequest: a value out of its range.
    """
    meant = {**sampling, "temperature": temperature(sampling)}
    top_k = _integer(sampling, "top_k", 0, low=-1)
    logprobs = output.get("logprobs")
    return SamplingParams(
        temperature=_number(meant, "temperature", 0.0, low=0.0),
        top_p=_number(sampling, "top_p", 1.0, low=0.0, high=1.0),
        top_k=max(top_k, 0),
        min_p=_number(sampling, "min_p", 0.0, low=0.0, high=1.0),
        repetition_penalty=_number(sampling, "repetition_penalty", 1.0, low=0.0, above=True),
        presence_penalty=_number(sampling, "presence_penalty", 0.0, low=-2.0, high=2.0),
        frequency_penalty=_number(sampling, "frequency_penalty", 0.0, low=-2.0, high=2.0),
        seed=None if sampling.get("seed") is None else _integer(sampling, "seed", 0),
        logprobs=None if logprobs is None else _integer(output, "logprobs", 0, low=0, high=MAX_LOGPROBS),
    )


def make_rng(seed: int | None) -> np.random.Generator:
    """A request's own random numbers. Negative seeds are taken modulo 2**64."""
    return np.random.default_rng(None if seed is None else seed % 2**64)


def sample(
    logits: npt.NDArray[np.float32],
    params: SamplingParams,
    rng: np.random.Generator,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: Collection[int] = (),
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Sampled:
    """Draw the next token.

    :param logits: ``[vocab]``; not changed.
    :param prompt: prompt tokens, for the repetition penalty.
    :param output: tokens generated so far, for all penalties.
    :param banned: token ids that are not drawn, e.g. stop tokens before ``min_tokens``.
    :param allowed: of each token whether it may be drawn; None: all may. Where ``banned`` leaves none of
        them, it has no effect.
    :raises FloatingPointError: the logits hold NaN or infinity: the computation went wrong.
    """
    if not np.isfinite(logits).all():
        raise FloatingPointError("expected finite logits, got NaN or infinity from the model")
    adjusted = penalize(logits, params, prompt, output) if params.penalizes else logits
    if banned or allowed is not None:
        adjusted = np.where(_drawable(len(adjusted), banned, allowed), adjusted, -np.inf)
    if params.temperature == 0.0 or params.top_k == 1:
        token = int(adjusted.argmax())
    else:
        ids, weights = candidates(adjusted, params)
        cumulative = weights.cumsum()
        drawn = int(cumulative.searchsorted(rng.random() * cumulative[-1], side="right"))
        token = int(ids[min(drawn, len(ids) - 1)])
    if params.logprobs is None:
        return Sampled(token)
    logprob, top = _logprobs(logits, token, params.logprobs)
    return Sampled(token, logprob, top)


def _drawable(
    count: int, banned: Collection[int], allowed: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.bool_]:
    """Of each token whether it may be drawn."""
    drawable = np.ones(count, bool) if allowed is None else allowed.copy()
    drawable[list(banned)] = False
    return drawable if allowed is None or drawable.any() else allowed


def penalize(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> npt.NDArray[np.float32]:
    """A copy of ``logits`` with the three penalties applied."""
    adjusted = logits.copy()
    if params.repetition_penalty != 1.0:
        token_ids = np.unique(np.fromiter((*prompt, *output), dtype=np.int64))
        values = adjusted[token_ids].astype(np.float64)
        factor = params.repetition_penalty
        # Any positive number may come as the factor; logits stay finite.
        with np.errstate(over="ignore"):
            penalized = np.where(values > 0, values / factor, values * factor)
        adjusted[token_ids] = penalized.clip(_LOWEST, _HIGHEST)
    generated, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
    adjusted[generated] -= (params.presence_penalty + params.frequency_penalty * counts).astype(
        adjusted.dtype
    )
    return adjusted


def candidates(
    logits: npt.NDArray[np.float32], params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Token ids that may be drawn at a temperature above 0, and their weights (not normalised).

    Likeliest first, unless nothing is cut: then in order of the ids.
    """
    # A difference divided by a tiny temperature may overflow: to -inf, whose weight is 0, as it should be.
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - float(logits.max())) / params.temperature
    weights = np.exp(scaled)
    ids = np.arange(len(weights))
    if 0 < params.top_k < len(weights):
        ids = _highest(weights, params.top_k)
    if params.top_p < 1.0:
        ids = ids[_nucleus(weights[ids], params.top_p)]
    if params.min_p > 0.0:
        ids = ids[weights[ids] >= params.min_p * weights.max()]
    return ids, weights[ids]


def _nucleus(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """Indices of the smallest set of the highest weights that reaches ``top_p`` of the sum."""
    target = top_p * weights.sum()
    head = min(_NUCLEUS_HEAD, len(weights))
    order = _highest(weights, head)
    cumulative = weights[order].cumsum()
    if cumulative[-1] < target and head < len(weights):
        order = _highest(weights, len(weights))
        cumulative = weights[order].cumsum()
    return order[: int(cumulative.searchsorted(target, side="left")) + 1]


def _highest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.int64]:
    """Indices of the ``count`` highest values, highest first, the lower index first where two are equal."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    near = np.flatnonzero(values >= threshold)
    return near[np.argsort(-values[near], kind="stable")[:count]]


def _logprobs(
    logits: npt.NDArray[np.float32], token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    shifted = logits.astype(np.float64) - float(logits.max())
    total = math.log(float(np.exp(shifted).sum()))
    top = _highest(logits, count) if count else ()
    return float(shifted[token]) - total, tuple((int(i), float(shifted[i]) - total) for i in top)


def _number(
    data: Mapping[str, Any],
    name: str,
    default: float,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
) -> float:
    """``data[name]`` in ``[low, high]``, or ``(low, high]`` with ``above``."""
    value = data.get(name)
    if value is None:
        return default
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not numeric or not (low < value if above else low <= value) or value > high:
        at_least = f"above {low:g}" if above else f"of at least {low:g}"
        expected = f"a number {at_least}" if high == math.inf else f"a number in [{low:g}, {high:g}]"
        raise InvalidRequest(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def _integer(
    data: Mapping[str, Any], name: str, default: int, *, low: int | None = None, high: int | None = None
) -> int:
    value = data.get(name)
    if value is None:
        return default
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        expected = "an integer"
        if low is not None:
            expected += f" of at least {low}" if high is None else f" in [{low}, {high}]"
        raise InvalidRequest(f"{name}: expected {expected}, got {value!r}")
    return int(value)
