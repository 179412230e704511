"""From the options and the model's layers to cache groups and pool sizes. Pure.

A pool that ``vswa.kv_blocks`` or ``gemma3_cpu.kv_blocks`` names has the size given there. The others:

* global: ``kv_cache_config.max_tokens``, else four whole contexts (``max_seq_len``);
* sliding: the largest of half the global pool's blocks, ``max_batch_size`` times what one running request
  needs (its window, one chunk, and the edges), and under V1's rules, which hold a whole prompt in every
  window until it is computed, one request of ``max_seq_len`` tokens;
* where ``max_tokens`` is not given and all this exceeds ``gemma3_cpu.kv_memory_mb``, the pools that were not
  given shrink in proportion, but not below what one request of ``max_seq_len`` tokens needs.

A host tier exists where it is asked for: ``gemma3_cpu.host_blocks`` by pool, the others share the bytes of
``kv_cache_config.host_cache_size`` as they share the device's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vswa_plugin.blocks import TRTLLM_V1, TRTLLM_V2, CacheGroup, Memory, Pool
from vswa_plugin.errors import ConfigError

from ..cache.spec import GroupSpec
from ..model.config import Gemma3Config
from .options import RULES, EngineOptions

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of the model matters for its cache.

    :param windows: attention window of each layer in tokens; None: global. Layers with one window are one
        group of the model.
    :param context_length: the model's own context in tokens.
    :param bytes_per_token: key and value of one token in one layer.
    """

    windows: tuple[int | None, ...]
    context_length: int
    bytes_per_token: int


def model_shape(config: Gemma3Config) -> ModelShape:
    """What of the model matters for its cache."""
    # Key and value, float32.
    bytes_per_token = 2 * 4 * config.num_key_value_heads * config.head_dim
    return ModelShape(config.windows(), config.max_position_embeddings, bytes_per_token)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One cache group and its size.

    :param model_windows: windows of the model whose layers keep their blocks in it.
    :param num_blocks: pages on the device.
    :param layers: layers in a page.
    :param host_blocks: pages on the host.
    """

    group: CacheGroup
    model_windows: tuple[int | None, ...]
    num_blocks: int
    layers: int = 1
    host_blocks: int = 0


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Pools in order of their group ids (the group of layer 0 first), and the context in tokens."""

    pools: tuple[PoolSpec, ...]
    context_length: int

    @property
    def total_kv_blocks(self) -> int:
        """Blocks of the global group; of the widest window where no layer is global."""
        widest = max(self.pools, key=lambda pool: pool.group.window_size or 1 << 62)
        return widest.num_blocks

    def memory(self, rule: str, step_tokens: int, max_requests: int) -> Memory:
        """What readers of the events are given. Manager V2 has one pool for all pages of one size."""
        alike: dict[int, list[PoolSpec]] = {}
        for pool in self.pools:
            alike.setdefault(pool.layers if rule == TRTLLM_V2 else pool.group.group_id, []).append(pool)
        pools = (
            Pool(
                tuple(each.group.group_id for each in members),
                sum(each.num_blocks for each in members),
                sum(each.host_blocks for each in members),
            )
            for members in alike.values()
        )
        order = TRTLLM_V2 if rule == TRTLLM_V2 else TRTLLM_V1
        return Memory(tuple(pools), order, step_tokens, max_requests)


def plan_cache(options: EngineOptions, shape: ModelShape) -> CachePlan:
    """Cache groups and their pools.

    :raises ConfigError: a window smaller than the model's, a context longer than the model's, or a memory
        bound too small for one request.
    """
    context = _context(options, shape)
    cache_windows = _cache_windows(options, shape, context)
    members: dict[int | None, list[int | None]] = {}
    for model_window, window in cache_windows.items():
        members.setdefault(window, []).append(model_window)
    layers = {w: sum(shape.windows.count(m) for m in inside) for w, inside in members.items()}
    sizes = _pool_sizes(options, layers, shape.bytes_per_token, context)
    host = _host_sizes(options, layers, shape.bytes_per_token, sizes)
    block_size = options.tokens_per_block
    pools = tuple(
        PoolSpec(
            CacheGroup(i, window, block_size), tuple(inside), sizes[window], layers[window], host[window]
        )
        for i, (window, inside) in enumerate(members.items())
    )
    return CachePlan(pools, context)


def _context(options: EngineOptions, shape: ModelShape) -> int:
    wanted = options.max_seq_len
    if wanted is None:
        return shape.context_length
    if wanted > shape.context_length:
        raise ConfigError(
            f"max_seq_len: expected at most the model's context of {shape.context_length} tokens, "
            f"got {wanted} (in {options.source})"
        )
    return wanted


def _cache_windows(options: EngineOptions, shape: ModelShape, context: int) -> dict[int | None, int | None]:
    """Each window of the model, in order of its first layer -> what the cache keeps for it (None: all)."""
    pattern = options.max_attention_window
    windows: dict[int | None, int | None] = {}
    for layer, model_window in enumerate(shape.windows):
        size = model_window if pattern is None else pattern[layer % len(pattern)]
        needed = context if model_window is None else min(model_window, context)
        cached = context if size is None else size
        kind = "global attention" if model_window is None else f"a window of {model_window} tokens"
        if cached < needed:
            raise _window_error(
                options,
                f"layer {layer} of the model has {kind} and needs at least {needed} tokens, got {size}; a "
                "smaller window gives wrong answers: raise it, or leave max_attention_window out for the "
                "model's own windows",
            )
        window = None if cached >= context else cached
        if windows.setdefault(model_window, window) != window:
            raise _window_error(
                options,
                f"expected one window for all layers with {kind}, got another for layer {layer}: {size}",
            )
    return windows


def _window_error(options: EngineOptions, message: str) -> ConfigError:
    return ConfigError(f"kv_cache_config.max_attention_window: {message} (in {options.source})")


def _pool_sizes(
    options: EngineOptions, layers: dict[int | None, int], bytes_per_token: int, context: int
) -> dict[int | None, int]:
    """Blocks per window. ``layers``: window of the cache -> how many layers keep their blocks there."""
    _check_named("kv_blocks", options.kv_blocks, layers, options.source)
    block = options.tokens_per_block
    configured = dict(options.kv_blocks)
    if options.sliding_blocks is not None:
        configured |= dict.fromkeys((w for w in layers if w is not None), options.sliding_blocks)
    running = {w: _running_blocks(w, options, context) for w in layers}
    per_request = (
        running if options.reuse_rule == RULES[0] else dict.fromkeys(layers, _blocks(context, block))
    )
    global_blocks = configured.get(None, _blocks(options.max_tokens or 4 * context, block))
    sizes: dict[int | None, int] = {}
    for window in layers:
        rule = global_blocks
        if window is not None:
            rule = max(options.max_batch_size * running[window], global_blocks // 2, per_request[window])
        sizes[window] = configured.get(window, rule)
    if options.max_tokens is None:
        free = [window for window in layers if window not in configured]
        block_bytes = {w: count * bytes_per_token * block for w, count in layers.items()}
        _shrink(sizes, free, per_request, block_bytes, options)
    return sizes


def _host_sizes(
    options: EngineOptions,
    layers: dict[int | None, int],
    bytes_per_token: int,
    sizes: dict[int | None, int],
) -> dict[int | None, int]:
    """Blocks of the host tier per window."""
    _check_named("host_blocks", options.host_blocks, layers, options.source)
    device = sum(sizes[w] * layers[w] for w in layers) * bytes_per_token * options.tokens_per_block
    share = options.host_cache_size / device
    return {window: options.host_blocks.get(window, int(sizes[window] * share)) for window in layers}


def _shrink(
    sizes: dict[int | None, int],
    free: Sequence[int | None],
    per_request: dict[int | None, int],
    block_bytes: dict[int | None, int],
    options: EngineOptions,
) -> None:
    """Bring the ``free`` pools below the memory bound together with the others."""
    budget = options.kv_memory_mb * _MIB - sum(sizes[w] * block_bytes[w] for w in sizes if w not in free)
    wanted = sum(sizes[w] * block_bytes[w] for w in free)
    floor = sum(per_request[w] * block_bytes[w] for w in free)
    if not free or wanted <= budget:
        return
    if floor > budget:
        raise ConfigError(
            f"gemma3_cpu.kv_memory_mb: one request of max_seq_len tokens needs {-(-floor // _MIB)} MiB of KV "
            f"cache, {max(budget, 0) // _MIB} MiB are left of {options.kv_memory_mb} (in {options.source}); "
            "raise it, lower max_seq_len, or give the pool sizes in gemma3_cpu.kv_blocks"
        )
    # Above the floor everything shrinks by one factor; the floor itself is never touched.
    share = (budget - floor) / (wanted - floor)
    for window in free:
        spare = max(sizes[window] - per_request[window], 0)
        sizes[window] = per_request[window] + int(spare * share)


def _running_blocks(window: int | None, options: EngineOptions, context: int) -> int:
    """Blocks that one request holds at most: all of the context, or its window, one chunk and the edges."""
    group = GroupSpec(0, window, 0)
    return group.most_held(context, options.tokens_per_block, options.max_chunk_tokens)


def _check_named(
    option: str, named: Iterable[int | None], windows: Iterable[int | None], source: str
) -> None:
    windows = list(windows)
    for window in named:
        if window not in windows:
            known = ", ".join("global" if w is None else str(w) for w in windows)
            raise ConfigError(
                f"gemma3_cpu.{option}.{'global' if window is None else window}: expected a window of this "
                f"model's cache, known: {known} (in {source})"
            )


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
