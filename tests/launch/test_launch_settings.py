"""What one command for a whole deployment is asked for, and what it refuses before anything is started."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from tests.launch_helpers import STANDIN
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.__main__ import main, settings_from
from vswa_plugin.launch.settings import router_arguments, routing_environment, worker_arguments
from vswa_plugin.launch.topologies import TOPOLOGIES, Routing, add_worker_counts, find_topology, worker_counts
from vswa_plugin.router.args import parse as router_parse
from vswa_plugin.worker.args import parse as worker_parse


def test_the_guides_environment_says_what_each_kind_of_worker_gets(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
) -> None:
    environ = {"MODEL_PATH": str(model_dir), "SERVED_MODEL_NAME": "google/gemma", "VSWA_ENGINE": "standin"}
    for mode in ("agg", "prefill", "decode"):
        (tmp_path / f"{mode}.yaml").write_text("backend: pytorch\n")
        environ[f"{mode.upper()}_ENGINE_ARGS"] = str(tmp_path / f"{mode}.yaml")
    environ["DYN_HTTP_PORT"] = "8123"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    agg, _ = settings_from(["agg"], os.environ)
    disagg, _ = settings_from(["disagg", "--decode-workers", "3", "--", "--heartbeat", "2"], os.environ)

    assert (agg.model_path, agg.served_model_name) == (str(model_dir), "google/gemma")
    assert (agg.engine, agg.http_port) == ("standin", 8123)
    assert [(g.mode, g.count, g.engine_args) for g in agg.groups] == [("agg", 1, str(tmp_path / "agg.yaml"))]
    assert [(g.mode, g.count, g.engine_args) for g in disagg.groups] == [
        ("prefill", 1, str(tmp_path / "prefill.yaml")),
        ("decode", 3, str(tmp_path / "decode.yaml")),
    ]
    assert disagg.worker_options == ("--heartbeat", "2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dsagg"], "unknown topology 'dsagg': did you mean 'disagg'? Known: agg, agg_router, disagg"),
        (["agg_router", "--router", "exect"], "--router: unknown router 'exect': did you mean 'exact'?"),
        (["agg", "--router", "stock"], "--router: topology 'agg' routes by no cache, expected no router"),
        (
            ["agg", "--routers", "2"],
            "--routers: only ROUTER=exact and ROUTER=picker have routers of ours, got none",
        ),
        (
            ["agg_router", "--router", "stock", "--routers", "2"],
            "--routers: only ROUTER=exact and ROUTER=picker have routers of ours, got 'stock'",
        ),
        (["agg_router", "--router-mode", "kv"], "--router-mode: 'agg_router' has its own, got 'kv'"),
        (
            ["agg_router", "--", "--register", "frontend"],
            "--register (--register frontend): expected hidden workers behind our router",
        ),
        (
            ["agg", "--", "--register", "hidden"],
            "--register (--register hidden): expected workers that the frontend can see",
        ),
        (
            ["agg", "--model-path", "/nowhere"],
            "expected a model at /nowhere, got nothing there",
        ),
        (["agg", "--model-path", ""], "MODEL_PATH: expected the directory or name of a model, got"),
        (["disagg", "--workers", "2"], "--workers: topology 'disagg' has prefill and decode workers only"),
        (["agg", "--decode-workers", "2"], "--decode-workers: topology 'agg' has agg workers only"),
        (["agg", "--router-mode", "rnd"], "--router-mode: unknown mode 'rnd'"),
        (["agg", "--namespace", "a b"], "--namespace: expected letters, digits"),
        (["agg", "--", "--heartbeat", "0"], "--heartbeat: expected more than 0 seconds"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,
    argv: list[str],
    message: str,
) -> None:
    def begins(name: str) -> None:
        raise AssertionError(f"{name}: was not refused")

    monkeypatch.setattr("vswa_plugin.launch.__main__.open_scratch", begins)

    assert main([argv[0], "--model-path", str(model_dir), *argv[1:]]) == 2
    assert message in capsys.readouterr().err


def test_there_are_several_workers_by_default_where_one_of_them_has_to_be_chosen() -> None:
    parser = argparse.ArgumentParser()
    add_worker_counts(parser, several=2)
    counts = {name: worker_counts(parser.parse_args([]), find_topology(name)) for name in TOPOLOGIES}

    assert counts == {
        "agg": {"agg": 2},
        "agg_router": {"agg": 2},
        "disagg": {"prefill": 1, "decode": 1},
        "disagg_router": {"prefill": 2, "decode": 1},
    }


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["agg"], {}, Routing(None)),
        (["agg"], {"ROUTER": ""}, Routing(None)),
        (["agg_router"], {}, Routing("exact")),
        (["agg_router", "--routers", "3"], {}, Routing("exact", 3)),
        (["disagg_router"], {"ROUTER": "stock"}, Routing("stock")),
        (["disagg_router", "--router", "exact"], {"ROUTER": "stock"}, Routing("exact")),
    ],
)
def test_the_option_goes_before_the_environment_and_exact_is_the_default(
    model_dir: Path, argv: list[str], environ: dict[str, str], expected: Routing
) -> None:
    settings, _ = settings_from([*argv, "--model-path", str(model_dir)], environ)

    assert settings.routing == expected


def test_a_router_in_the_environment_of_a_topology_without_one_is_refused(model_dir: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^ROUTER: topology 'disagg' routes by no cache.*disagg_router has"
    ):
        settings_from(["disagg", "--model-path", str(model_dir)], {"ROUTER": "stock"})


def test_routers_are_told_what_they_must_know_as_their_workers_do(model_dir: Path) -> None:
    argv = ["agg_router", "--model-path", str(model_dir), "--served-model-name", "google/gemma", "--"]
    argv += ["--heartbeat", "0.5", "--registry", "file:/tmp/x", "--plugin", STANDIN, "--engine", "standin"]
    options = router_arguments(settings_from(argv, {})[0])
    args = router_parse(options)

    assert args.served_model_name == "google/gemma"
    assert re.fullmatch(r"dynamo\.router\.generate-google-gemma-[0-9a-f]{6}", str(args.endpoint))
    assert (args.heartbeat_s, args.registry, args.plugin) == (0.5, "file:/tmp/x", [STANDIN])


def test_workers_are_told_of_the_router_in_front_whatever_our_own_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VSWA_ROUTER", "exact")

    assert routing_environment(Routing(None)) == {"VSWA_ROUTER": ""}
    assert routing_environment(Routing("exact")) == {"VSWA_ROUTER": "exact"}
    assert routing_environment(Routing("stock")) == {"VSWA_ROUTER": "stock"}


@pytest.mark.parametrize(
    ("argv", "environ", "engine"),
    [
        ([], {}, ""),
        ([], {"VSWA_ENGINE": "standin"}, "standin"),
        (["--engine", "other"], {"VSWA_ENGINE": "standin"}, "other"),
    ],
)
def test_workers_choose_the_engine_unless_somebody_names_one(
    model_dir: Path, argv: list[str], environ: dict[str, str], engine: str
) -> None:
    settings, _ = settings_from(["agg", "--model-path", str(model_dir), *argv], environ)
    read = worker_parse(worker_arguments(settings, settings.groups[0]))

    assert (settings.engine, read.settings.engine) == (engine, engine)


def test_the_size_of_logs_is_given_in_mebibytes(model_dir: Path) -> None:
    argv = ["agg", "--model-path", str(model_dir)]

    assert settings_from(argv, {})[0].log_bytes == 64 << 20
    assert settings_from([*argv, "--log-size", "3"], {})[0].log_bytes == 3 << 20


def test_help_teaches_by_the_guides_environment(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out

    for part in ("MODEL_PATH", "PREFILL_ENGINE_ARGS", "ETCD_ENDPOINTS", "agg_router", "exit codes"):
        assert part in said


def test_engine_options_are_named_or_a_file(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"MODEL_PATH": str(model_dir), "PREFILL_ENGINE_ARGS": "gemma3/vswa_prefill"}
    environ["DECODE_ENGINE_ARGS"] = "gemma3/vswa_decode"
    monkeypatch.setenv("MODEL_PATH", str(model_dir))
    (tmp_path / "gemma3").mkdir()
    (tmp_path / "gemma3" / "vswa_decode").write_text("backend: pytorch\n")  # a file goes first
    settings, _ = settings_from(["disagg"], environ)
    prefill, decode = (worker_parse(worker_arguments(settings, group), {}) for group in settings.groups)

    assert "gemma3/vswa_prefill" == prefill.settings.options_source
    assert prefill.settings.options["disable_overlap_scheduler"]
    assert {"backend": "pytorch"} == decode.settings.options
