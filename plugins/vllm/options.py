"""The extra-engine-args file in vLLM's own names, checked before vLLM sees it, and what is changed in it.

vLLM checks its options itself, after half a minute of imports. Here the names are checked at once, with the
nearest known one; values only where events, cache groups or the reuse rule depend on them. A section
``vswa`` is ours and is taken out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from vswa_plugin.engine import ANY_ENGINE, Section, is_number
from vswa_plugin.errors import ConfigError

from . import sockets
from .model import Precision
from .transfer import OPTION, transfer_config

RULES = ("vllm", "vllm_hybrid")
#: vLLM's default on GPUs. The layout is declared before the engine starts, so it is always given.
BLOCK_SIZE = 16
_OWN = frozenset({"allow_unknown", "lora_adapters", "reuse_rule"})
_EVENTS = frozenset(
    {
        "buffer_steps", "enable_kv_cache_events", "endpoint", "hwm", "max_queue_size", "publisher",
        "replay_endpoint", "topic",
    }
)  # fmt: skip
_NEWER = "For an option that this list misses set vswa.allow_unknown to true"
#: Names of TensorRT-LLM's options, and of Dynamo's flags for it.
_ELSEWHERE = {
    "backend": "vLLM has no such option; leave it out",
    "cache_transceiver_config": "write kv_transfer_config",
    "enable_attention_dp": "write data_parallel_size",
    "guided_decoding_backend": "write structured_outputs_config: {backend: ...}",
    "kv_cache_config": "write block_size, gpu_memory_utilization or num_gpu_blocks_override",
    "max_batch_size": "write max_num_seqs",
    "max_num_tokens": "write max_num_batched_tokens",
    "max_seq_len": "write max_model_len",
    "moe_expert_parallel_size": "write enable_expert_parallel: true",
}
#: Given elsewhere on the worker's command line.
_GIVEN = {"model": "--model-path", "served_model_name": "--served-model-name"}
_RANKS = "this worker starts all ranks itself; write data_parallel_size"
_UNIT = "cached prefixes are counted in blocks of one size"
#: Values that may be given, and why no others.
_ONLY: Mapping[str, tuple[tuple[object, ...], str]] = {
    "data_parallel_backend": (("mp",), _RANKS),
    "data_parallel_external_lb": ((False,), _RANKS),
    "data_parallel_hybrid_lb": ((False,), _RANKS),
    "data_parallel_multi_port_external_lb": ((False,), _RANKS),
    "data_parallel_rank": ((), _RANKS),
    "data_parallel_size_local": ((), _RANKS),
    "data_parallel_start_rank": ((0,), _RANKS),
    "decode_context_parallel_size": ((1,), _UNIT),
    "enable_elastic_ep": ((False,), "the number of ranks must not change"),
    "enable_prompt_embeds": ((False,), "requests with embeddings are refused"),
    "prefill_context_parallel_size": ((1,), _UNIT),
    "prefix_match_unit": ((), _UNIT),
    "runner": (("auto", "generate"), "this worker generates text"),
    "spec_model": ((), "no reuse rule knows the cache of a draft model"),
    "swa_bounded_replay": ((False,), "no reuse rule knows it"),
}
#: Speculative decoding without a draft model: what is cached stays the same.
_DRAFTLESS = ("ngram", "ngram_gpu", "suffix")


class VllmOptions(msgspec.Struct, frozen=True):
    """The options of one worker.

    :param engine_args: keyword arguments of ``AsyncEngineArgs``, but for the model and the events.
    :param events: keyword arguments of ``KVEventsConfig``; addresses only where the user has given them.
    :param max_model_len: prompt and answer together, in tokens; None: the model's context.
    :param precision: what decides how many bytes layers keep.
    :param one_pool: whether all layers are kept as if they had global attention.
    :param lora_adapters: name that requests give -> directory of the adapter.
    :param priorities: whether vLLM orders its queue by them.
    :param transfer: keyword arguments of ``KVTransferConfig``; None: blocks are not handed over.
    :param changes: what was set in ``engine_args`` that the file does not have, each with its reason.
    """

    engine_args: dict[str, Any]
    source: str
    events: dict[str, Any]
    block_size: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    num_gpu_blocks: int | None
    ranks: int
    precision: Precision
    one_pool: bool
    lora_adapters: dict[str, str]
    priorities: bool
    max_logprobs: int | None
    transfer: dict[str, Any] | None = None
    changes: tuple[str, ...] = ()


def parse_options(
    data: Mapping[str, Any], source: str, known: Collection[str], ranks: int = 1, mode: str = "agg"
) -> VllmOptions:
    """Check the merged options of a worker and turn on what KV events need.

    :param known: option names of the installed release; empty: vLLM alone checks them.
    :param ranks: what ``--data-parallel-size`` says; 1 also where it was not given.
    :param mode: one of ``vswa_plugin.engine.MODES``.
    :raises ConfigError: an unknown key, or a value that cannot be used; names the key, where it stands, and
        what was expected.
    """
    top = Section(_underscored(data, source), source)
    own = top.section(ANY_ENGINE)
    own.check(_OWN)
    own.only("reuse_rule", RULES, "vLLM keeps its cache by these rules alone")
    for name, option in _GIVEN.items():
        if name in top.data:
            raise top.error(name, "no such option here", top.data[name], f"give {option}")
    if known and not own.boolean("allow_unknown", False):
        top.check(set(known) | {ANY_ENGINE}, advice=_NEWER, elsewhere=_ELSEWHERE)
    _refuse(top)
    given_apart = (ANY_ENGINE, "kv_events_config", OPTION)
    args = {name: value for name, value in top.data.items() if name not in given_apart}
    dp_size = _data_parallel(top, args, ranks)
    changes = _turn_on(top, args)
    return VllmOptions(
        engine_args=args,
        source=source,
        events=_events(top.section("kv_events_config"), dp_size, changes),
        block_size=args["block_size"],
        max_model_len=_context(top),
        max_num_seqs=top.integer("max_num_seqs", 256),
        max_num_batched_tokens=top.integer("max_num_batched_tokens", 2048),
        num_gpu_blocks=top.integer("num_gpu_blocks_override", None),
        ranks=dp_size,
        precision=precision_of(top),
        one_pool=top.boolean("disable_hybrid_kv_cache_manager", False)
        or top.boolean("disable_sliding_window", False),
        lora_adapters=_lora_adapters(top, own),
        priorities=top.data.get("scheduling_policy") == "priority",
        max_logprobs=top.integer("max_logprobs", 20, low=-1),
        transfer=_transfer(top, mode, changes),
        changes=tuple(changes),
    )


def _underscored(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """With names as ``AsyncEngineArgs`` has them: vLLM's own files may have those of its command line."""
    made: dict[str, Any] = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name in made:
            raise ConfigError(f"{name}: expected it once, got it as {name} and with hyphens (in {source})")
        made[name] = value
    return made


def _refuse(top: Section) -> None:
    """What cannot work with events per cache group, or not with one worker."""
    for name, (values, why) in _ONLY.items():
        top.only(name, values, why)
    method = top.section("speculative_config").data.get("method") or top.data.get("spec_method")
    drafts = method is not None or bool(top.section("speculative_config").data)
    if drafts and method not in _DRAFTLESS:
        raise top.error(
            "speculative_config",
            f"a method without a draft model ({', '.join(_DRAFTLESS)})",
            {"method": method},
            "no reuse rule knows the cache of a draft model",
        )


def _data_parallel(top: Section, args: dict[str, Any], ranks: int) -> int:
    given = top.integer("data_parallel_size", None)
    if given is not None and ranks not in (1, given):
        raise top.error("data_parallel_size", f"{ranks}, as --data-parallel-size says", given)
    size = given or ranks
    if size > 1:
        args["data_parallel_size"] = size
    return size


def _turn_on(top: Section, args: dict[str, Any]) -> list[str]:
    changes: list[str] = []
    if not top.boolean("enable_prefix_caching", True):
        changes.append("enable_prefix_caching = true: there is nothing to route by without it")
    args["enable_prefix_caching"] = True
    size = top.integer("block_size", None)
    if size is None:
        changes.append(f"block_size = {BLOCK_SIZE}: cache groups are declared before the engine starts")
    args["block_size"] = size or BLOCK_SIZE
    return changes


def _events(events: Section, ranks: int, changes: list[str]) -> dict[str, Any]:
    events.check(_EVENTS)
    events.only("publisher", ("zmq",), "events are received from it")
    if not events.boolean("enable_kv_cache_events", True):
        changes.append("kv_events_config.enable_kv_cache_events = true: routers need them")
    made: dict[str, Any] = {"enable_kv_cache_events": True, "publisher": "zmq"}
    for name, published in (("endpoint", True), ("replay_endpoint", False)):
        address = events.text(name, None)
        if address is None:
            continue
        if wrong := sockets.problem(address, ranks, published=published):
            raise events.error(name, wrong, address, "leave it out for a socket of this process alone")
        made[name] = address
    ports = [sockets.port_of(made[name]) for name in ("endpoint", "replay_endpoint") if name in made]
    if len(ports) == 2 and abs(ports[0] - ports[1]) < ranks:
        raise events.error(
            "replay_endpoint",
            f"a port at least {ranks} away from that of endpoint, because each rank adds its number",
            made["replay_endpoint"],
        )
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if (number := events.integer(name, None)) is not None:
            made[name] = number
    if (topic := events.text("topic", None)) is not None:
        made["topic"] = topic
    return made


def precision_of(top: Section) -> Precision:
    """What of the options decides how many bytes a layer keeps."""
    texts = {name: top.text(name, None) for name in Precision._fields[1:]}
    size = top.integer("tensor_parallel_size", 1)
    return Precision(size, **{name: text for name, text in texts.items() if text is not None})


def _transfer(top: Section, mode: str, changes: list[str]) -> dict[str, Any] | None:
    if mode != "agg":
        return transfer_config(top, mode, changes)
    return dict(top.section(OPTION).data) or None


def _context(top: Section) -> int | None:
    """-1 and "auto" mean what fits the memory, which is known when the engine has started."""
    given = top.data.get("max_model_len")
    if given in (-1, "auto"):
        return None
    if given is not None and not is_number(given):
        raise top.error("max_model_len", "a number of tokens", given)
    return top.integer("max_model_len", None)


def _lora_adapters(top: Section, own: Section) -> dict[str, str]:
    adapters = own.section("lora_adapters").data
    if not all(isinstance(item, str) and item for pair in adapters.items() for item in pair):
        raise own.error("lora_adapters", "names and directories, e.g. {legal: /models/legal}", dict(adapters))
    if adapters and not top.boolean("enable_lora", False):
        raise own.error("lora_adapters", "none without enable_lora: true", dict(adapters))
    return dict(adapters)
