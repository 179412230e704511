"""What is settled before TensorRT-LLM starts: package, options, windows, rule; and the files we bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from vswa_plugins.gemma3_cpu.options import parse_options as parse_for_gemma3_cpu
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine
from vswa_plugins.tensorrt_llm.model_shape import parse_shape
from vswa_plugins.tensorrt_llm.options import TrtllmOptions, parse_options
from vswa_plugins.tensorrt_llm.package import Version
from vswa_plugins.tensorrt_llm.plan import make_plan
from vswa_plugins.tensorrt_llm.rules import decide

from tests.tensorrt_llm_helpers import NIXL, OPTIONS, Installer, settings_for
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from vswa_plugin.engine import MODES
from vswa_plugin.engine_args import load_engine_args
from vswa_plugin.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "engine_configs" / "gemma3"
GEMMA = "Gemma3ForCausalLM"
NEW, RC29, STABLE = Version(1, 4, 0), Version(1, 3, 0, 29), Version(1, 2, 1)


def options_of(data: dict[str, Any], mode: str = "agg") -> TrtllmOptions:
    return parse_options(data, "args.yaml", mode)


# -- the package -----------------------------------------------------------------------------------


def test_without_the_package_the_error_says_how_to_install_it(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ConfigError, match=r"pip install 'vswa-plugin\[trtllm\]' --extra-index-url"):
        TensorRtLlmEngine(settings_for(model))


def test_a_package_that_cannot_be_imported_says_why(
    install_standin: Installer, model: Path, tmp_path: Path
) -> None:
    install_standin("1.3.0rc29")
    broken = tmp_path / "site-1.3.0rc29" / "tensorrt_llm" / "llmapi" / "__init__.py"
    broken.write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    engine = TensorRtLlmEngine(settings_for(model))

    with pytest.raises(ConfigError, match=r"cannot be imported: libcuda\.so\.1"):
        engine.start(lambda rank, events: None)


def test_versions_are_ordered_as_releases_are() -> None:
    texts = ["1.2.1", "1.3.0rc9", "1.3.0rc29.post1", "1.3.0", "1.4.0rc0", "1.4.0"]
    versions = [Version.parse(text) for text in texts]

    assert versions == sorted(versions)  # type: ignore[type-var]
    assert ["1.2.1", "1.3.0rc9", "1.3.0rc29", "1.3.0", "1.4.0rc0", "1.4.0"] == list(map(str, versions))
    assert Version.parse("main") is None


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
]


@pytest.mark.parametrize(("data", "words"), WRONG)
def test_an_option_that_cannot_be_used_is_named(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        options_of(data)

    assert "args.yaml" in str(caught.value)


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


#: Arithmetic on the published config.json of each size: layers, window, sliding layers, context.
GEMMA3 = {
    "1b": (26, 512, 22, 32768),
    "4b": (34, 1024, 29, 131072),
    "12b": (48, 1024, 40, 131072),
    "27b": (62, 1024, 52, 131072),
}


def gemma3_config(size: str) -> dict[str, Any]:
    """As published: the bigger ones are multimodal and leave out what is Gemma 3's default."""
    layers, window, _, context = GEMMA3[size]
    text = {"model_type": "gemma3_text", "num_hidden_layers": layers, "sliding_window": window}
    if size == "1b":
        return {
            **text,
            "architectures": [GEMMA],
            "max_position_embeddings": context,
            "sliding_window_pattern": 6,
        }
    return {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}


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


# -- windows ---------------------------------------------------------------------------------------


def planned(data: dict[str, Any], version: Version = RC29, size: str = "1b") -> Any:
    options, shape = options_of(data), parse_shape(gemma3_config(size), "config.json")
    return make_plan(options, shape, version, decide(options, version, shape.architecture, {}))


def windows_of(data: dict[str, Any], version: Version = RC29) -> list[int | None]:
    return [group.window_size for group in planned(data, version).groups]


def kv(**options: Any) -> dict[str, Any]:
    return {"kv_cache_config": options}


PATTERN = [512] * 5 + [32768]


def test_windows_are_clamped_to_the_longest_sequence() -> None:
    assert [512, None] == windows_of(kv(max_attention_window=PATTERN))
    assert [512, None] == windows_of({"max_seq_len": 4096, **kv(max_attention_window=PATTERN)})
    assert [None] == windows_of({"max_seq_len": 512, **kv(max_attention_window=PATTERN)})
    assert [1024, None] == windows_of(kv(max_attention_window=[1024] * 5 + [99999]))


def test_without_windows_an_old_release_keeps_one_global_pool_and_that_is_said() -> None:
    plan = planned({})

    assert [None] == [group.window_size for group in plan.groups]
    assert "max_attention_window" not in plan.llm_args["kv_cache_config"]
    assert any("one global pool" in change for change in plan.changes)


def test_without_windows_a_release_that_derives_them_is_given_the_models() -> None:
    plan = planned({}, NEW)

    assert [512, None] == [group.window_size for group in plan.groups]
    assert (PATTERN * 5)[:26] == plan.llm_args["kv_cache_config"]["max_attention_window"]


def test_the_context_is_always_said_to_the_engine() -> None:
    assert (
        131_072 == planned(kv(max_attention_window=[1024] * 5 + [131072]), size="4b").llm_args["max_seq_len"]
    )
    assert 999 == planned({"max_seq_len": 999}).llm_args["max_seq_len"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            kv(max_attention_window=[256] * 5 + [32768]),
            "layer 0 .* a window of 512 tokens and needs at least 512",
        ),
        (
            kv(max_attention_window=[512]),
            "layer 5 of the model has global attention and needs at least 32768",
        ),
        ({"max_seq_len": 32769}, "expected at most the model's context of 32768 tokens, got 32769"),
    ],
)
def test_windows_and_contexts_that_give_wrong_answers_are_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(data)


def test_a_block_size_that_does_not_divide_the_window_is_refused(standin: None, model: Path) -> None:
    options = {"kv_cache_config": {**OPTIONS["kv_cache_config"], "tokens_per_block": 3}}

    with pytest.raises(ConfigError, match=r"multiple of the block size \(3 tokens\), got 8"):
        TensorRtLlmEngine(settings_for(model, options))


# -- the rule --------------------------------------------------------------------------------------

UCX = {"cache_transceiver_config": {"backend": "UCX"}}
V1, V2 = kv(use_kv_cache_manager_v2=False), kv(use_kv_cache_manager_v2=True)
CPP = {"cache_transceiver_config": {"backend": "nixl", "transceiver_runtime": "CPP"}}
DEFAULT = {"cache_transceiver_config": {"backend": "DEFAULT"}}
RULES = [
    (RC29, GEMMA, {}, {}, "trtllm_v2"),
    (NEW, "Gemma3ForConditionalGeneration", {}, {}, "trtllm_v1"),
    (None, GEMMA, {}, {}, "trtllm_v2"),
    (NEW, "LlamaForCausalLM", {}, {}, "trtllm_v1"),
    (NEW, "LlamaForCausalLM", V2, {}, "trtllm_v2"),
    (RC29, GEMMA, V1, {}, "trtllm_v1"),
    (Version(1, 3, 0, 25), GEMMA, {}, {}, "trtllm_v1"),
    (Version(1, 3, 0, 25), GEMMA, V2, {}, "trtllm_v2"),
    (Version(1, 3, 0, 5), GEMMA, {}, {}, "trtllm_v1_contiguous"),
    (STABLE, GEMMA, {}, {}, "trtllm_v1_contiguous"),
    (RC29, GEMMA, UCX, {}, "trtllm_v1"),
    (RC29, GEMMA, NIXL, {}, "trtllm_v2"),
    (RC29, GEMMA, CPP, {}, "trtllm_v1"),
    (RC29, GEMMA, DEFAULT, {}, "trtllm_v2"),
    (RC29, GEMMA, DEFAULT, {"TRTLLM_USE_UCX_KVCACHE": "1"}, "trtllm_v1"),
    (STABLE, GEMMA, NIXL, {}, "trtllm_v1_contiguous"),
    (STABLE, GEMMA, {"vswa": {"reuse_rule": "trtllm_v2"}}, {}, "trtllm_v2"),
]


@pytest.mark.parametrize(("version", "architecture", "data", "env", "rule"), RULES)
def test_the_rule_follows_from_release_model_and_transceiver(
    version: Version | None, architecture: str, data: dict[str, Any], env: dict[str, str], rule: str
) -> None:
    decision = decide(options_of(data), version, architecture, env)

    assert rule == decision.rule
    assert decision.reasons


def test_the_reasons_are_said_in_the_log(
    standin: None, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        TensorRtLlmEngine(settings_for(model, OPTIONS | UCX, "decode"))

    assert (
        "reuse rule trtllm_v1 (KV cache manager V1): TensorRT-LLM 1.3.0rc29: V2 is the default of "
        "Gemma3ForCausalLM; the cache transceiver UCX cannot hand over V2's blocks: that takes NIXL"
    ) in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("transceiver", [UCX, CPP])
def test_a_manager_that_cannot_hand_over_its_blocks_is_refused(transceiver: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected false or 'auto', got true: the cache transceiver"):
        decide(options_of(V2 | transceiver, "decode"), RC29, GEMMA, {})


def test_an_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"vswa.reuse_rule: unknown rule 'trtllm_v3': did you mean"):
        decide(options_of({"vswa": {"reuse_rule": "trtllm_v3"}}), RC29, GEMMA, {})


# -- the files that come with us -------------------------------------------------------------------


def config_files() -> list[Path]:
    return sorted(CONFIGS.glob("*.yaml"))


def test_there_is_a_file_for_each_size_and_mode() -> None:
    sizes = {"": "1b", "_4b": "4b", "_12b": "12b", "_27b": "27b"}

    assert sorted(f"vswa_{mode}{size}.yaml" for mode in MODES for size in sizes) == [
        path.name for path in config_files()
    ]


@pytest.mark.parametrize("path", config_files(), ids=lambda path: path.stem)
def test_a_file_says_source_and_date_and_agrees_with_the_models_windows(path: Path) -> None:
    head = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    _, mode, *rest = path.stem.split("_")
    size = rest[0] if rest else "1b"
    layers, window, _, context = GEMMA3[size]
    loaded, source = load_engine_args(str(path), None)
    options = parse_options(loaded, source, mode)
    shape = parse_shape(gemma3_config(size), "config.json")
    decision = decide(options, RC29, shape.architecture, {})
    plan = make_plan(options, shape, RC29, decision)

    assert f"gemma-3-{size}-it" in head[0]
    assert {"Source", "date 2026-11-23"} <= {
        word for word in ("Source", "date 2026-11-23") if word in " ".join(head)
    }
    assert (window, None) == tuple(group.window_size for group in plan.groups)
    assert context == plan.context_length
    assert "trtllm_v2" == decision.rule
    # Layer by layer, not only as a set.
    pattern = options.max_attention_window or ()
    assert tuple(w or context for w in shape.windows) == tuple(
        pattern[i % len(pattern)] for i in range(layers)
    )
    # The embedded engine reads the same file.
    assert pattern == parse_for_gemma3_cpu(loaded, source).max_attention_window
    if mode != "agg":
        assert context <= loaded["cache_transceiver_config"]["max_tokens_in_buffer"]


def test_prefill_and_decode_files_of_one_size_have_the_same_cache() -> None:
    for size in ("", "_4b", "_12b", "_27b"):
        prefill, decode = (
            yaml.safe_load((CONFIGS / f"vswa_{mode}{size}.yaml").read_text())
            for mode in ("prefill", "decode")
        )
        for key in ("kv_cache_config", "cache_transceiver_config", "max_seq_len"):
            assert prefill.get(key) == decode.get(key)


def test_nvidias_own_transceiver_choice_means_manager_v1() -> None:
    """Dynamo's files for this guide say UCX; ours differ from them in nothing else that matters here."""
    loaded = yaml.safe_load((CONFIGS / "vswa_decode.yaml").read_text()) | UCX

    assert "trtllm_v1" == decide(options_of(loaded, "decode"), RC29, GEMMA, {}).rule
