"""The cache groups of known models, and the cache of a simulated rank that serves one. Pure.

Layers, windows and heads are those of each model's public ``config.json`` (November 2026). How vLLM groups
the layers, and the tokens per block, follow from its 0.33.0: groups have equally many layers, as many as the
rarest kind has; pages of all groups have the same bytes, so that layers with half the bytes a token get
blocks of twice the tokens; and beside recurrent states, blocks of attention are at least as large as a state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from vswa_plugin.blocks.layout import CHUNKED, FULL, RECURRENT, SLIDING, CacheGroup, CacheLayout
from vswa_plugin.engine.predicted import RankSetup
from vswa_plugin.errors import ConfigError, unknown_choice

__all__ = [
    "PRESETS",
    "TRTLLM",
    "VLLM",
    "GroupShape",
    "Preset",
    "described",
    "listed_models",
    "preset_named",
    "rank_setup",
]

#: An engine with a pool for each cache group, of which the user chooses the block size.
TRTLLM = "TensorRT-LLM"
#: An engine with one pool for all cache groups, which chooses the block sizes itself.
VLLM = "vLLM"
#: Tokens per block of engines that leave them to the user, and of the blocks in which memory is counted.
DEFAULT_BLOCK_SIZE = 32
#: Prompt tokens that one step computes, by default.
_CHUNK_TOKENS = {TRTLLM: 512, VLLM: 8192}


class GroupShape(NamedTuple):
    """Cache groups that are alike.

    :param reach: window or chunk in tokens, where the kind has one.
    :param layers: in each of the groups.
    :param block_size: tokens per block; None: the user chooses.
    :param times: how many groups.
    """

    kind: str
    reach: int | None
    layers: int
    block_size: int | None = None
    times: int = 1


class Preset(msgspec.Struct, frozen=True):
    """One model as one engine serves it.

    :param engine: :data:`TRTLLM` or :data:`VLLM`.
    :param shapes: its cache groups, in order of their ids.
    :param source: where the facts are from.
    """

    model: str
    engine: str
    shapes: tuple[GroupShape, ...]
    source: str

    @property
    def own_block_sizes(self) -> bool:
        """Whether the engine chooses the block sizes."""
        return self.shapes[0].block_size is not None

    def layout(self, name: str, block_size: int | None = None) -> CacheLayout:
        """Its cache groups, and the rule by which its engine resumes a prompt.

        :param name: of the model, as it is served.
        :param block_size: tokens per block where the engine leaves that to the user.
        :raises ConfigError: the size does not fit the windows, or the engine chooses it.
        """
        if block_size is not None and self.own_block_sizes:
            sizes = " and ".join(map(str, sorted({shape.block_size or 0 for shape in self.shapes})))
            raise ConfigError(
                f"--block-size: expected none for {name}, of which {self.engine} chooses the blocks ({sizes} "
                f"tokens), got {block_size}"
            )
        groups: list[CacheGroup] = []
        for shape in self.shapes:
            size = shape.block_size or block_size or DEFAULT_BLOCK_SIZE
            for _ in range(shape.times):
                groups.append(_group(len(groups), shape, size))
        if self.engine == TRTLLM:
            _check_windows(name, groups)
            return CacheLayout(tuple(groups), "trtllm_v2", name).check()
        layout = CacheLayout(tuple(groups), "vllm", name).check()
        return layout if layout.plain else msgspec.structs.replace(layout, rule="vllm_hybrid")


def _group(group_id: int, shape: GroupShape, size: int) -> CacheGroup:
    window = shape.reach if shape.kind == SLIDING else None
    chunk = shape.reach if shape.kind == CHUNKED else None
    stated = None if shape.kind in (FULL, SLIDING) else shape.kind
    return CacheGroup(group_id, window, size, stated, chunk)


def _check_windows(name: str, groups: Iterable[CacheGroup]) -> None:
    for group in groups:
        if group.window_size is not None and group.window_size % group.block_size:
            raise ConfigError(
                f"--block-size: expected a block size that divides the windows of {name}, "
                f"got {group.block_size}"
            )


def _windows(window: int, layers: tuple[int, int], size: int | None = None) -> tuple[GroupShape, ...]:
    """A sliding group and a global one with blocks of one size."""
    return GroupShape(SLIDING, window, layers[0], size), GroupShape(FULL, None, layers[1], size)


def _states(count: int, layers: int, size: int) -> tuple[GroupShape, ...]:
    """Groups of recurrent states, and one with global attention in blocks that hold as many bytes."""
    return (
        GroupShape(RECURRENT, None, layers, size, count),
        GroupShape(FULL, None, layers, size),
    )


_HF = "https://huggingface.co/{}/blob/main/config.json"

#: The known models by the names under which they are simulated.
PRESETS = {
    "gemma-3-1b": Preset(
        "google/gemma-3-1b-it", TRTLLM, _windows(512, (22, 4)), _HF.format("google/gemma-3-1b-it")
    ),
    "gemma-3-27b": Preset(
        "google/gemma-3-27b-it", TRTLLM, _windows(1024, (52, 10)), _HF.format("google/gemma-3-27b-it")
    ),
    "gpt-oss": Preset(
        "openai/gpt-oss-20b", TRTLLM, _windows(128, (12, 12)), _HF.format("openai/gpt-oss-20b")
    ),
    # 24 layers, every second one with a window of 128; the larger one has 36.
    "gpt-oss-20b": Preset(
        "openai/gpt-oss-20b", VLLM, _windows(128, (12, 12), 16), _HF.format("openai/gpt-oss-20b")
    ),
    "gpt-oss-120b": Preset(
        "openai/gpt-oss-120b", VLLM, _windows(128, (18, 18), 16), _HF.format("openai/gpt-oss-120b")
    ),
    # 42 layers, of which the last 18 share what the others cache: 20 sliding ones (2 KV heads of 256) and 4
    # global ones (2 of 512), so a global token has twice the bytes.
    "gemma-4-e4b": Preset(
        "google/gemma-4-E4B-it",
        VLLM,
        (GroupShape(SLIDING, 512, 4, 32, 5), GroupShape(FULL, None, 4, 16)),
        _HF.format("google/gemma-4-E4B-it"),
    ),
    # 60 layers: 50 sliding ones (16 KV heads of 256) and 10 global ones (4 of 512, half the bytes a token).
    "gemma-4-31b": Preset(
        "google/gemma-4-31B-it",
        VLLM,
        (GroupShape(SLIDING, 1024, 10, 16, 5), GroupShape(FULL, None, 10, 32)),
        _HF.format("google/gemma-4-31B-it"),
    ),
    # 48 layers, every fourth one global, the others in chunks of 8,192. vLLM switches its hybrid manager off
    # for chunks unless VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1: then all keep everything.
    "llama-4-scout": Preset(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        VLLM,
        (GroupShape(FULL, None, 48, 16),),
        _HF.format("meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    ),
    "llama-4-scout-hybrid": Preset(
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        VLLM,
        (GroupShape(CHUNKED, 8192, 12, 16, 3), GroupShape(FULL, None, 12, 16)),
        _HF.format("meta-llama/Llama-4-Scout-17B-16E-Instruct"),
    ),
    # 32 layers, every fourth one global. A state: 32 value heads of 128 x 128 in float32 and a convolution,
    # 2,146,304 bytes; attention: 4 KV heads of 256, 4,096 bytes a token. vLLM prints the 528:
    # https://github.com/vllm-project/vllm/pull/37467
    "qwen3.5-9b": Preset("Qwen/Qwen3.5-9B", VLLM, _states(3, 8, 528), _HF.format("Qwen/Qwen3.5-9B")),
    # 48 layers, every fourth one global. A state in bfloat16: 1,097,728 bytes; attention 2,048 bytes a token.
    "qwen3-next-80b": Preset(
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        VLLM,
        _states(3, 12, 544),
        _HF.format("Qwen/Qwen3-Next-80B-A3B-Instruct"),
    ),
    # 27 layers: 20 linear ones, 7 with latent attention (1,152 bytes a token). A state: 32 heads of 128 x 128
    # in float32 and a convolution, 2,170,880 bytes; blocks are multiples of 128 there.
    "kimi-linear-48b": Preset(
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        VLLM,
        _states(3, 7, 1920),
        _HF.format("moonshotai/Kimi-Linear-48B-A3B-Instruct"),
    ),
    # Windows of 128 beside compressed attention, and the compressors' own windows; vLLM packs pages of
    # different sizes: https://vllm.ai/blog/deepseek-v4, `--block-size 256`.
    "deepseek-v4-flash": Preset(
        "deepseek-ai/DeepSeek-V4-Flash",
        VLLM,
        (
            GroupShape(SLIDING, 128, 15, 64, 3),
            GroupShape(FULL, None, 43, 256),
            GroupShape(SLIDING, 8, 20, 4),
            GroupShape(SLIDING, 128, 20, 8),
        ),
        _HF.format("deepseek-ai/DeepSeek-V4-Flash"),
    ),
    # 52 layers: 24 Mamba-2, 4 with attention (8 KV heads of 128), the others keep nothing. A state: 128 heads
    # of 64 x 128 in bfloat16 and a convolution, 2,158,592 bytes.
    "nemotron-h-8b": Preset(
        "nvidia/Nemotron-H-8B-Base-8K", VLLM, _states(6, 4, 528), _HF.format("nvidia/Nemotron-H-8B-Base-8K")
    ),
}


def described(name: str) -> str:
    """The cache groups of a model in a few words: count x window, chunk or kind / block size."""
    preset = preset_named(name)
    words = []
    for shape in preset.shapes:
        group = _group(0, shape, shape.block_size or DEFAULT_BLOCK_SIZE)
        count = f"{shape.times} x " if shape.times > 1 else ""
        words.append(f"{count}{group.label}" + (f" /{shape.block_size}" if shape.block_size else ""))
    return ", ".join(words)


def listed_models() -> str:
    """All models with their engines and cache groups, a line each, for help texts."""
    width = max(map(len, PRESETS))
    lines = (f"  {name:{width}}  {preset.engine}: {described(name)}" for name, preset in PRESETS.items())
    return "\n".join(lines)


def preset_named(name: str) -> Preset:
    """:raises ConfigError: there is none of that name; the known ones are listed."""
    if name not in PRESETS:
        raise ConfigError(unknown_choice("model", name, PRESETS))
    return PRESETS[name]


def rank_setup(
    name: str,
    blocks: int,
    sliding_share: float,
    block_size: int | None,
    max_seq_len: int,
    events: bool = True,
) -> RankSetup:
    """The cache of a rank that serves the model.

    Memory is counted by the groups with global attention, which have room for ``blocks`` blocks: of the
    user's size, or of 32 tokens where the engine chooses the sizes. Each other group adds ``sliding_share``
    of that room. TensorRT-LLM keeps a pool for each group, vLLM one for all.

    :param block_size: tokens per block; None: the usual ones.
    :raises ConfigError: an unknown name, or a size that does not fit the windows.
    """
    preset = preset_named(name)
    layout = preset.layout(name, block_size)
    room = blocks * (DEFAULT_BLOCK_SIZE if preset.own_block_sizes else layout.block_size)
    layers = tuple(shape.layers for shape in preset.shapes for _ in range(shape.times))
    chunk = _CHUNK_TOKENS[preset.engine]
    counts = []
    for group in layout.groups:
        tokens = room if group.kind == FULL else room * sliding_share
        count = max(1, round(tokens / group.block_size))
        if preset.engine == TRTLLM and group.window_size is not None:
            # Less than one request can need would refuse requests.
            count = max(count, math.ceil((group.window_size + chunk + group.block_size) / group.block_size))
        counts.append(count)
    return RankSetup(layout, tuple(counts), layers, max_seq_len, chunk, events)
