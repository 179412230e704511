"""Every flag of Dynamo's own TensorRT-LLM worker, and its variables, on the worker's command line."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests import flags_page
from tests.dynamo_parser import TheirFlag, flags_of_dynamo
from vswa_plugin.errors import ConfigError
from vswa_plugin.worker.args import WorkerArgs, parse, parser
from vswa_plugin.worker.dynamo_flags import COMBINED, FLAGS, Fate, Flag, Takes, names_of

BY_NAME = {name: flag for flag in FLAGS for name in names_of(flag)}
#: A value for each flag that takes one and is not refused.
SAMPLES = {int: "2", float: "0.5", str: "some"}


def read(model_dir: Path, *argv: str, **environ: str) -> WorkerArgs:
    return parse(["--model-path", str(model_dir), *argv], environ)


@pytest.fixture(scope="module")
def theirs() -> list[TheirFlag]:
    return [
        flag for flag in flags_of_dynamo() if "--help" not in flag.names and "--version" not in flag.names
    ]


# -- against the real parser -----------------------------------------------------------------------


def test_the_table_has_every_flag_of_dynamos_parser_and_no_other(theirs: list[TheirFlag]) -> None:
    assert {name for flag in theirs for name in flag.names} == set(BY_NAME) - set(names_of(COMBINED))


def test_what_follows_a_flag_and_its_variable_are_dynamos(theirs: list[TheirFlag]) -> None:
    nargs = {Takes.VALUE: None, Takes.SWITCH: 0, Takes.SEVERAL: "*", Takes.MAYBE: "?"}
    for flag in theirs:
        ours = BY_NAME[flag.names[0]]
        assert set(flag.names) == set(names_of(ours))
        assert nargs[ours.takes] == flag.nargs, ours.name
        assert flag.env in (None, ours.env), ours.name


def test_dynamos_default_of_every_flag_is_taken(theirs: list[TheirFlag], model_dir: Path) -> None:
    """A script that writes out a default changes nothing with it."""
    for flag in theirs:
        name = flag.names[0]
        if BY_NAME[name].fate is Fate.OWN or flag.default is None:
            continue
        if isinstance(flag.default, bool):
            argv = [name if flag.default else f"--no-{name.removeprefix('--')}"]
        elif isinstance(flag.default, list):
            argv = [name, *flag.default]
        else:
            argv = [name, str(flag.default)]
        read(model_dir, *argv)


def test_every_way_to_run_a_phase_is_known(theirs: list[TheirFlag]) -> None:
    (flag,) = (flag for flag in theirs if flag.names == ["--disaggregation-mode"])

    assert {"agg", "pd", "prefill", "decode", "encode"} == set(flag.choices)


# -- the table, by itself --------------------------------------------------------------------------


def test_a_name_stands_for_one_flag() -> None:
    assert len(BY_NAME) == sum(len(names_of(flag)) for flag in FLAGS)
    assert all(flag.text for flag in FLAGS)


def test_our_own_parser_has_what_the_table_says_is_the_same() -> None:
    options = {name for action in parser()._actions for name in action.option_strings}

    assert {name for flag in FLAGS if flag.fate is Fate.OWN for name in names_of(flag)} <= options
    assert set(BY_NAME) <= options


def sample(flag: Flag) -> list[str]:
    return [flag.name] if flag.takes is Takes.SWITCH else [flag.name, SAMPLES[flag.kind]]


@pytest.mark.parametrize("flag", [each for each in FLAGS if each.fate is Fate.OPTION], ids=lambda f: f.name)
def test_a_flag_for_an_engine_option_sets_it_under_the_file(
    model_dir: Path, tmp_path: Path, flag: Flag
) -> None:
    value = flag.kind(SAMPLES[flag.kind]) if flag.kind is not bool else True
    section, _, name = flag.text.rpartition(".")
    assert flag.env is not None

    def options(*argv: str, **environ: str) -> Any:
        read_options = read(model_dir, *argv, **environ).settings.options
        return read_options[section] if section else read_options

    file = tmp_path / "args.yaml"
    file.write_text(f"{section}: {{{name}: 7}}\n" if section else f"{name}: 7\n")
    assert {name: value} == options(*sample(flag))
    assert {name: value} == options(**{flag.env: "true" if flag.kind is bool else SAMPLES[flag.kind]})
    assert {name: 7} == options(*sample(flag), "--extra-engine-args", str(file))


@pytest.mark.parametrize("flag", [each for each in FLAGS if each.fate is Fate.VARIABLE], ids=lambda f: f.name)
def test_a_flag_for_a_variable_sets_it(model_dir: Path, flag: Flag) -> None:
    expected = "true" if flag.takes is Takes.SWITCH else "some"

    assert {flag.env: expected} == read(model_dir, *sample(flag)).variables


@pytest.mark.parametrize("flag", [each for each in FLAGS if each.fate is Fate.NOTHING], ids=lambda f: f.name)
def test_a_flag_without_effect_says_so_in_one_line(model_dir: Path, flag: Flag) -> None:
    args = read(model_dir, *sample(flag))

    assert (f"{flag.name}: accepted, without effect: {flag.text}",) == args.notes
    assert ({}, {}) == (args.variables, args.settings.options)
    if flag.env is not None:
        (line,) = read(model_dir, **{flag.env: "true"}).notes
        assert line.startswith(f"{flag.env}: accepted, without effect")


@pytest.mark.parametrize("flag", [each for each in FLAGS if each.fate is Fate.REFUSED], ids=lambda f: f.name)
def test_a_flag_that_is_refused_says_what_to_use(model_dir: Path, flag: Flag) -> None:
    switch = flag.takes is Takes.SWITCH
    name = f"--no-{flag.name.removeprefix('--')}" if flag.harmless == ("true",) else flag.name
    with pytest.raises(ConfigError) as caught:
        read(model_dir, *([name] if switch else [flag.name, "something"]))
    assert str(caught.value).startswith(f"{name}: expected ")
    assert str(caught.value).endswith(f": {flag.text}")
    for value in flag.harmless:
        if not switch:
            assert () == read(model_dir, flag.name, value).notes
    if flag.env is not None:
        wrong = {"true": "false"}.get(flag.harmless[0], "true") if switch else "something"
        with pytest.raises(ConfigError, match=f"^{flag.env}: expected "):
            read(model_dir, **{flag.env: wrong})
        read(model_dir, **{flag.env: flag.harmless[0]})


# -- what they come to -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("agg", "agg"),
        ("pd", "agg"),
        ("prefill_and_decode", "agg"),
        ("prefill", "prefill"),
        ("decode", "decode"),
    ],
)
def test_dynamos_words_for_the_phases(model_dir: Path, given: str, mode: str) -> None:
    args = read(model_dir, "--disaggregation-mode", given)

    assert (mode, "prefill" if mode == "prefill" else "backend") == (
        args.settings.mode,
        args.endpoint.component,
    )
    assert mode == read(model_dir, DYN_TRTLLM_DISAGGREGATION_MODE=given).settings.mode
    assert "decode" == read(model_dir, "--mode", "decode", DYN_TRTLLM_DISAGGREGATION_MODE=given).settings.mode


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (
            ["--disaggregation-mode", "encode"],
            {},
            "--disaggregation-mode: expected one of agg, pd, .*text alone",
        ),
        ([], {"DYN_TRTLLM_DISAGGREGATION_MODE": "x"}, "DYN_TRTLLM_DISAGGREGATION_MODE: unknown mode 'x'"),
        (["--disaggregation-mode", "prefil"], {}, "unknown mode 'prefil': did you mean 'prefill'"),
        (
            ["--mode", "agg", "--disaggregation-mode", "decode"],
            {},
            "--mode: expected decode, as --disagg.*, got agg",
        ),
        (
            ["--load-format", "gms"],
            {},
            "--load-format: .*got gms: write load_format and gms_config in the file",
        ),
        (["--max-batch-size", "many"], {}, "--max-batch-size: expected a whole number, got 'many'"),
        (
            [],
            {"DYN_TRTLLM_ENABLE_ATTENTION_DP": "maybe"},
            "DYN_TRTLLM_ENABLE_ATTENTION_DP: expected true or false",
        ),
        (["--trtllm.max_seq_len"], {}, "'--trtllm.max_seq_len': expected a value behind it, got none"),
        (
            ["--trtllm.a", "1", "--trtllm.a.b", "2"],
            {},
            "'--trtllm.a.b': expected a section at 'a', got 1 there",
        ),
        (["--trtllm.a..b", "2"], {}, "expected names with a dot between them, got an empty one"),
        (
            ["--trtllm.a", "1", "--override-engine-args", "{}"],
            {},
            r"expected no --trtllm\.\* flags with it, got both",
        ),
        (
            [],
            {"DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "x"},
            "DYN_WORKER_GRACEFUL.*: expected seconds, got 'x'",
        ),
        (["--namespace", "a.b"], {}, "--namespace: expected letters, digits"),
    ],
)
def test_what_cannot_be_used_is_named(
    model_dir: Path, argv: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(model_dir, *argv, **environ)


def test_flags_with_dots_are_laid_over_the_file_as_dynamo_reads_them(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("kv_cache_config: {max_tokens: 1, tokens_per_block: 16}\n")
    argv = ["--trtllm.kv_cache_config.max_tokens", "512", "--trtllm.kv_cache_config.dtype", "fp8"]
    argv += ["--trtllm.enable_lora", "False", "--trtllm.x", "0.5", "--trtllm.y", "None"]
    options = read(model_dir, "--extra-engine-args", str(file), *argv).settings

    assert {
        "kv_cache_config": {"max_tokens": 512, "tokens_per_block": 16, "dtype": "fp8"},
        "enable_lora": False,
        "x": 0.5,
        "y": None,
    } == options.options
    assert f"{file} and --trtllm.*" == options.options_source


@pytest.mark.parametrize("flag", ["--publish-events-and-metrics", "--publish-kv-events"])
def test_events_for_dynamos_router_unless_our_router_is_in_front(model_dir: Path, flag: str) -> None:
    alone, exact = read(model_dir, flag), read(model_dir, flag, VSWA_ROUTER="exact")
    by_variable = read(model_dir, DYN_TRTLLM_PUBLISH_EVENTS_AND_METRICS="1")

    assert {"VSWA_ROUTER": "stock"} == alone.variables == by_variable.variables
    assert alone.showing.visible and not exact.showing.visible
    assert ({}, f"{flag}: without effect beside VSWA_ROUTER=exact") == (exact.variables, exact.notes[0])
    assert {} == read(model_dir, "--no-publish-kv-events").variables
    assert {} == read(model_dir, flag.replace("--", "--no-"), DYN_TRTLLM_PUBLISH_KV_EVENTS="1").variables


def test_dynamos_variables_stand_for_what_is_not_given(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"
    file.write_text("max_batch_size: 3\n")
    environ = {
        "DYN_TRTLLM_MODEL": str(model_dir),
        "DYN_TRTLLM_SERVED_MODEL_NAME": "gemma",
        "DYN_TRTLLM_EXTRA_ENGINE_ARGS": str(file),
        "DYN_TRTLLM_OVERRIDE_ENGINE_ARGS": '{"max_seq_len": 99}',
        "DYN_TOOL_CALL_PARSER": "hermes",
        "DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT": "60",
    }
    args = parse([], environ)

    assert ("gemma", {"max_batch_size": 3, "max_seq_len": 99}) == (
        args.settings.served_model_name,
        args.settings.options,
    )
    assert ("hermes", 60.0) == (args.tool_call_parser, args.drain_timeout_s)
    assert 5 == parse(["--drain-timeout", "5"], environ).drain_timeout_s
    with pytest.raises(
        ConfigError, match="--model-path: expected the directory or name of a model, got none"
    ):
        parse([], {})


def test_a_namespace_is_that_of_an_endpoint_that_is_not_given(model_dir: Path) -> None:
    suffix = {"DYN_NAMESPACE": "other", "DYN_NAMESPACE_WORKER_SUFFIX": "abc"}

    assert "mine-abc.backend.generate" == str(read(model_dir, "--namespace", "mine", **suffix).endpoint)
    assert "a.b.c" == str(read(model_dir, "--namespace", "mine", "--endpoint", "a.b.c").endpoint)


@pytest.mark.parametrize("value", ["", "-1", "nan", "x" * 100_000, "9" * 5_000, "\udcff", "{", " "])
def test_no_value_of_a_flag_or_variable_ends_in_a_traceback(model_dir: Path, value: str) -> None:
    for flag in FLAGS:
        lines = [{flag.env: value}] if flag.env else []
        given = [f"{flag.name}={value}"] if flag.takes is not Takes.SWITCH else []
        for argv, environ in ((given, {}), *(([], each) for each in lines)):
            try:
                read(model_dir, *argv, **environ)
            except ConfigError as refused:
                assert len(str(refused)) < 2_000, flag.name
            except SystemExit as refused:
                assert refused.code == 2, flag.name
    with contextlib.suppress(ConfigError):
        read(model_dir, "--trtllm.a.b", value)


def test_the_page_of_the_flags_is_made_from_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "dynamo-flags.md"

    assert flags_page.page() == page.read_text("utf-8"), "python -m tests.flags_page > docs/dynamo-flags.md"
