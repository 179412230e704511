"""Keys of other tools and releases in an extra-engine-args file, each with what to write in it instead."""

from __future__ import annotations

from collections.abc import Collection, Mapping

_OTHER_NAMES = {
    # sections of former releases of TensorRT-LLM
    "build_config": "write max_batch_size, max_num_tokens, max_seq_len and so on at the top level",
    "pytorch_backend_config": "its options are at the top level of the file now: cuda_graph_config for CUDA "
    "graphs, kv_cache_config.dtype for kv_cache_dtype",
    # options of former releases
    "cuda_graph_padding_enabled": "write cuda_graph_config.enable_padding",
    "cuda_graph_batch_sizes": "write cuda_graph_config.batch_sizes",
    "cuda_graph_max_batch_size": "write cuda_graph_config.max_batch_size",
    "kv_cache_dtype": "write kv_cache_config.dtype",
    "enable_overlap_scheduler": "write disable_overlap_scheduler, with the opposite value",
    # trtllm-serve disaggregated
    "context_servers": "it lists the servers of trtllm-serve; here each worker is started with --mode "
    "prefill, or all of them with `vswa launch disagg`",
    "generation_servers": "it lists the servers of trtllm-serve; here each worker is started with --mode "
    "decode, or all of them with `vswa launch disagg`",
    # options of the command line
    "model": "write --model-path on the command line of the worker",
    "model_path": "write --model-path on the command line of the worker",
    "served_model_name": "write --served-model-name on the command line of the worker",
    # vLLM
    "block_size": "write kv_cache_config.tokens_per_block",
    "enable_prefix_caching": "write kv_cache_config.enable_block_reuse",
    "gpu_memory_utilization": "write kv_cache_config.free_gpu_memory_fraction, the share of the memory that "
    "the model leaves",
    "max_model_len": "write max_seq_len",
    "max_num_batched_tokens": "write max_num_tokens",
    "max_num_seqs": "write max_batch_size",
    # SGLang
    "context_length": "write max_seq_len",
    "max_running_requests": "write max_batch_size",
    "mem_fraction_static": "write kv_cache_config.free_gpu_memory_fraction, the share of the memory that the "
    "model leaves",
    "page_size": "write kv_cache_config.tokens_per_block",
}
_KUBERNETES = "this is a Kubernetes object, such as a ConfigMap: give the file that stands under its data"
#: Key at the top level -> what to write instead.
ELSEWHERE: Mapping[str, str] = {
    **_OTHER_NAMES,
    **{name.replace("_", "-"): hint for name, hint in _OTHER_NAMES.items() if "_" in name},
    **dict.fromkeys(("apiVersion", "data", "kind", "metadata", "spec"), _KUBERNETES),
}


def misplaced(section: str, names: Collection[str]) -> dict[str, str]:
    """:data:`ELSEWHERE`, and the ``names`` of ``section`` for a file that has them at its top level."""
    return {**{name: f"it belongs to a section: write {section}.{name}" for name in names}, **ELSEWHERE}


def indented(names: Collection[str]) -> dict[str, str]:
    """The ``names`` of the top level for a section that has one of them."""
    return dict.fromkeys(names, "it belongs to the top level of the file, without indentation")
