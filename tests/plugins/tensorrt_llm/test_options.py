"""What is settled before TensorRT-LLM starts: the package, its options, the model's shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine
from vswa_plugins.tensorrt_llm.model_shape import parse_shape
from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.tensorrt_llm.rules import decide

from tests.tensorrt_llm_helpers import NIXL, OPTIONS, Installer, settings_for
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_models import GEMMA, GEMMA3, RC29, STABLE, gemma3_config, options_of
from vswa_plugin.errors import ConfigError

# -- the package -----------------------------------------------------------------------------------


def test_without_the_package_the_error_says_how_to_install_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[trtllm\]' --extra-index-url"):
        TensorRtLlmEngine(settings_for(model))


@pytest.mark.parametrize(
    "raised",
    [
        "ImportError('libcuda.so.1: cannot open shared object file')",
        "RuntimeError('libcuda.so.1: CUDA driver version is insufficient')",
    ],
)
def test_a_package_that_cannot_be_imported_says_why(
    install_standin: Installer, model: Path, tmp_path: Path, raised: str
) -> None:
    install_standin("1.3.0rc29")
    broken = tmp_path / "site-1.3.0rc29" / "tensorrt_llm" / "llmapi" / "__init__.py"
    broken.write_text(f"raise {raised}")
    engine = TensorRtLlmEngine(settings_for(model))

    with pytest.raises(ConfigError, match=r"cannot be imported: libcuda\.so\.1"):
        engine.start(lambda rank, events: None)


def test_versions_are_ordered_as_releases_are() -> None:
    texts = ["1.2.1", "1.3.0rc9", "1.3.0rc29.post1", "1.3.0", "1.4.0rc0", "1.4.0", "2.0.0"]
    versions = [Version.parse(text) for text in texts]

    assert versions == sorted(versions)  # type: ignore[type-var]
    shown = ["1.2.1", "1.3.0rc9", "1.3.0rc29", "1.3.0", "1.4.0rc0", "1.4.0", "2.0.0"]
    assert shown == list(map(str, versions))
    assert [None, None, None] == list(map(Version.parse, ["main", "", "1.3"]))


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("1.3.0.rc26", "1.3.0rc26"),
        ("v1.3.0-rc26+cu130", "1.3.0rc26"),
        ("1.3.0.post1", "1.3.0"),
        ("1.3.0.dev20261101", "1.3.0rc0"),
        ("1.3.0a1", "1.3.0rc0"),
        ("1.3.0rc", "1.3.0rc0"),
    ],
)
def test_what_comes_before_a_release_is_not_taken_for_it(text: str, release: str) -> None:
    assert release == str(Version.parse(text))


# -- options ---------------------------------------------------------------------------------------

WRONG = [
    (
        {"max_batch_sizes": 1},
        r"unknown option 'max_batch_sizes' in args.yaml: did you mean 'max_batch_size'\?",
    ),
    ({"kv_cache_config": {"event_buffer": 1}}, "did you mean 'kv_cache_config.event_buffer_max_size'"),
    ({"cache_transceiver_config": {"backends": "UCX"}}, "mean 'cache_transceiver_config.backend'"),
    ({"vswa": {"reuse": "x"}}, "unknown option 'vswa.reuse'.*mean 'vswa.reuse_rule'"),
    ({"kv_cache_config": [1]}, r"kv_cache_config: expected a mapping, got \[1\]"),
    (
        {"backend": "tensorrt"},
        "backend: expected 'pytorch', the backend that gives KV events, got 'tensorrt'",
    ),
    ({"max_beam_width": 2}, "max_beam_width: expected 1, got 2"),
    ({"max_num_tokens": "8k"}, "max_num_tokens: expected an integer of at least 1, got '8k'"),
    ({"orchestrator_type": "ray"}, "orchestrator_type: expected another one"),
    ({"kv_cache_config": {"sink_token_length": 4}}, "sink_token_length: expected 0"),
    ({"kv_cache_config": {"max_attention_window": [512, 0]}}, "expected a list of positive integers"),
    ({"kv_cache_config": {"enable_block_reuse": 1}}, "enable_block_reuse: expected true or false, got 1"),
    ({"kv_cache_config": {"use_kv_cache_manager_v2": "yes"}}, "expected true or false, got 'yes'"),
    ({"cache_transceiver_config": {"backend": "TCP"}}, "expected one of DEFAULT, MOONCAKE, MPI, NIXL, UCX"),
    (
        {"kv_cache_config": {"kv_events_config": {"enable_kv_cache_events": True}}},
        "kv_events_config: expected no streaming .*the largest window only.*events are polled",
    ),
    ({"vswa": {"lora_adapters": {"a": "/a"}}}, "expected none without enable_lora or lora_config"),
    (
        {
            "enable_lora": True,
            "vswa": {"lora_adapters": {"a": "/a"}},
            "kv_cache_config": {"kv_cache_event_hash_algo": "v2_sha256"},
        },
        "kv_cache_event_hash_algo: expected 'auto' or 'v1_block_key'",
    ),
    (
        {"kv_cache_config": {"free_gpu_memory_fraction": 90}},
        "free_gpu_memory_fraction: expected a number from 0 to 1, got 90",
    ),
    (
        {"kv_cache_config": {"tokens_per_block": 48}},
        "tokens_per_block: expected a power of 2, as attn_backend TRTLLM needs, got 48",
    ),
    ({"kv_cache_config": {"max_util_for_resume": 0}}, "a number above 0 to 1, got 0"),
    (
        {"kv_cache_config": {"host_cache_size": -1}},
        "host_cache_size: expected a number of bytes of at least 0",
    ),
    ({"kv_cache_config": {"max_gpu_total_bytes": -1.0}}, "max_gpu_total_bytes: expected a number of bytes"),
    ({"kv_cache_config": {"disk_cache_size": 1}}, "disk_cache_path: expected a directory, .*, got None"),
    (
        {"kv_cache_config": {"disk_cache_size": 1, "disk_cache_path": "/dev/null"}},
        "disk_cache_path: expected a directory, .*, got '/dev/null'",
    ),
    ({"kv_cache_config": {"pool_ratio": [0.5, 0.4]}}, "pool_ratio: expected numbers above 0 whose sum is 1"),
    ({"kv_cache_config": {"pool_ratio": [1.5, -0.5]}}, "pool_ratio: expected numbers above 0 whose sum is 1"),
    (
        {"cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 20}},
        "max_tokens_in_buffer: expected whole blocks of 32 tokens .*, e.g. 32, got 20",
    ),
    (
        {
            "kv_cache_config": {"tokens_per_block": 64},
            "cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 96},
        },
        "max_tokens_in_buffer: expected whole blocks of 64 tokens .*, e.g. 64 or 128, got 96",
    ),
]


@pytest.mark.parametrize(("data", "words"), WRONG)
def test_an_option_that_cannot_be_used_is_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        options_of(data)

    assert "args.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"kv_cache_config": {"tokens_per_block": 48}, "attn_backend": "FLASHINFER"},
        {"kv_cache_config": {"tokens_per_block": 128}, "attn_backend": "trtllm"},
        {"kv_cache_config": {"free_gpu_memory_fraction": 0}},
        {"kv_cache_config": {"free_gpu_memory_fraction": 1, "max_util_for_resume": 1}},
        {"kv_cache_config": {"free_gpu_memory_fraction": "0.8"}},
        {"kv_cache_config": {"host_cache_size": 0, "disk_cache_size": 0}},
        {"kv_cache_config": {"disk_cache_size": 1, "disk_cache_path": "."}},
        {"kv_cache_config": {"pool_ratio": [0.1, 0.2, 0.7]}},
        {"cache_transceiver_config": {"backend": "UCX", "max_tokens_in_buffer": 0}},
    ],
)
def test_what_the_engine_takes_is_taken(data: dict[str, Any]) -> None:
    options_of(data)


BUFFER = {"cache_transceiver_config": {"backend": "NIXL", "max_tokens_in_buffer": 8200}}


def test_the_runtime_python_takes_a_transfer_buffer_of_any_size() -> None:
    data = BUFFER["cache_transceiver_config"] | {"transceiver_runtime": "PYTHON"}

    decide(options_of({"cache_transceiver_config": data}), RC29, GEMMA, {})


def test_a_transfer_buffer_is_checked_where_the_release_has_no_runtime_python() -> None:
    data = BUFFER["cache_transceiver_config"] | {"transceiver_runtime": "PYTHON"}
    options = options_of({"cache_transceiver_config": data})

    with pytest.raises(
        ConfigError, match=r"cache_transceiver_config.max_tokens_in_buffer: .* 8192 or 8224, got 8200"
    ):
        decide(options, STABLE, GEMMA, {})


def test_options_of_a_newer_release_pass_where_asked_for() -> None:
    data = {"novelty": 1, "kv_cache_config": {"more": 2}, "vswa": {"allow_unknown": True}}

    assert {"novelty": 1, "more": 2} == {
        key: options_of(data).llm_args.get(key) or options_of(data).llm_args["kv_cache_config"].get(key)
        for key in ("novelty", "more")
    }


def test_our_own_sections_are_not_for_the_engine() -> None:
    data = {"vswa": {"reuse_rule": "trtllm_v1"}, "gemma3_cpu": {"threads": 1}, "max_batch_size": 4}

    assert {"max_batch_size", "kv_cache_config"} == options_of(data).llm_args.keys()


def test_what_events_need_is_turned_on_and_said() -> None:
    data = {"kv_cache_config": {"enable_block_reuse": False, "event_buffer_max_size": 0}}
    options = options_of(data)

    assert {"enable_block_reuse": True, "event_buffer_max_size": 100_000} == options.llm_args[
        "kv_cache_config"
    ]
    assert 2 == len(options.changes)
    assert {"enable_block_reuse": False, "event_buffer_max_size": 0} == data["kv_cache_config"]


def test_what_is_set_is_left_alone() -> None:
    data = {**NIXL, "disable_overlap_scheduler": False, "kv_cache_config": {"event_buffer_max_size": 7}}
    options = options_of(data, "prefill")

    assert (data, ()) == (options.llm_args, options.changes)


@pytest.mark.parametrize(("workers", "said"), [(4, 1), (0, 0)])
def test_no_workers_turn_answers_into_text(workers: int, said: int) -> None:
    options = options_of(
        {"num_postprocess_workers": workers, "kv_cache_config": {"event_buffer_max_size": 1}}
    )

    assert "num_postprocess_workers" not in options.llm_args
    assert said == len(options.changes)


def test_names_of_the_transceiver_are_passed_on_as_the_engine_has_them() -> None:
    data = {"cache_transceiver_config": {"backend": "ucx", "transceiver_runtime": "cpp"}}
    options = options_of(data)

    assert {"backend": "UCX", "transceiver_runtime": "CPP"} == options.llm_args["cache_transceiver_config"]
    assert "backend = UCX" in " ".join(options.changes)
    assert "ucx" == data["cache_transceiver_config"]["backend"]
    null = {"cache_transceiver_config": {"backend": "UCX", "transceiver_runtime": None}}
    assert null["cache_transceiver_config"] == options_of(null).llm_args["cache_transceiver_config"]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_phases_apart_need_a_transceiver(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"in mode {mode}, so that.*got none.*vswa_{mode}\.yaml"):
        options_of({}, mode)


# -- the model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_directory_that_lacks_a_file_is_refused_at_once(
    standin: None, model: Path, missing: str
) -> None:
    (model / missing).unlink()

    with pytest.raises(ConfigError, match="expected"):
        TensorRtLlmEngine(settings_for(model))


def test_random_weights_need_no_files(standin: None, model: Path) -> None:
    (model / "model.safetensors").unlink()

    TensorRtLlmEngine(settings_for(model, OPTIONS | {"load_format": "dummy"}))


@pytest.mark.parametrize("size", GEMMA3)
def test_the_shape_of_each_gemma_3_is_read(size: str) -> None:
    layers, window, sliding, context = GEMMA3[size]
    shape = parse_shape(gemma3_config(size), "config.json")

    assert (layers, sliding, context) == (len(shape.windows), shape.windows.count(window), context)
    assert all((shape.windows[i] is None) == ((i + 1) % 6 == 0) for i in range(layers))


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"num_hidden_layers": 2}, (None, None)),
        ({"num_hidden_layers": 2, "sliding_window": 64, "use_sliding_window": False}, (None, None)),
        ({"num_hidden_layers": 2, "sliding_window": 64}, (64, 64)),
        (
            {
                "num_hidden_layers": 2,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (64, None),
        ),
    ],
)
def test_the_windows_of_other_models_are_read(
    config: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert windows == parse_shape(config, "config.json").windows
