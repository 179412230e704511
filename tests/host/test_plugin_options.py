"""Options of plugins: where they are read, which of several counts, and which nobody takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.host_helpers import failing, plugin
from vswa_plugin.engine.options import Section
from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.host.plugin_options import given_options, sections

CODE = """
from vswa_plugin.hookspecs import hookimpl

option_variables = {{"ACME_LIMIT": "limit"}}
calls = []


@hookimpl
def vswa_options(options):
    options.check({{"limit", "folder"}})
    calls.append((options.data.get("limit"), options.text("folder", "none")))


@hookimpl
def vswa_metrics():
    calls.append("metrics")
    return "acme_limit {{}}".format(calls[0][0])
{more}
"""
Load = Callable[..., PluginHost]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the local plugins acme and acme_more and no installed one, with what a file and variables say."""

    def load(text: str | None = None, environ: Mapping[str, str] | None = None, **options: Any) -> PluginHost:
        for name in ("acme", "acme_more"):
            (tmp_path / f"{name}.py").write_text(CODE.format(more=""))
        file = None
        if text is not None:
            (tmp_path / "options.yaml").write_text(text)
            file = str(tmp_path / "options.yaml")
        local = [str(tmp_path / f"{name}.py") for name in ("acme", "acme_more")]
        return load_host(local, environ={"VSWA_PLUGINS": "", **(environ or {})}, options=file, **options)

    return load


def calls(host: PluginHost, name: str = "acme") -> list[Any]:
    return list(host._manager.get_plugin(name).calls)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text", ["acme:\n  limit: 7\n  folder: /x\n", json.dumps({"acme": {"limit": 7, "folder": "/x"}})]
)
def test_a_plugin_gets_its_own_options_of_a_yaml_or_json_file_once_and_first(load: Load, text: str) -> None:
    with load(text) as host:
        host.metrics()

        assert [(7, "/x"), "metrics"] == calls(host)
        assert [(None, "none"), "metrics"] == calls(host, "acme_more")


@pytest.mark.parametrize("text", [None, "", "acme:\n", "acme: {}\n"])
def test_a_plugin_without_options_is_called_with_none(load: Load, text: str | None) -> None:
    with load(text) as host:
        assert [(None, "none")] == calls(host)


@pytest.mark.parametrize(
    ("environ", "limit"),
    [
        ({}, 1),
        ({"ACME_LIMIT": ""}, 1),
        ({"ACME_LIMIT": "2"}, "2"),  # text, whatever it looks like
        ({"ACME_LIMIT": "2", "VSWA_PLUGIN_ACME_LIMIT": "3"}, 3),
        ({"VSWA_PLUGIN_ACME_LIMIT": "[1, 2]"}, [1, 2]),
        ({"VSWA_PLUGIN_ACME_LIMIT": "off"}, "off"),
        ({"VSWA_PLUGIN_ACME_LIMIT": ""}, 1),
    ],
)
def test_of_one_key_the_plugins_variable_counts_more_than_the_file_and_the_named_one_most(
    load: Load, environ: dict[str, str], limit: object
) -> None:
    with load("acme: {limit: 1, folder: /x}", environ) as host:
        assert [(limit, "/x")] == calls(host)


def test_a_variable_goes_to_the_plugin_with_the_longest_name_that_fits(load: Load) -> None:
    with load(None, {"VSWA_PLUGIN_ACME_MORE_FOLDER": "/x"}) as host:
        assert [(None, "none")] == calls(host)
        assert [(None, "/x")] == calls(host, "acme_more")


def test_the_file_of_the_command_line_takes_the_place_of_the_environments(load: Load, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("acme: {limit: 5, folder: /other}")
    environ = {"VSWA_PLUGIN_OPTIONS": str(tmp_path / "other.yaml")}
    with load(None, environ) as host:
        assert [(5, "/other")] == calls(host)
    with load("acme: {limit: 1}", environ) as host:
        assert [(1, "none")] == calls(host)


# -- what cannot be used -----------------------------------------------------------------------------

NOBODY = [
    ("acmee: {limit: 1}", "unknown plugin 'acmee': did you mean 'acme'?"),
    ("recorder: {directory: /x}", "plugin 'recorder' is disabled: not named in VSWA_PLUGINS"),
    ("prometheus: {}", "plugin 'prometheus' takes no options"),
]


@pytest.mark.parametrize(("text", "reason"), NOBODY)
def test_options_that_nobody_takes_are_an_error_on_the_command_line(
    load: Load, text: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        load(text, {"VSWA_PLUGINS": "prometheus"})

    assert "options.yaml" in str(caught.value)


@pytest.mark.parametrize(("text", "reason"), NOBODY)
def test_in_a_file_of_the_environment_they_are_a_warning(
    load: Load, text: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "shared.yaml"
    file.write_text(text)
    with load(None, {"VSWA_PLUGINS": "prometheus", "VSWA_PLUGIN_OPTIONS": str(file)}) as host:
        assert [(None, "none")] == calls(host)

    assert f"{file} has no effect: {reason}" in caplog.text


@pytest.mark.parametrize(
    "variable", ["VSWA_PLUGIN_ACMEE_LIMIT", "VSWA_PLUGIN_RECORDER_TOKENS", "VSWA_PLUGIN_ACME_"]
)
def test_a_variable_that_nobody_takes_is_a_warning_that_names_it(
    load: Load, variable: str, caplog: pytest.LogCaptureFixture
) -> None:
    with load(None, {variable: "x"}) as host:
        assert [(None, "none")] == calls(host)

    assert f"{variable} has no effect: " in caplog.text


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        (
            "acme: {limt: 1}",
            {},
            r"unknown option 'acme.limt' in \S+options.yaml: did you mean 'acme.limit'\?",
        ),
        (
            None,
            {"VSWA_PLUGIN_ACME_LIMT": "1"},
            "unknown option 'acme.limt' in VSWA_PLUGIN_ACME_LIMT: did you",
        ),
        ("acme: {folder: 7}", {}, r"acme.folder: expected a string, got 7 \(in \S+options.yaml\)"),
        (
            "acme: {folder: 7}",
            {"ACME_LIMIT": "1"},
            r"acme.folder: expected a string, got 7 \(in \S+options.yaml and ACME_LIMIT\)",
        ),
        ("acme: 7", {}, r"acme: expected a mapping, got 7 \(in \S+options.yaml\)"),
        ("acme: {7: 1}", {}, r"acme: expected names of options, got 7 \(in \S+options.yaml\)"),
        ("- acme", {}, "--plugin-options .*options.yaml: expected a mapping from plugin names .*, got list"),
        ("acme: [", {}, "--plugin-options: .*options.yaml: expected a YAML file, got "),
        ("[" * 5_000, {}, "--plugin-options: .*options.yaml: expected a YAML file, got "),
        (
            None,
            {"VSWA_PLUGIN_OPTIONS": "/nowhere.yaml"},
            "VSWA_PLUGIN_OPTIONS: expected a YAML or JSON file at /now",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_and_key(
    load: Load, text: str | None, environ: dict[str, str], message: str
) -> None:
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        load(text, environ)

    assert not [name for name in set(sys.modules) - before if "local_plugin" in name], "the host is closed"


@pytest.mark.parametrize("program", ["worker", "router"])
def test_a_worker_and_a_router_refuse_a_file_that_is_not_there_before_they_connect(
    program: str, model_dir: Path
) -> None:
    argv = ["--model-path", str(model_dir)] if program == "worker" else []
    command = [sys.executable, "-m", f"vswa_plugin.{program}", *argv, "--plugin-options", "/nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert 2 == done.returncode
    assert "--plugin-options: expected a YAML or JSON file at /nowhere.yaml" in done.stderr


def test_another_failure_costs_that_plugin_alone() -> None:
    seen: list[Mapping[Any, Any]] = []
    with PluginHost() as host:
        host.register(plugin(vswa_options=failing(KeyError("x"))), "a")
        host.register(plugin(vswa_options=lambda options: seen.append(options.data)), "b")
        host.options({"b": Section({"limit": 1}, "FILE")})

        assert [{"limit": 1}] == seen
        assert {("a", "vswa_options"): 1} == host.failures()


def test_variables_that_are_no_mapping_are_refused() -> None:
    with PluginHost() as host:
        wrong = plugin(vswa_options=lambda options: None)
        wrong.option_variables = ["ACME_LIMIT"]  # type: ignore[attr-defined]
        host.register(wrong, "acme")
        with pytest.raises(PluginError, match=r"'acme': expected option_variables to map .* got list"):
            host.option_variables()


def test_a_name_that_no_variable_can_have_is_written_with_underscores() -> None:
    given = given_options(None, {"VSWA_PLUGIN_ACME_METRICS_V2_LIMIT": "1"}, ["acme.metrics-v2"], {})

    assert {"limit": 1} == sections(given, {"acme.metrics-v2": ""})["acme.metrics-v2"].data


# -- what a plugin does without ------------------------------------------------------------------------


class Switched:
    """A plugin that is called only for what its options need."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @hookimpl
    def vswa_options(self, options: Section) -> Any:
        return options.data.get("without")

    @hookimpl
    def vswa_metrics(self) -> str:
        self.calls.append("metrics")
        return ""

    @hookimpl
    def vswa_stopping(self) -> None:
        self.calls.append("stopping")


def switched(host: PluginHost, name: str, without: Any) -> Switched:
    made = Switched()
    host.register(made, name)
    host.options({name: Section({"without": without}, "options.yaml", name)})
    return made


@pytest.mark.parametrize(
    ("without", "called"),
    [
        (None, ["metrics", "stopping"]),
        ([], ["metrics", "stopping"]),
        (["vswa_metrics"], ["stopping"]),
        ({"vswa_metrics", "vswa_stopping"}, []),
    ],
)
def test_hooks_that_a_plugin_does_without_are_not_called(without: Any, called: list[str]) -> None:
    with PluginHost() as host:
        made = switched(host, "theirs", without)
        host.metrics()
        host.stopping(5.0)

        assert called == made.calls
        assert [f"vswa_{each}" for each in called] == [
            hook for hook in ("vswa_metrics", "vswa_stopping") if host.implements(hook)
        ]
        assert ("vswa_metrics", "vswa_options", "vswa_stopping") == host.plugins()[0].hooks
        assert {} == host.failures()


def test_what_one_plugin_does_without_others_are_called_for_also_those_that_come_later() -> None:
    with PluginHost() as host:
        before, later = Switched(), Switched()
        host.register(before, "before")
        off = switched(host, "off", ["vswa_metrics"])
        host.register(later, "later")
        host.metrics()

        assert ([], ["metrics"], ["metrics"]) == (off.calls, before.calls, later.calls)


@pytest.mark.parametrize(
    "wrong", ["vswa_metrics", 7, ["vswa_metric"], ["vswa_kv_batch"], ["vswa_metrics", 1]]
)
def test_a_wrong_answer_is_counted_and_all_hooks_are_called(wrong: Any) -> None:
    with PluginHost() as host:
        made = switched(host, "theirs", wrong)
        host.metrics()

        assert ["metrics"] == made.calls
        assert {("theirs", "vswa_options"): 1} == host.failures()


def test_first_party_plugins_that_are_off_cost_no_choice_no_event_and_no_request() -> None:
    with load_host(environ={}) as host:
        idle = ("score", "select_worker", "kv_stored", "engine_events", "request_arrived")

        assert [] == [hook for hook in idle if host.implements(f"vswa_{hook}")]
        assert host.selection_hooks() is None
    with load_host(environ={"VSWA_RECORD": "/x", "VSWA_DYNAMO_EVENTS": "boundary"}) as host:
        assert all(host.implements(f"vswa_{hook}") for hook in idle[2:])
        assert host.selection_hooks() is None
    with load_host(environ={"VSWA_PLUGIN_AFFINITY_MODE": "hard"}) as host:
        assert [False, True] == [host.implements(f"vswa_{hook}") for hook in idle[:2]]
        assert host.selection_hooks() is host
