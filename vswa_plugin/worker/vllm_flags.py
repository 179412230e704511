"""Flags of Dynamo's vLLM worker that set engine options of the same name. Data.

``python -m dynamo.vllm`` takes vLLM's own flags. Those of deployments are here; an engine that does not know
the option refuses it by its name. Flags that both of Dynamo's workers have are in :mod:`.dynamo_flags`.
"""

from __future__ import annotations

from vswa_plugin.worker.dynamo_flags import Fate, Flag, Takes

_KINDS: dict[type, tuple[str, ...]] = {
    int: (
        "block-size", "kv-cache-memory-bytes", "max-cpu-loras", "max-logprobs", "max-lora-rank", "max-loras",
        "max-model-len", "max-num-batched-tokens", "max-num-seqs", "num-gpu-blocks-override",
        "prefix-cache-retention-interval", "seed", "stream-interval",
    ),
    float: ("cpu-offload-gb", "gpu-memory-utilization"),
    str: (
        "attention-backend", "distributed-executor-backend", "download-dir", "dtype", "generation-config",
        "kv-cache-dtype", "prefix-caching-hash-algo", "quantization", "scheduling-policy", "tokenizer",
    ),
    bool: (
        "async-scheduling", "disable-custom-all-reduce", "disable-hybrid-kv-cache-manager",
        "disable-log-stats", "disable-sliding-window", "enable-chunked-prefill", "enable-expert-parallel",
        "enable-lora", "enable-prefix-caching", "enforce-eager", "language-model-only", "trust-remote-code",
    ),
    dict: (
        "compilation-config", "hf-overrides", "kv-events-config", "kv-transfer-config",
        "override-generation-config", "speculative-config", "structured-outputs-config",
    ),
}  # fmt: skip

VLLM_FLAGS = tuple(
    Flag(
        f"--{name}",
        None,
        Takes.SWITCH if kind is bool else Takes.VALUE,
        Fate.OPTION,
        name.replace("-", "_"),
        kind=kind,
    )
    for kind, names in _KINDS.items()
    for name in names
)
