"""The cache groups that vLLM makes of a model's layers. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vswa_plugin.blocks import RECURRENT, CacheGroup, CacheLayout


class Layer(NamedTuple):
    """What one layer keeps.

    :param window: attention window in tokens; None: it sees all, or is recurrent.
    :param size: bytes of a token, or of its state, on one GPU; only their ratios count.
    :param recurrent: it keeps one state.
    """

    window: int | None
    size: int = 1
    recurrent: bool = False


def cache_groups(layers: Sequence[Layer], block_size: int) -> tuple[CacheGroup, ...]:
    """The groups that vLLM makes of the layers that have a cache.

    Kinds of layers come in the order of their first layer. Each is split into groups of as many layers as the
    rarest kind has; of as many as the most frequent one has, where that is less than one and a half times
    as many.

    A block of each group has as many bytes. Where one kind has fewer bytes a token than another, and they
    divide, its blocks have more tokens; where they do not, they are filled up. Beside recurrent layers all
    blocks have so many tokens that one of attention has as many bytes as a state.

    :param block_size: tokens, as far as the layers leave the choice.
    """
    if len({layer.window for layer in layers}) == 1 and not any(layer.recurrent for layer in layers):
        return (CacheGroup(0, layers[0].window, block_size),)
    counts: dict[Layer, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    size = _tokens_beside_states(counts, block_size)
    largest = max((layer.size for layer in counts if not layer.recurrent), default=1)
    fewest, most = min(counts.values()), max(counts.values())
    together = most if 2 * most < 3 * fewest else fewest
    groups: list[CacheGroup] = []
    for layer, count in counts.items():
        tokens = size
        if not layer.recurrent and largest % layer.size == 0:
            tokens *= largest // layer.size
        kind = RECURRENT if layer.recurrent else None
        for _ in range(-(-count // together)):
            groups.append(CacheGroup(len(groups), layer.window, tokens, kind))
    return tuple(groups)


def _tokens_beside_states(layers: Sequence[Layer] | dict[Layer, int], block_size: int) -> int:
    """A multiple of ``block_size`` that has as many bytes as the largest state, at least."""
    state = max((layer.size for layer in layers if layer.recurrent), default=0)
    token = max((layer.size for layer in layers if not layer.recurrent), default=1)
    return block_size * max(1, -(-state // (block_size * token)))


def with_one_pool(layers: Sequence[Layer]) -> list[Layer]:
    """The layers where vLLM's hybrid cache manager is off: those with a window keep everything."""
    return [layer._replace(window=None) for layer in layers]


def layout_of(layers: Sequence[Layer], block_size: int, model: str) -> CacheLayout:
    """The layout of a rank that keeps them, and the rule by which vLLM resumes prompts there.

    :param model: the name under which it is served.
    """
    layout = CacheLayout(cache_groups(layers, block_size), "vllm", model)
    return layout if layout.plain else CacheLayout(layout.groups, "vllm_hybrid", model)
