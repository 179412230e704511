"""The worker's command line: what is wrong is said before any connection is tried, with what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.worker.__main__ import main
from vswa_plugin.worker.app import Worker
from vswa_plugin.worker.args import WorkerArgs, parse, with_engine_name
from vswa_plugin.worker.engine_args import load_engine_args, shipped_configs

ROOT = Path(__file__).parents[2]
STANDIN = "vswa_plugin.testing.engine"


@pytest.fixture(autouse=True)
def nothing_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that gets past the local checks fails here and not on a broker."""

    def fail(worker: Coroutine[Any, Any, int]) -> int:
        worker.close()
        raise AssertionError("local checks passed")

    monkeypatch.setattr("vswa_plugin.worker.__main__.run_on_uvloop", fail)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the worker says on standard error; it must end with exit code 2."""
    code = main(list(argv))
    said = capsys.readouterr().err

    assert code == 2, said
    return said.splitlines()[-1]


def test_a_good_command_line_gets_past_the_local_checks(model_dir: Path) -> None:
    with pytest.raises(AssertionError, match="local checks passed"):
        main(["--model-path", str(model_dir)])


def test_defaults_follow_dynamo(model_dir: Path) -> None:
    args = parse(["--model-path", str(model_dir)])

    assert str(args.endpoint) == "dynamo.backend.generate"
    assert args.nats_server == "nats://127.0.0.1:4222"
    assert args.settings.served_model_name == model_dir.name
    assert (args.settings.mode, args.settings.engine) == ("agg", "")


def test_an_engine_that_nobody_named_says_its_name(model_dir: Path) -> None:
    named, unnamed = (parse(["--model-path", str(model_dir), "--engine", name]) for name in ("mine", ""))

    def engine(name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(engine=name))

    assert with_engine_name(unnamed, engine("default")).settings.engine == "default"
    assert with_engine_name(named, engine("default")) is named
    with pytest.raises(PluginError, match="expected the default engine to say its name"):
        with_engine_name(unnamed, engine(""))


@pytest.mark.parametrize(("argv", "engine"), [((), "gemma3_cpu"), (("--engine", "standin"), "standin")])
def test_a_worker_runs_the_engine_that_was_named_or_the_default_one(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], engine: str
) -> None:
    started: list[WorkerArgs] = []

    class Seen(Worker):
        def __init__(self, args: WorkerArgs, *rest: Any) -> None:
            started.append(args)
            super().__init__(args, *rest)

    monkeypatch.setattr("vswa_plugin.worker.__main__.Worker", Seen)
    with pytest.raises(AssertionError, match="local checks passed"):
        main(["--model-path", str(model_dir), "--plugin", STANDIN, *argv])

    assert [args.settings.engine for args in started] == [engine]


@pytest.mark.parametrize(
    ("mode", "endpoint"),
    [
        ("agg", "dynamo.backend.generate"),
        ("prefill", "dynamo.prefill.generate"),
        ("decode", "dynamo.backend.generate"),
    ],
)
def test_each_mode_has_its_endpoint_unless_told_otherwise(model_dir: Path, mode: str, endpoint: str) -> None:
    argv = ["--model-path", str(model_dir), "--mode", mode]

    assert str(parse(argv).endpoint) == endpoint
    assert str(parse([*argv, "--endpoint", "dyn://a.b.c"]).endpoint) == "a.b.c"


@pytest.mark.parametrize(
    ("option", "environ", "visible", "reason"),
    [
        (None, {}, True, "no VSWA_ROUTER"),
        (None, {"VSWA_ROUTER": "stock"}, True, "VSWA_ROUTER=stock"),
        (None, {"VSWA_ROUTER": "exact"}, False, "VSWA_ROUTER=exact, its router shows the model"),
        ("auto", {"VSWA_ROUTER": "exact", "VSWA_REGISTER": "frontend"}, False, "VSWA_ROUTER=exact, its"),
        ("frontend", {"VSWA_ROUTER": "exact"}, True, "--register frontend"),
        ("hidden", {}, False, "--register hidden"),
        (None, {"VSWA_REGISTER": "hidden"}, False, "--register hidden"),
    ],
)
def test_frontends_see_a_worker_unless_it_is_told_otherwise_or_works_behind_our_router(
    model_dir: Path, option: str | None, environ: dict[str, str], visible: bool, reason: str
) -> None:
    argv = ["--model-path", str(model_dir), *(["--register", option] if option else [])]
    found = parse(argv, environ).showing

    assert found.visible is visible
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--register", "hiden"], {}, "--register: unknown way 'hiden': did you mean 'hidden'?"),
        ([], {"VSWA_REGISTER": "no"}, "--register: unknown way 'no'"),
        ([], {"VSWA_ROUTER": "exakt"}, "VSWA_ROUTER: unknown router 'exakt': did you mean 'exact'?"),
        (["--taint", " "], {}, "--taint: expected a name, got nothing"),
        (
            ["--dyn-tool-call-parser", "herms"],
            {},
            "--dyn-tool-call-parser: unknown parser 'herms': did you mean",
        ),
        (["--dyn-reasoning-parser", "hermes"], {}, "--dyn-reasoning-parser: unknown parser 'hermes'"),
        (["--status-port", "70000"], {}, "--status-port: expected a port from 0 to 65535, got 70000"),
        (["--stall-timeout", "nan"], {}, "--stall-timeout: expected 0 seconds or more, got nan"),
    ],
)
def test_what_cannot_be_served_so_is_refused(
    model_dir: Path, argv: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(["--model-path", str(model_dir), *argv], environ)


def test_taints_are_told_once_each_in_their_order(model_dir: Path) -> None:
    argv = ["--model-path", str(model_dir), "--taint", "fast", "--taint", "eu", "--taint", "fast"]

    assert parse(argv).taints == ("fast", "eu")


def test_parsers_are_those_of_dynamos_frontend_and_none_unless_asked_for(model_dir: Path) -> None:
    asked = ["--dyn-tool-call-parser", "hermes", "--dyn-reasoning-parser", "qwen3"]
    both = [parse(["--model-path", str(model_dir), *argv]) for argv in ([], asked)]

    assert [(None, None), ("hermes", "qwen3")] == [(a.tool_call_parser, a.reasoning_parser) for a in both]


def test_ranks_are_asked_for_by_number(model_dir: Path) -> None:
    argv = ["--model-path", str(model_dir), "--data-parallel-size", "3"]

    assert parse(argv).settings.data_parallel_size == 3


@pytest.mark.parametrize("mode", ["agg", "prefill", "decode"])
def test_the_engine_config_of_each_mode_is_understood_by_the_embedded_engine(mode: str) -> None:
    from vswa_plugins.gemma3_cpu.serving.options import parse_options

    file = ROOT / "engine_configs" / "gemma3" / f"vswa_{mode}.yaml"
    options = parse_options(*load_engine_args(str(file), None))

    assert options.max_attention_window == (512, 512, 512, 512, 512, 32768)
    assert {"# Source:", "# Used:"} <= {
        line.strip()[:9].strip() for line in file.read_text().splitlines()[:9]
    }


def test_prefill_and_decode_configs_let_tensorrt_llm_keep_its_v2_cache_manager() -> None:
    folder = ROOT / "engine_configs" / "gemma3"
    prefill, decode = (
        load_engine_args(str(folder / f"vswa_{m}.yaml"), None)[0] for m in ("prefill", "decode")
    )
    transceiver = {"backend": "NIXL", "transceiver_runtime": "PYTHON", "max_tokens_in_buffer": 32768}

    assert prefill["cache_transceiver_config"] == decode["cache_transceiver_config"] == transceiver
    assert prefill["kv_cache_config"] == decode["kv_cache_config"]
    assert prefill["disable_overlap_scheduler"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "aggg"], "--mode: unknown mode 'aggg': did you mean 'agg'? Known: agg, decode, prefill"),
        (
            ["--engine", "gemma_cpu"],
            "unknown engine 'gemma_cpu': did you mean 'gemma3_cpu'? Known: gemma3_cpu",
        ),
        (["--data-parallel-size", "0"], "--data-parallel-size: expected at least 1, at most 1024, got 0"),
        (
            ["--engine", "standin", "--plugin", STANDIN, "--data-parallel-size", "2"],
            "--data-parallel-size: expected what standin can serve, 1, got 2",
        ),
        (
            ["--endpoint", "dyn://a.b"],
            "--endpoint: expected dyn://namespace.component.endpoint, got 'dyn://a.b'",
        ),
        (
            ["--endpoint", "dyn://a b.c.d"],
            "--endpoint, namespace: expected letters, digits, '-' and '_' only",
        ),
        (["--log-level", "loud"], "--log-level: unknown level 'loud'. Known: debug, error, info, warning"),
        (["--heartbeat", "0"], "--heartbeat: expected more than 0 seconds"),
        (["--no-plugin", "prometeus"], "unknown plugin 'prometeus': did you mean 'prometheus'?"),
        (
            ["--no-plugin", "gemma3_cpu"],
            "--engine: expected the name of an engine, got none, and no plugin has a default",
        ),
        (["--no-plugin", "trtllm_events"], "no plugin reads KV events of the format 'trtllm'"),
        (
            ["--extra-engine-args", "/nowhere.yaml"],
            "--extra-engine-args: expected a YAML or JSON file at /nowhere.yaml",
        ),
        (["--override-engine-args", "{"], "--override-engine-args: expected a JSON object such as"),
        (
            ["--override-engine-args", "[1]"],
            "--override-engine-args: expected a mapping of option names, got list",
        ),
        (
            ["--override-engine-args", '{"kv_cache_confg": {}}'],
            "kv_cache_confg",
        ),
        (
            ["--override-engine-args", '{"kv_cache_config": {"max_attention_window": [256, 32768]}}'],
            "256",
        ),
        (
            ["--override-engine-args", '{"kv_cache_config": {"tokens_per_block": 48}}'],
            "expected a window that is a multiple of the block size (48 tokens), got 512",
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_known(
    capsys: pytest.CaptureFixture[str], model_dir: Path, argv: list[str], message: str
) -> None:
    assert message in refused(capsys, "--model-path", str(model_dir), *argv)


def test_an_unknown_option_of_the_yaml_file_is_named_with_the_file_and_the_nearest(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text("kv_cache_config:\n  max_atention_window: [512]\n")
    said = refused(capsys, "--model-path", str(model_dir), "--extra-engine-args", str(file))

    for part in ("max_atention_window", "max_attention_window", str(file), "kv_cache_config"):
        assert part in said


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_directory_that_lacks_something_is_named_with_what_it_lacks(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path, missing: str
) -> None:
    for file in model_dir.iterdir():
        if file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    said = refused(capsys, "--model-path", str(tmp_path))

    assert str(tmp_path) in said
    assert missing.split(".")[-1] in said


def test_a_model_path_that_is_not_there_says_how_to_make_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model-path: expected a model at /nowhere" in (
        said := refused(capsys, "--model-path", "/nowhere")
    )
    assert "`vswa make-model DIR`" in said


def test_a_model_of_another_kind_is_refused_with_the_accepted_ones(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    said = refused(capsys, "--model-path", str(tmp_path))

    assert "llama" in said
    assert "gemma3_text" in said


def test_overrides_are_laid_over_the_file_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text("backend: pytorch\nkv_cache_config: {tokens_per_block: 32, max_tokens: 100}\n")
    options, source = load_engine_args(
        str(file), '{"kv_cache_config": {"max_tokens": 7}, "max_batch_size": 2}'
    )

    assert options == {
        "backend": "pytorch",
        "kv_cache_config": {"tokens_per_block": 32, "max_tokens": 7},
        "max_batch_size": 2,
    }
    assert source == f"{file} and --override-engine-args"


@pytest.mark.parametrize("text", ["- a\n- b\n", "1: 2\n", "just words\n"])
def test_a_yaml_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text(text)

    with pytest.raises(ConfigError, match="expected a mapping of option names"):
        load_engine_args(str(file), None)


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text("a: [1,\nb: 2\n")

    with pytest.raises(ConfigError, match=r"agg.yaml: expected a YAML file, got .*line 1"):
        load_engine_args(str(file), None)


def test_an_empty_yaml_file_means_no_options(tmp_path: Path) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text("# nothing yet\n")

    assert load_engine_args(str(file), None)[0] == {}


def test_help_teaches_by_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out

    assert ended.value.code == 0
    for part in (
        "vswa make-model",
        "--mode prefill",
        "--mode decode",
        "vswa_plugin.launch agg|agg_router|disagg",
        "VSWA_REGISTER",
        "python -m vswa_plugin.frontend",
        "NATS_SERVER",
        "ETCD_ENDPOINTS",
        "exit codes",
    ):
        assert part in said


def test_a_reuse_rule_goes_to_whichever_engine_it_is(tmp_path: Path) -> None:
    file = tmp_path / "agg.yaml"
    file.write_text("vswa: {reuse_rule: trtllm_v2, allow_unknown: true}\n")
    settings = parse(
        ["--model-path", str(tmp_path), "--extra-engine-args", str(file), "--reuse-rule", "trtllm_v1"]
    ).settings

    assert {"vswa": {"reuse_rule": "trtllm_v1", "allow_unknown": True}} == settings.options
    assert f"--reuse-rule and {file}" == settings.options_source


def test_an_engine_config_is_named(model_dir: Path) -> None:
    settings = parse(["--model-path", str(model_dir), "--engine-config", "gemma3/vswa_prefill"]).settings
    file = ROOT / "engine_configs" / "gemma3" / "vswa_prefill.yaml"

    assert load_engine_args(str(file), None)[0] == settings.options
    assert "gemma3/vswa_prefill" == settings.options_source


def test_a_file_replaces_single_options_of_a_named_engine_config(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("kv_cache_config: {tokens_per_block: 16}\n")
    argv = ["--model-path", str(model_dir), "--engine-config", "gemma3/vswa_agg"]
    settings = parse([*argv, "--extra-engine-args", str(file)]).settings
    named = parse(argv).settings.options["kv_cache_config"]

    assert {**named, "tokens_per_block": 16} == settings.options["kv_cache_config"]
    assert f"gemma3/vswa_agg and {file}" == settings.options_source


def test_every_engine_config_of_the_tree_can_be_named() -> None:
    files = (ROOT / "engine_configs").rglob("*.yaml")

    assert {f"{file.parent.name}/{file.stem}" for file in files} == set(shipped_configs())


def test_an_unknown_engine_config_lists_those_that_there_are(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "--model-path", str(model_dir), "--engine-config", "gemma3/vswa_ag")

    assert "--engine-config: unknown configuration 'gemma3/vswa_ag': did you mean 'gemma3/vswa_agg'?" in said
    assert "gemma3/vswa_decode_27b" in said
