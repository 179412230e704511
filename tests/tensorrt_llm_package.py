"""A stand-in for the package tensorrt_llm: its names and signatures, over the embedded engine's caches.

No model computes anything: token n of an answer is made from the prompt. Cache and KV events are real, by the
rules of manager V2 or V1. :func:`install` puts it where ``import tensorrt_llm`` and package metadata find it.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vswa_plugins.gemma3_cpu.cache.spec import GroupSpec
from vswa_plugins.gemma3_cpu.cache.v1 import CacheManagerV1
from vswa_plugins.gemma3_cpu.cache.v2 import CacheManager

from tests.tensorrt_llm_options import check_options, installed
from vswa_plugin.engine.contract import RawEvent

CHUNK = 16
#: Tokens per block, and the longest sequence.
BS, CONTEXT = 4, 256


# -- names of the package --------------------------------------------------------------------------


class RequestError(RuntimeError):
    """Of one request."""


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    min_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided_decoding: Any = None
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(slots=True, kw_only=True)
class DisaggregatedParams:
    request_type: str | None = None
    first_gen_tokens: list[int] | None = None
    first_gen_log_probs: list[Any] | None = None
    first_gen_logits: list[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: list[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: int | None = None
    multimodal_embedding_handles: list[Any] | None = None
    multimodal_hashes: list[Any] | None = None


@dataclass(slots=True, kw_only=True)
class SchedulingParams:
    attention_dp_rank: int | None = None
    attention_dp_relax: bool | None = None


@dataclass(slots=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass(slots=True)
class CompletionOutput:
    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    disaggregated_params: DisaggregatedParams | None = None


def get_global_disagg_request_id(node_id: int, process_id: int = 0) -> int:
    assert 0 <= node_id < 256 and 0 <= process_id < 64
    return (1 << 41) + node_id * 64 + process_id


class RequestOutput:
    """One request; iterating computes it, one token a turn."""

    def __init__(self, llm: LLM, arguments: dict[str, Any]) -> None:
        self._llm = llm
        self.arguments = arguments
        self._prompt: list[int] = arguments["inputs"]["prompt_token_ids"]
        self._sampling: SamplingParams = arguments["sampling_params"]
        self._params: DisaggregatedParams | None = arguments.get("disaggregated_params")
        self._streaming: bool = arguments["streaming"]
        self._cache: Any = None
        self.outputs = [CompletionOutput(0)]
        self.cached_tokens = 0
        self.finished = False
        self.aborted = False

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        await asyncio.sleep(0)
        if self._llm.stall is not None:
            await self._llm.stall.wait()
        if self._llm.error is not None:
            raise self._llm.error
        if self.finished:
            raise StopAsyncIteration
        self._step()
        while not self._streaming and not self.finished:
            self._step()
        return self

    def abort(self) -> None:
        self.aborted = self.finished = True
        self._close()

    def _step(self) -> None:
        if self._cache is None:
            self._prefill()
        else:
            self._advance(1)
        output, sampling = self.outputs[0], self._sampling
        token = (self._prompt[-1] + len(output.token_ids) + 1) % 5000
        output.token_ids.append(token)
        if sampling.logprobs is not None:
            likely = {token + rank: Logprob(-0.5 - rank, rank + 1) for rank in range(sampling.logprobs)}
            output.logprobs.append(likely)
        if token in (sampling.stop_token_ids or ()) and not sampling.ignore_eos:
            output.finish_reason, output.stop_reason = "stop", token
            output.token_ids.pop()
        elif len(output.token_ids) >= sampling.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason is not None:
            self._end()

    def _prefill(self) -> None:
        scheduling = self.arguments.get("scheduling_params")
        self._manager = self._llm.managers[scheduling.attention_dp_rank if scheduling else 0]
        self._cache = self._manager.open(
            self._prompt, self._sampling.max_tokens, self.arguments.get("cache_salt")
        )
        assert self._cache is not None, "there is room"
        self.cached_tokens = self._cache.cached_tokens
        if self._params is not None and self._params.request_type == "generation_only":
            self._cache.reserve_transfer()
            self._cache.receive()
            # As the engine counts: what was transferred is cached.
            self.cached_tokens = len(self._prompt)
            self._llm.collect()
        while (rest := len(self._prompt) - self._cache.computed_tokens) > 0:
            self._advance(min(CHUNK, rest))

    def _advance(self, tokens: int) -> None:
        self._cache.reserve(self._cache.computed_tokens + tokens)
        self._cache.advance(tokens)
        self._llm.collect()

    def _end(self) -> None:
        self.finished = True
        if self._params is not None and self._params.request_type == "context_only":
            self.outputs[0].disaggregated_params = DisaggregatedParams(
                request_type="context_only",
                first_gen_tokens=list(self.outputs[0].token_ids),
                first_gen_log_probs=self.outputs[0].logprobs or None,
                first_gen_logits=[object()],
                ctx_request_id=self._llm.context_id(self._params),
                opaque_state=b"\x00where\xff",
                disagg_request_id=self._params.disagg_request_id,
            )
        self._close()

    def _close(self) -> None:
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close(self.outputs[0].token_ids)
            self._llm.collect()


class LLM:
    """As much of the constructor and the methods as a worker uses.

    :cvar kind: by whose rules the caches are kept: ``v2``, ``v1``, ``v1_contiguous``.
    :cvar blocks: of the sliding and the global pool.
    """

    kind = "v2"
    blocks = (24, 70)
    made: list[LLM] = []  # noqa: RUF012

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if "refused" in kwargs.get("model_kwargs", {}):
            raise ValueError("LLM got invalid argument: refused")
        given = {"tensor_parallel_size": tensor_parallel_size, "skip_tokenizer_init": skip_tokenizer_init}
        config = json.loads((Path(model) / "config.json").read_text())
        check_options(installed(), {**kwargs, **given}, config["architectures"][0])
        self.model, self.kwargs = model, kwargs
        self.tokenizer = None if skip_tokenizer_init else object()
        ranks = tensor_parallel_size if kwargs.get("enable_attention_dp") else 1
        self.managers = [_manager(kwargs, rank if ranks > 1 else None) for rank in range(ranks)]
        self.requests: list[RequestOutput] = []
        self.healthy = True
        self.closed = False
        self.error: Exception | None = None
        self.event_error: Exception | None = None
        self.refusal: Exception | None = None
        self.stall: asyncio.Event | None = None
        self._events: list[RawEvent] = []
        self.emitted = 0
        self.collect()
        LLM.made.append(self)

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: DisaggregatedParams | None = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: SchedulingParams | None = None,
        conversation_params: Any = None,
        cache_salt: str | None = None,
        priority: float = 0.5,
    ) -> RequestOutput:
        if self.refusal is not None:
            raise self.refusal
        if self.tokenizer is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        arguments = {key: value for key, value in locals().items() if key != "self"}
        self.requests.append(RequestOutput(self, arguments))
        return self.requests[-1]

    def get_kv_cache_events(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        if self.event_error is not None:
            raise self.event_error
        events, self._events = self._events, []
        # By way of JSON, as the engine's processes send them.
        return [json.loads(json.dumps(event)) for event in events]

    def get_kv_cache_capacity(self) -> dict[str, int]:
        return {"maxNumBlocks": self.blocks[1], "tokensPerBlock": BS, "maxNumTokens": self.blocks[1] * BS}

    def shutdown(self) -> None:
        self.closed = True

    def _check_health(self) -> bool:
        return self.healthy

    def context_id(self, params: DisaggregatedParams) -> int | None:
        """The number of a request in its first phase."""
        return params.disagg_request_id

    def collect(self) -> None:
        """What the engine does once per iteration."""
        for manager in self.managers:
            events = manager.flush_events()
            self.emitted += len(events)
            self._events += events


def _manager(kwargs: dict[str, Any], dp_rank: int | None) -> Any:
    kv = kwargs["kv_cache_config"]
    # One step of overlap needs room for one more token: a window of the whole context is then a sliding one.
    longest = kwargs["max_seq_len"] + (not kwargs.get("disable_overlap_scheduler", False))
    pattern = [min(window, longest) for window in kv.get("max_attention_window", [longest])]
    windows = dict.fromkeys(None if window == longest else window for window in pattern)
    groups = [
        GroupSpec(i, window, LLM.blocks[window != min(pattern)], layers=5 if window == min(pattern) else 1)
        for i, window in enumerate(windows)
    ]
    settings: dict[str, Any] = {
        "event_buffer_max_size": kv["event_buffer_max_size"],
        "max_chunk_tokens": CHUNK,
        "dp_rank": dp_rank,
    }
    if LLM.kind == "v2":
        return CacheManager(groups, kv.get("tokens_per_block", 32), longest, **settings)
    contiguous = LLM.kind == "v1_contiguous"
    return CacheManagerV1(groups, kv.get("tokens_per_block", 32), longest, contiguous=contiguous, **settings)


# -- the package on disk ---------------------------------------------------------------------------

_MODULES = {
    "__init__.py": "LLM, SamplingParams",
    "llmapi/__init__.py": "LLM, SamplingParams, DisaggregatedParams",
    "llmapi/disagg_utils.py": "get_global_disagg_request_id",
    "sampling_params.py": "GuidedDecodingParams",
    "scheduling_params.py": "SchedulingParams",
    "executor/__init__.py": "RequestError",
    "executor/request.py": "LoRARequest",
    "executor/result.py": "Logprob",
    "executor/utils.py": "RequestError",
}


def install(folder: Path, version: str) -> None:
    """Write the package into ``folder``."""
    for name, names in _MODULES.items():
        path = folder / "tensorrt_llm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"from tests.tensorrt_llm_package import {names}\n")
    info = folder / f"tensorrt_llm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n")
