"""The extra-engine-args file, checked before TensorRT-LLM sees it, and what is changed in it.

TensorRT-LLM checks its options itself, after a minute of imports and in its own words. Here the names are
checked at once, with the nearest known one; values only where events, windows or the reuse rule depend on
them, or where it would certainly not start (:mod:`.values`). A section ``vswa`` is ours and is taken out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from vswa_plugin.engine import Section
from vswa_plugin.errors import ConfigError, shown

from ..trtllm_events import indented, misplaced, option_names
from .values import check_cache, check_transfer_buffer

SECTION = "vswa"
#: The embedded engine's section of a file that serves both.
_OTHER_SECTION = "gemma3_cpu"

EVENT_BUFFER = 100_000

_TOP = option_names()
_KV = option_names("kv_cache_config")
_TRANSCEIVER = option_names("cache_transceiver_config")
_NEWER = "For an option of a newer TensorRT-LLM set vswa.allow_unknown to true"
_OWN = frozenset({"allow_unknown", "lora_adapters", "reuse_rule"})
_BACKENDS = ("DEFAULT", "MOONCAKE", "MPI", "NIXL", "UCX")
RUNTIMES = ("auto", "CPP", "PYTHON")


class TrtllmOptions(msgspec.Struct, frozen=True):
    """The options of one worker.

    :param llm_args: keyword arguments for ``LLM``, but for the model.
    :param max_attention_window: cache windows in tokens, repeating over the layers; None: not given.
    :param max_seq_len: prompt and answer together, in tokens; None: not given.
    :param manager_v2: whether KV cache manager V2 is requested; None: the engine decides.
    :param manager_given: whether the file has ``use_kv_cache_manager_v2``, whatever its value.
    :param transceiver_backend: what moves blocks between phases, upper case; None: nothing.
    :param transceiver_runtime: ``CPP``, ``PYTHON`` or ``auto``; None: not given.
    :param reuse_rule: the rule that the user gives; None: decided from version and options.
    :param lora_adapters: name that requests give -> directory of the adapter.
    :param changes: what was set in ``llm_args`` that the file does not have, each with its reason.
    """

    llm_args: dict[str, Any]
    source: str
    max_attention_window: tuple[int, ...] | None = None
    max_seq_len: int | None = None
    tokens_per_block: int = 32
    max_tokens: int | None = None
    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    chunked_prefill: bool = False
    attention_dp_ranks: int = 1
    manager_v2: bool | None = None
    manager_given: bool = False
    transceiver_backend: str | None = None
    transceiver_runtime: str | None = None
    reuse_rule: str | None = None
    lora_adapters: dict[str, str] = {}
    changes: tuple[str, ...] = ()


def parse_options(data: Mapping[str, Any], source: str, mode: str) -> TrtllmOptions:
    """Check the merged options of a worker and turn on what KV events need.

    :raises ConfigError: an unknown key, or a value that cannot be used; names the key, where it stands, and
        what was expected.
    """
    top = Section(data, source)
    kv, own = top.section("kv_cache_config"), top.section(SECTION)
    transceiver = top.section("cache_transceiver_config")
    if not own.boolean("allow_unknown", False):
        known = _TOP | {SECTION, _OTHER_SECTION}
        top.check(known, advice=_NEWER, elsewhere=misplaced("kv_cache_config", _KV - _TOP))
        kv.check(_KV, advice=_NEWER, elsewhere=indented(_TOP - _KV))
        transceiver.check(_TRANSCEIVER, advice=_NEWER)
    own.check(_OWN)
    _refuse(top, kv)
    check_cache(top, kv)
    tokens_per_block, runtime = kv.integer("tokens_per_block", 32), _runtime(transceiver)
    if runtime != "PYTHON":
        check_transfer_buffer(transceiver, tokens_per_block, ", unless it uses transceiver_runtime: PYTHON")
    args = {k: v for k, v in data.items() if k not in (SECTION, _OTHER_SECTION)}
    changes = _turn_on(args, top, kv, mode)
    backend = transceiver.choice("backend", _BACKENDS, None, any_case=True)
    changes += _as_written(args, {"backend": backend, "transceiver_runtime": runtime})
    if mode != "agg" and backend is None:
        raise ConfigError(
            f"cache_transceiver_config.backend: expected one of {', '.join(_BACKENDS)} in mode {mode}, so "
            f"that blocks can be handed over, got none (in {source}); see e.g. "
            f"engine_configs/gemma3/vswa_{mode}.yaml"
        )
    ranks = top.integer("tensor_parallel_size", 1) if top.boolean("enable_attention_dp", False) else 1
    return TrtllmOptions(
        llm_args=args,
        source=source,
        max_attention_window=kv.positive_integers(
            "max_attention_window", "(tokens), one per layer, repeating"
        ),
        max_seq_len=top.integer("max_seq_len", None),
        tokens_per_block=tokens_per_block,
        max_tokens=kv.integer("max_tokens", None),
        max_batch_size=top.integer("max_batch_size", 2048),
        max_num_tokens=top.integer("max_num_tokens", 8192),
        chunked_prefill=top.boolean("enable_chunked_prefill", False),
        attention_dp_ranks=ranks,
        manager_v2=_manager(kv),
        manager_given="use_kv_cache_manager_v2" in kv.data,
        transceiver_backend=backend,
        transceiver_runtime=runtime,
        reuse_rule=own.text("reuse_rule", None),
        lora_adapters=_lora_adapters(top, kv, own),
        changes=tuple(changes),
    )


def _refuse(top: Section, kv: Section) -> None:
    """What cannot work with per-window events, or not at all."""
    if top.data.get("backend") not in (None, "pytorch"):
        raise top.error("backend", "'pytorch', the backend that gives KV events", top.data["backend"])
    if top.integer("max_beam_width", 1) != 1:
        raise top.error("max_beam_width", "1", top.data["max_beam_width"], "sliding windows need it")
    if (orchestrator := top.data.get("orchestrator_type")) == "ray":
        raise top.error("orchestrator_type", "another one", orchestrator, "Ray's executor gives no KV events")
    if kv.integer("sink_token_length", 0, low=0):
        raise kv.error("sink_token_length", "0: no reuse rule knows sinks", kv.data["sink_token_length"])
    streaming = kv.section("kv_events_config").data
    if streaming.get("enable_kv_cache_events"):
        raise ConfigError(
            "kv_cache_config.kv_events_config: expected no streaming of KV events, got "
            f"{shown(streaming)} (in {kv.source}): the stream holds the largest window only, which does not "
            "show what the sliding layers can resume; leave it out, events are polled"
        )


def _turn_on(args: dict[str, Any], top: Section, kv: Section, mode: str) -> list[str]:
    changes: list[str] = []
    kv_args = args["kv_cache_config"] = dict(kv.data)
    if not kv.integer("event_buffer_max_size", 0, low=0):
        kv_args["event_buffer_max_size"] = EVENT_BUFFER
        changes.append(
            f"kv_cache_config.event_buffer_max_size = {EVENT_BUFFER}: without it there are no KV events"
        )
    if not kv.boolean("enable_block_reuse", True):
        kv_args["enable_block_reuse"] = True
        changes.append("kv_cache_config.enable_block_reuse = true: there is nothing to route by without it")
    if top.boolean("skip_tokenizer_init", False):
        args["skip_tokenizer_init"] = False
        changes.append("skip_tokenizer_init = false: every request would fail without the tokenizer")
    if args.pop("num_postprocess_workers", 0):
        # Dynamo's own worker takes it out too.
        changes.append("num_postprocess_workers left out: answers are turned into text by Dynamo's frontend")
    if mode == "prefill" and top.data.get("disable_overlap_scheduler") is None:
        args["disable_overlap_scheduler"] = True
        changes.append("disable_overlap_scheduler = true: a prefill worker has no next step to overlap with")
    return changes


def _as_written(args: dict[str, Any], names: Mapping[str, str | None]) -> list[str]:
    """Names of the transceiver as the engine has them, which tells ``ucx`` from ``UCX``."""
    given = args.get("cache_transceiver_config") or {}
    others = {key: name for key, name in names.items() if given.get(key) is not None and given[key] != name}
    if others:
        args["cache_transceiver_config"] = {**given, **others}
    return [
        f"cache_transceiver_config.{key} = {name}: TensorRT-LLM takes capitals alone"
        for key, name in others.items()
    ]


def _manager(kv: Section) -> bool | None:
    value = kv.data.get("use_kv_cache_manager_v2")
    return None if value == "auto" or value is None else kv.boolean("use_kv_cache_manager_v2", False)


def _runtime(transceiver: Section) -> str | None:
    """To TensorRT-LLM, ``null`` is CPP, and no entry at all its default."""
    if "transceiver_runtime" not in transceiver.data:
        return None
    return transceiver.choice("transceiver_runtime", RUNTIMES, None, any_case=True) or "CPP"


def _lora_adapters(top: Section, kv: Section, own: Section) -> dict[str, str]:
    adapters = own.section("lora_adapters").data
    if not all(isinstance(item, str) and item for pair in adapters.items() for item in pair):
        raise own.error("lora_adapters", "names and directories, e.g. {legal: /models/legal}", dict(adapters))
    if adapters and not (top.data.get("enable_lora") or top.data.get("lora_config")):
        raise own.error("lora_adapters", "none without enable_lora or lora_config", dict(adapters))
    algorithm = kv.data.get("kv_cache_event_hash_algo")
    if adapters and algorithm not in (None, "auto", "v1_block_key"):
        raise kv.error(
            "kv_cache_event_hash_algo",
            "'auto' or 'v1_block_key', by which blocks of adapters are recognised",
            algorithm,
        )
    return dict(adapters)
