"""The engine's options: a TensorRT-LLM extra-engine-args file, and a section of our own.

The same file serves TensorRT-LLM and this engine, so the keys of TensorRT-LLM are accepted. Those that mean
nothing on a CPU are collected in :attr:`EngineOptions.ignored`; those that would change the answers, and that
this engine does not have, are refused. A misspelt key is refused too, with the nearest known one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vswa_plugin.engine import ANY_ENGINE, Section
from vswa_plugin.errors import ConfigError

from ...trtllm_events import indented, misplaced, option_names

SECTION = "gemma3_cpu"

#: Values other than these would change answers or placement; this engine has nothing to do them with.
_ONLY_TOP: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "context_parallel_size": (1,),
    "max_beam_width": (1,),
    "enable_attention_dp": (False,),
    "enable_lora": (False,),
    "lora_config": (),
    "speculative_config": (),
    "sparse_attention_config": (),
    "kv_cache_compression_config": (),
    "encode_only": (False,),
}
_ONLY_KV: dict[str, tuple[Any, ...]] = {
    "sink_token_length": (0,),
    "use_kv_cache_manager_v2": (True, False, "auto"),
    "kv_cache_event_hash_algo": ("auto", "v1_block_key"),
}
_USED_TOP = frozenset(
    {"kv_cache_config", "max_batch_size", "max_num_tokens", "max_seq_len", SECTION, ANY_ENGINE}
)
_USED_KV = frozenset(
    {
        "enable_block_reuse",
        "enable_partial_reuse",
        "event_buffer_max_size",
        "host_cache_size",
        "max_attention_window",
        "max_tokens",
        "tokens_per_block",
    }
)
#: Options that TensorRT-LLM has and that mean nothing here.
_IGNORED_TOP = sorted((option_names() | {"model"}) - _USED_TOP - _ONLY_TOP.keys())
_IGNORED_KV = sorted(option_names("kv_cache_config") - _USED_KV - _ONLY_KV.keys())
_USED_OWN = frozenset(
    {
        "debug_step_delay_s",
        "host_blocks",
        "kv_blocks",
        "kv_memory_mb",
        "max_chunk_tokens",
        "max_queue_size",
        "reuse_rule",
        "threads",
        "transfer_host",
        "transfer_patience_s",
        "transfer_port",
        "transfer_timeout_s",
    }
)

#: Rules by which the cache can be kept; the first is the default.
RULES = ("trtllm_v2", "trtllm_v1", "trtllm_v1_contiguous")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The given options, checked as far as it can be without the model.

    :param max_batch_size: requests that run at once.
    :param max_num_tokens: tokens computed per step, of all requests.
    :param max_seq_len: prompt and answer together, in tokens; None: the model's own context.
    :param max_attention_window: cache windows in tokens, repeating over the layers; None: the model's own.
    :param tokens_per_block: block size.
    :param max_tokens: tokens that the global pool holds; None: see :mod:`.pools`.
    :param event_buffer_max_size: KV events kept between two steps; 0 turns them off.
    :param kv_blocks: pool sizes in blocks that were given, by window in tokens (None: global).
    :param sliding_blocks: pool size in blocks that was given for each sliding window alike; it goes first.
    :param kv_memory_mb: bound on the pools whose size was not given, in MiB.
    :param max_queue_size: requests that may wait.
    :param max_chunk_tokens: prompt tokens of one request computed per step.
    :param threads: of matrix products; None: see :mod:`.blas`.
    :param debug_step_delay_s: seconds that each step takes longer; for tests.
    :param enable_partial_reuse: whether part of a block is reused.
    :param host_cache_size: bytes of a host tier, split over the pools as the device's are; 0 for none, the
        default: where this engine runs the device's memory is the host's.
    :param host_blocks: pages of the host tier that were given, by window in tokens (None: global).
    :param reuse_rule: one of :data:`RULES`.
    :param transfer_host: address at which a prefill worker hands over blocks.
    :param transfer_port: its port; 0 for any.
    :param transfer_timeout_s: how long a prefill worker holds the blocks of a finished prompt, and how long a
        decode worker waits for them.
    :param transfer_patience_s: how long it holds them at least while other prompts need the blocks and the
        decode workers fetch none.
    :param ignored: dotted names of given options that mean nothing on a CPU.
    :param source: where the options came from.
    """

    max_batch_size: int = 8
    max_num_tokens: int = 1024
    max_seq_len: int | None = None
    max_attention_window: tuple[int, ...] | None = None
    tokens_per_block: int = 32
    max_tokens: int | None = None
    enable_block_reuse: bool = True
    event_buffer_max_size: int = 100_000
    kv_blocks: Mapping[int | None, int] = field(default_factory=dict)
    sliding_blocks: int | None = None
    kv_memory_mb: int = 1024
    max_queue_size: int = 64
    max_chunk_tokens: int = 512
    threads: int | None = None
    debug_step_delay_s: float = 0.0
    enable_partial_reuse: bool = True
    host_cache_size: int = 0
    host_blocks: Mapping[int | None, int] = field(default_factory=dict)
    reuse_rule: str = RULES[0]
    transfer_host: str = "127.0.0.1"
    transfer_port: int = 0
    transfer_timeout_s: float = 30.0
    transfer_patience_s: float = 2.0
    ignored: tuple[str, ...] = ()
    source: str = "no --extra-engine-args"


def parse_options(data: Mapping[str, Any], source: str = "no --extra-engine-args") -> EngineOptions:
    """Read the merged options of a worker.

    :raises ConfigError: an unknown key, or a value that cannot be used; names the key, where it stands, and
        what was expected.
    """
    top = Section(data, source)
    kv = top.section("kv_cache_config")
    own, any_engine = top.section(SECTION), top.section(ANY_ENGINE)
    any_pools = any_engine.section("kv_blocks")
    any_pools.check({"sliding", "global"})
    any_global = any_pools.integer("global", None)
    at_top, in_kv = ((*_USED_TOP, *_IGNORED_TOP), (*_USED_KV, *_IGNORED_KV))
    _check(top, _USED_TOP, _IGNORED_TOP, _ONLY_TOP, misplaced("kv_cache_config", in_kv))
    _check(kv, _USED_KV, _IGNORED_KV, _ONLY_KV, indented(at_top))
    _check(own, _USED_OWN)
    options = EngineOptions(
        max_batch_size=top.integer("max_batch_size", 8),
        max_num_tokens=top.integer("max_num_tokens", 1024),
        max_seq_len=top.integer("max_seq_len", None),
        max_attention_window=kv.positive_integers(
            "max_attention_window", "(tokens), one per layer, repeating"
        ),
        tokens_per_block=kv.integer("tokens_per_block", 32),
        max_tokens=kv.integer("max_tokens", None),
        enable_block_reuse=kv.boolean("enable_block_reuse", True),
        event_buffer_max_size=kv.integer("event_buffer_max_size", 100_000, low=0),
        kv_blocks=_pool_sizes(own.section("kv_blocks")) | ({None: any_global} if any_global else {}),
        sliding_blocks=any_pools.integer("sliding", None),
        kv_memory_mb=own.integer("kv_memory_mb", 1024),
        max_queue_size=own.integer("max_queue_size", 64),
        max_chunk_tokens=own.integer("max_chunk_tokens", 512),
        threads=own.integer("threads", None),
        debug_step_delay_s=own.seconds("debug_step_delay_s", 0.0),
        enable_partial_reuse=kv.boolean("enable_partial_reuse", True),
        host_cache_size=kv.integer("host_cache_size", 0, low=0),
        host_blocks=_pool_sizes(own.section("host_blocks"), low=0),
        reuse_rule=_reuse_rule(kv, own, any_engine),
        transfer_host=own.text("transfer_host", "127.0.0.1"),
        transfer_port=own.integer("transfer_port", 0, low=0, high=65_535),
        transfer_timeout_s=own.seconds("transfer_timeout_s", 30.0, above_zero=True),
        transfer_patience_s=own.seconds("transfer_patience_s", 2.0),
        ignored=tuple(sorted([*top.given(_IGNORED_TOP), *kv.given(_IGNORED_KV)])),
        source=source,
    )
    if options.max_num_tokens < options.max_batch_size:
        raise ConfigError(
            f"max_num_tokens: expected at least max_batch_size ({options.max_batch_size}), so that every "
            f"running request gets a token per step, got {options.max_num_tokens} (in {source})"
        )
    return options


def _check(
    section: Section,
    used: Collection[str],
    ignored: Collection[str] = (),
    only: Mapping[str, tuple[Any, ...]] = {},
    elsewhere: Mapping[str, str] = {},
) -> None:
    """Refuse unknown keys, and values that this engine has nothing for."""
    reads = f"gemma3_cpu reads {', '.join(sorted(used))}"
    section.check({*used, *ignored, *only}, otherwise=reads, with_path=False, elsewhere=elsewhere)
    for key, values in only.items():
        section.only(key, values, "gemma3_cpu has nothing else")


def _reuse_rule(kv: Section, own: Section, any_engine: Section) -> str:
    """The option for any engine, else the own one, else what the choice of a manager means."""
    by_manager = "trtllm_v1" if kv.data.get("use_kv_cache_manager_v2") is False else RULES[0]
    return any_engine.choice("reuse_rule", RULES, own.choice("reuse_rule", RULES, by_manager))


def is_number(text: str) -> bool:
    """Whether ``text`` is a whole number in ASCII digits that some cache could have of something."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _pool_sizes(section: Section, low: int = 1) -> dict[int | None, int]:
    """``kv_blocks``, ``host_blocks``: window in tokens, or ``global``, to blocks."""
    sizes: dict[int | None, int] = {}
    for key in section.data:
        text = str(key)
        if text != "global" and not is_number(text):
            raise section.error(
                str(key), "a window in tokens or 'global'", key, "write e.g. {512: 200, global: 600}"
            )
        sizes[None if text == "global" else int(text)] = section.integer(key, 0, low)
    return sizes
