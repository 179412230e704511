"""From options and model to cache groups, context and the arguments of ``LLM``. Pure."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from vswa_plugin.blocks import CacheGroup
from vswa_plugin.errors import ConfigError

from .model_shape import ModelShape
from .options import TrtllmOptions
from .rules import Decision


class EnginePlan(NamedTuple):
    """:param groups: in order of their first layer, as manager V2 numbers them.
    :param changes: what is set in ``llm_args`` beyond the options, each with its reason.
    """

    groups: tuple[CacheGroup, ...]
    context_length: int
    llm_args: dict[str, Any]
    changes: tuple[str, ...]


def make_plan(options: TrtllmOptions, shape: ModelShape, decision: Decision) -> EnginePlan:
    """What the engine will keep and how it is to be started.

    :raises ConfigError: the context is unknown or too long, or a window is smaller than the model's.
    """
    args = copy.deepcopy(options.llm_args)
    changes: list[str] = []
    context = _context(options, shape)
    if options.max_seq_len is None:
        args["max_seq_len"] = context
        changes.append(f"max_seq_len = {context}: the model's context, by which windows are clamped")
    pattern = options.max_attention_window
    sliding = any(window is not None for window in shape.windows)
    if pattern is None and sliding and decision.derives_windows:
        pattern = tuple(window or context for window in shape.windows)
        args["kv_cache_config"]["max_attention_window"] = list(pattern)
        changes.append(
            "kv_cache_config.max_attention_window = the model's windows: this release derives them"
        )
    elif pattern is None and sliding:
        changes.append(
            "nothing for kv_cache_config.max_attention_window: this release keeps all layers in one global "
            "pool; give the model's windows, see engine_configs/gemma3"
        )
    changes += _fitted_to_release(args, decision)
    windows = _windows(options, shape, pattern, context)
    groups = tuple(CacheGroup(i, w, options.tokens_per_block) for i, w in enumerate(windows))
    return EnginePlan(groups, context, args, tuple(changes))


def _fitted_to_release(args: dict[str, Any], decision: Decision) -> list[str]:
    """Take out what the release does not know, and set what it would not start without."""
    changes = []
    for option in decision.unknown_options:
        section, name = option.split(".")
        del args[section][name]
        changes.append(f"{option} left out: this release does not know it")
    if decision.runtime is not None:
        args["cache_transceiver_config"]["transceiver_runtime"] = decision.runtime
        changes.append(
            f"cache_transceiver_config.transceiver_runtime = {decision.runtime}: this release would take "
            "PYTHON, which supports NIXL alone, and not start"
        )
    return changes


def _context(options: TrtllmOptions, shape: ModelShape) -> int:
    if shape.context_length is None and options.max_seq_len is None:
        raise ConfigError(
            f"max_seq_len: expected a number of tokens, because the model's config.json has no "
            f"max_position_embeddings, got none (in {options.source})"
        )
    if options.max_seq_len is None:
        assert shape.context_length is not None
        return shape.context_length
    if shape.context_length is not None and options.max_seq_len > shape.context_length:
        raise ConfigError(
            f"max_seq_len: expected at most the model's context of {shape.context_length} tokens, "
            f"got {options.max_seq_len} (in {options.source})"
        )
    return options.max_seq_len


def _windows(
    options: TrtllmOptions, shape: ModelShape, pattern: tuple[int, ...] | None, context: int
) -> list[int | None]:
    """Distinct windows in order of their first layer; None: global."""
    if pattern is None:
        return [None]
    windows: dict[int | None, None] = {}
    for layer, model_window in enumerate(shape.windows):
        size = min(pattern[layer % len(pattern)], context)
        needed = context if model_window is None else min(model_window, context)
        if size < needed:
            kind = "global attention" if model_window is None else f"a window of {model_window} tokens"
            raise ConfigError(
                f"kv_cache_config.max_attention_window: layer {layer} of the model has {kind} and needs at "
                f"least {needed} tokens, got {size} (in {options.source}); a smaller one gives wrong answers"
            )
        windows[None if size >= context else size] = None
    return list(windows)
