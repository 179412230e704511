"""The documentation of the hooks, their docstrings, the examples and the template stay true."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vswa_plugin import hookspecs
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host
from vswa_plugin.wire.events import VERSION, Batch, Removed, Source, Stored, layout_event

ROOT = Path(__file__).parents[2]
SPECS = [hook.__name__ for hook in hookspecs.HOOKS]
LAYOUT = CacheLayout((CacheGroup(0, 512, 32), CacheGroup(1, None, 32)), "trtllm_v2", "gemma3")
SOURCE = Source("dynamo", "backend", 7, 0)


def doc(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_no_hook_is_forgotten() -> None:
    marked = hookspecs.NAME + "_spec"
    modules = (f"{hookspecs.__name__}.{found.name}" for found in pkgutil.iter_modules(hookspecs.__path__))
    written = [
        name
        for module in map(importlib.import_module, modules)
        for name, value in vars(module).items()
        if hasattr(value, marked)
    ]

    assert sorted(written) == sorted(SPECS)


def test_the_wheel_lists_every_package_of_the_host_and_of_the_plugins_and_no_other() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = [
        ".".join([package, *file.relative_to(ROOT / folder).parts[:-1]])
        for package, folder in setuptools["package-dir"].items()
        for file in (ROOT / folder).glob("**/__init__.py")
        if "template" not in file.parts  # a distribution of its own
    ]

    assert sorted(packages) == setuptools["packages"]


@pytest.mark.parametrize("name", SPECS)
def test_every_hookspec_states_its_contract(name: str) -> None:
    spec = getattr(hookspecs, name)
    text = inspect.getdoc(spec) or ""
    for section in ("Called:", "Order:", "Combine:", "Errors:", ".. versionadded::"):
        assert section in text, (name, section)

    assert set(inspect.signature(spec).parameters) == set(re.findall(r":param (\w+):", text))


@pytest.mark.parametrize("name", SPECS)
def test_every_hookspec_has_the_prefix_and_is_synchronous(name: str) -> None:
    assert name.startswith("vswa_")
    assert not inspect.iscoroutinefunction(getattr(hookspecs, name))


def test_the_headings_of_the_hooks_page_are_the_hooks_with_their_arguments_in_order() -> None:
    headings = re.findall(r"^## `(.+)`$", doc("hooks.md"), re.M)

    expected = [
        f"{name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})" for name in SPECS
    ]
    assert expected == headings


def test_every_hook_has_a_typed_method_on_the_host_with_its_arguments() -> None:
    for name in SPECS:
        method = "commands" if name == "vswa_register_commands" else name.removeprefix("vswa_")
        arguments = [
            each for each in inspect.signature(getattr(PluginHost, method)).parameters if each != "self"
        ]

        expected = list(inspect.signature(getattr(hookspecs, name)).parameters)
        if name == "vswa_register_commands":
            expected = []  # the host makes the Commands, one per plugin
        added = {"taken", "page"}  # what is there already, and which plugins may not repeat
        assert expected == [each for each in arguments if each not in added], name


def test_the_first_plugin_of_the_docs_is_the_example_file_and_is_short() -> None:
    blocks = re.findall(
        r"<!-- start (\S+) -->\n```python\n(.*?)```\n<!-- end -->", doc("writing-plugins.md"), re.S
    )

    assert ["plugins/examples/minimal.py"] == [path for path, _ in blocks]
    for path, code in blocks:
        assert (ROOT / path).read_text() == code
        assert len(code.splitlines()) <= 25


def batches() -> list[Batch]:
    return [
        Batch(VERSION, 1, 0, 0, [layout_event(LAYOUT)]),
        Batch(VERSION, 1, 1, 0, [Stored(0, 0, None, (1, 2, 3, 4)), Stored(1, 0, None, (1, 2, 3, 4))]),
        Batch(VERSION, 1, 3, 0, [Removed(0, (1,))]),
    ]


def test_the_first_plugin_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    with PluginHost() as host:
        host.load_local(str(ROOT / "plugins/examples/minimal.py"))
        for batch in batches()[:2]:
            host.kv_batch(SOURCE, batch)
        printed = capsys.readouterr().out
        host.kv_batch(SOURCE, batches()[2])

        assert {} == host.failures()
    assert "window 512: 4 blocks stored, 0 removed\nwindow global: 4 blocks stored, 0 removed\n" == printed
    assert printed.splitlines() == [
        line.strip() for line in doc("writing-plugins.md").splitlines() if line.startswith("    window ")
    ]
    assert "window 512: 4 blocks stored, 1 removed" in capsys.readouterr().out


def test_the_table_of_first_party_plugins_says_what_they_are() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (?:alpha|beta|stable) \|", (ROOT / "plugins/README.md").read_text(), re.M
    )
    stated = {name: set(re.findall(r"`(vswa_\w+)`", hooks)) for name, hooks in rows}
    with load_host(environ={}) as host:
        loaded = {each.name: set(each.hooks) for each in host.plugins() if "vswa_plugins." in each.source}

    assert stated == loaded


def test_the_hooks_page_names_the_first_party_plugins_that_use_a_hook() -> None:
    with load_host(environ={}) as host:
        ours = {each.name: each.hooks for each in host.plugins() if "vswa_plugins." in each.source}
    stated = {}
    for section in doc("hooks.md").split("\n## `")[1:]:
        (used_by,) = re.findall(r"^Used by (.+?)(?=\n\n|\Z)", section, re.M | re.S)
        stated[section.partition("(")[0]] = {name for name in ours if f"`{name}`" in used_by}

    assert {hook: {name for name, hooks in ours.items() if hook in hooks} for hook in SPECS} == stated


def test_every_hook_has_a_first_party_plugin_or_an_example_that_uses_it() -> None:
    examples = [str(path) for path in (ROOT / "plugins/examples").glob("*.py")]
    with load_host(plugin=examples, environ={}) as host:
        ours = [each for each in host.plugins() if "vswa_plugins." in each.source or each.source in examples]
        used = {hook for each in ours for hook in each.hooks}

    assert set(SPECS) == used


@pytest.mark.parametrize("module", ["vswa_plugin.host.host", "vswa_plugin.hookspecs", "vswa_plugin.cli.main"])
def test_the_host_is_imported_without_numpy_nats_or_dynamo(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "heavy = {'numpy', 'nats', 'dynamo', 'etcd3', 'grpc', 'rich', 'prometheus_client'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )

    assert "[]" == done.stdout.strip()
