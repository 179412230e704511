"""A stand-in for the package vllm: its names and signatures, over a cache that keeps every block.

No model computes anything: token n of an answer is made from the prompt. Events go by ZeroMQ, from a
publisher as vLLM's. Unlike vLLM it runs in one process. :func:`install` puts it where ``import vllm`` and
package metadata find it.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vswa_plugins.vllm.grouping import Layer, cache_groups, with_one_pool
from vswa_plugins.vllm.model import load_shape

from tests.vllm_connector import Connector, KVTransferConfig
from tests.vllm_connector import KVConnectorFactory as KVConnectorFactory
from tests.vllm_connector import StatLoggerBase as StatLoggerBase
from tests.vllm_publisher import KVEventsConfig, Publisher

#: The longest sequence.
CONTEXT = 256
_MAX_LOGPROBS = 20


class VLLMError(Exception):
    pass


class VLLMClientError(VLLMError):
    pass


class VLLMValidationError(VLLMClientError):
    pass


class GenerationError(VLLMError):
    pass


class GracefulHTTPError(VLLMError):
    pass


class EngineDeadError(VLLMError):
    pass


class EngineGenerateError(VLLMError):
    pass


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1


@dataclass(kw_only=True)
class StructuredOutputsParams:
    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        kinds = (self.json, self.regex, self.choice, self.grammar, self.json_object, self.structural_tag)
        if sum(kind is not None for kind in kinds) != 1:
            raise VLLMValidationError("You must use one kind of structured outputs constraint")


@dataclass(kw_only=True)
class SamplingParams:
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise VLLMValidationError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise VLLMValidationError("min_tokens must be less than or equal to max_tokens")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


@dataclass(kw_only=True)
class AsyncEngineArgs:
    model: str
    block_size: int | None = None
    enable_prefix_caching: bool | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    num_gpu_blocks_override: int | None = None
    data_parallel_size: int = 1
    disable_hybrid_kv_cache_manager: bool | None = None
    enable_lora: bool = False
    kv_cache_memory_bytes: int | None = None
    kv_events_config: KVEventsConfig | None = None
    kv_transfer_config: KVTransferConfig | None = None
    scheduling_policy: str = "fcfs"

    def __post_init__(self) -> None:
        if self.kv_cache_memory_bytes == 0:
            raise ValueError(
                "1 validation error for CacheConfig\nkv_cache_memory_bytes\n  should be greater than 0"
            )


@dataclass
class _Made:
    token_ids: list[int]
    logprobs: list[dict[int, Any]] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class _Output:
    outputs: list[_Made]
    num_cached_tokens: int | None
    kv_transfer_params: dict[str, Any] | None = None


class _Rank:
    """One engine core: its groups, which never lose a block, and its publisher."""

    def __init__(self, engine: AsyncLLM, rank: int) -> None:
        assert engine.args.kv_events_config is not None
        self._groups, self._size = engine.groups, engine.block_size
        self._names: set[bytes] = set()
        self.publisher = Publisher(engine.args.kv_events_config, rank)

    def admit(self, prompt: list[int], salt: str | None, *, reads: bool) -> int:
        """Cached tokens; blocks that are new are announced, once for each group."""
        names = _digests(prompt, self._size, salt)
        found = next((n for n, name in enumerate(names) if name not in self._names), len(names))
        cached = min(found, (len(prompt) - 1) // self._size) * self._size if reads else 0
        if found < len(names):
            self._names |= set(names)
            self.publisher.publish(
                [self._stored(group, prompt, names, found, salt) for group in self._groups]
            )
        return cached

    def _stored(self, group: Any, prompt: list[int], names: list[bytes], first: int, salt: str | None) -> Any:
        kind = "full_attention" if group.window_size is None else "sliding_window"
        published = [int.from_bytes(name[-8:], "big") for name in names]
        keys = [[salt] if salt and at == 0 else None for at in range(first, len(names))]
        return {
            "type": "BlockStored",
            "block_hashes": published[first:],
            "parent_block_hash": published[first - 1] if first else None,
            "token_ids": prompt[first * self._size : len(names) * self._size],
            "block_size": self._size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": keys if salt else None,
            "group_idx": group.group_id,
            "kv_cache_spec_kind": kind,
            "kv_cache_spec_sliding_window": group.window_size,
        }


def _digests(prompt: list[int], size: int, salt: str | None) -> list[bytes]:
    """Of all whole blocks; a salt is in that of the first."""
    made, parent = [], hashlib.sha256(pickle.dumps("vllm-none-hash", 5)).digest()
    for at in range(0, len(prompt) - len(prompt) % size, size):
        extra = (("cache_salt", salt),) if salt and not at else None
        parent = hashlib.sha256(pickle.dumps((parent, tuple(prompt[at : at + size]), extra), 5)).digest()
        made.append(parent)
    return made


class AsyncLLM:
    """As much of it as a worker uses.

    :cvar quirks: what the next engine does unlike its options: ``block_size``, ``hybrid_off``, ``windows``,
        ``dies``.
    :ivar errors: raised by the next requests, one each.
    :ivar step: set while requests may go on.
    """

    made: list[AsyncLLM] = []  # noqa: RUF012
    quirks: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, args: AsyncEngineArgs, stat_loggers: Sequence[Any] | None = None) -> None:
        if "dies" in self.quirks:
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        self.args = args
        self.block_size = self.quirks.get("block_size", args.block_size or 16)
        layers = list(load_shape(args.model).layers)
        if args.disable_hybrid_kv_cache_manager:
            layers = with_one_pool(layers)
        if "windows" in self.quirks:
            layers = [Layer(window) for window in self.quirks["windows"]]
        self.groups = cache_groups(layers, self.block_size)
        config = args.kv_transfer_config
        self.connector = Connector(config, self.groups, self._log) if config else None
        self.ranks = [_Rank(self, rank) for rank in range(args.data_parallel_size)]
        context = args.max_model_len or CONTEXT
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=self.block_size, num_gpu_blocks=777),
            model_config=SimpleNamespace(max_model_len=context),
            scheduler_config=SimpleNamespace(
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                async_scheduling=True,
                disable_hybrid_kv_cache_manager="hybrid_off" in self.quirks
                or bool(args.disable_hybrid_kv_cache_manager),
            ),
        )
        self.engine_core = SimpleNamespace(
            resources=SimpleNamespace(engine_manager=SimpleNamespace(processes=[]))
        )
        self.errored = self.closed = False
        self.errors: list[Exception] = []
        self.loggers = [logger(self.vllm_config, 0) for logger in stat_loggers or ()]
        self.requests: list[dict[str, Any]] = []
        self.running: dict[str, asyncio.Event] = {}
        self.dead: asyncio.Event | None = None
        self.step: asyncio.Event | None = None
        AsyncLLM.made.append(self)

    @classmethod
    def from_engine_args(
        cls, args: AsyncEngineArgs, *, stat_loggers: Sequence[Any] | None = None
    ) -> AsyncLLM:
        return cls(args, stat_loggers)

    @property
    def dead_error(self) -> Exception:
        return EngineDeadError("EngineCore encountered an issue.")

    async def generate(
        self,
        prompt: dict[str, Any],
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[_Output, None]:
        assert "token" == prompt["type"] and RequestOutputKind.DELTA is sampling_params.output_kind
        if self.errored:
            raise EngineDeadError("EngineCore encountered an issue.")
        if self.errors:
            raise self.errors.pop(0)
        if (sampling_params.logprobs or 0) > _MAX_LOGPROBS:
            raise VLLMValidationError("Requested sample logprobs greater than max allowed: 20")
        if lora_request is not None and not self.args.enable_lora:
            raise VLLMValidationError("Got lora_request but LoRA is not enabled!")
        self.requests.append({name: value for name, value in locals().items() if name != "self"})
        aborted = self.running[request_id] = asyncio.Event()
        rank = self.ranks[data_parallel_rank or 0]
        reads = not sampling_params.skip_reading_prefix_cache
        cached = rank.admit(prompt["prompt_token_ids"], prompt.get("cache_salt"), reads=reads)
        params = (sampling_params.extra_args or {}).get("kv_transfer_params")
        handed: dict[str, Any] | None = None
        try:
            if self.connector is not None and params and params.get("do_remote_prefill"):
                if not self.connector.fetch(params):
                    yield _Output([_Made([], finish_reason="error")], None)
                    return
                cached = params.get("remote_prefill_cached_tokens", cached)
            for made in self._tokens(prompt["prompt_token_ids"], sampling_params):
                await self._turn(aborted)
                if self.errored:
                    raise EngineDeadError("EngineCore encountered an issue.")
                if aborted.is_set():
                    yield _Output([_Made([], finish_reason="abort")], cached)
                    return
                if self.connector is not None and params and params.get("do_remote_decode"):
                    handed = self.connector.hold(made.finish_reason, prompt["prompt_token_ids"], cached)
                yield _Output([made], cached, handed)
        finally:
            self.running.pop(request_id, None)
            self._log()

    async def abort(self, request_id: str | list[str]) -> None:
        for each in [request_id] if isinstance(request_id, str) else request_id:
            if each in self.running:
                self.running[each].set()

    def _log(self) -> None:
        if self.connector is not None:
            for logger in self.loggers:
                logger.record(self.connector.scheduler_stats(), None, engine_idx=0)

    def shutdown(self) -> None:
        self.closed = True
        if self.connector is not None:
            self.connector.close()
        for rank in self.ranks:
            rank.publisher.close()

    async def _turn(self, aborted: asyncio.Event) -> None:
        """Until the next step, the end of the request, or that of the engine."""
        await asyncio.sleep(0)
        while self.step is not None and not (self.step.is_set() or aborted.is_set() or self.errored):
            await asyncio.sleep(0.001)

    def _tokens(self, prompt: list[int], params: SamplingParams) -> list[_Made]:
        made = []
        assert params.max_tokens is not None
        for count in range(1, params.max_tokens + 1):
            token = (prompt[-1] + count) % 1000
            logprobs = None
            if params.logprobs is not None:
                likely = range(max(1, params.logprobs))
                logprobs = [{token + at: SimpleNamespace(logprob=-0.5 - at, rank=at + 1) for at in likely}]
            made.append(_Made([token], logprobs))
            if token in (params.stop_token_ids or ()) and count >= params.min_tokens:
                made[-1].finish_reason, made[-1].stop_reason = "stop", token
                return made
        made[-1].finish_reason = "length"
        return made


_FILES = {
    "__init__.py": "",
    "engine/__init__.py": "",
    "config/__init__.py": "",
    "lora/__init__.py": "",
    "v1/__init__.py": "",
    "v1/engine/__init__.py": "",
    "config/kv_events.py": "KVEventsConfig",
    "config/kv_transfer.py": "KVTransferConfig",
    "distributed/kv_transfer/kv_connector/factory.py": "KVConnectorFactory",
    "exceptions.py": "GenerationError, GracefulHTTPError, VLLMClientError",
    "lora/request.py": "LoRARequest",
    "sampling_params.py": "RequestOutputKind, SamplingParams, StructuredOutputsParams",
    "v1/engine/async_llm.py": "AsyncLLM",
    "v1/metrics/loggers.py": "StatLoggerBase",
    "v1/engine/exceptions.py": "EngineDeadError, EngineGenerateError",
}


def _packages(inner: Path, outer: Path) -> None:
    while inner != outer:
        (inner / "__init__.py").touch()
        inner = inner.parent


def install(folder: Path, version: str, distribution: str = "vllm") -> None:
    """Write the package into ``folder``."""
    for name, names in _FILES.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from tests.vllm_package import {names}\n" if names else "")
        _packages(path.parent, folder)
    fields_ = "\n".join(f"    {name}: object = None" for name in AsyncEngineArgs.__dataclass_fields__)
    (folder / "vllm/engine/arg_utils.py").write_text(
        f"class EngineArgs:\n{fields_}\n    _private: int = 0\n\n\n"
        "class Other:\n    other: int = 0\n\n\n"
        "from tests.vllm_package import AsyncEngineArgs\n"
    )
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
