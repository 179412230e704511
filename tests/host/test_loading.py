"""Where plugins come from: installed packages, local files, and switches that leave some out."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host_helpers import BATCH, SOURCE, state
from tests.host_helpers import clock as clock
from tests.host_helpers import host as host
from vswa_plugin.errors import ConfigError, PluginError
from vswa_plugin.hookspecs import NAME
from vswa_plugin.host.host import PluginHost
from vswa_plugin.host.loading import load_host

OBSERVER = (
    "from vswa_plugin.hookspecs import hookimpl\n@hookimpl\ndef vswa_metrics():\n    return 'from_{} 1'\n"
)
Install = Callable[..., None]
_serial = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package, as pip would leave it, with one module and an entry point."""
    before = set(sys.modules)

    def make(name: str, code: str, entry: str | None = None, entry_points: str | None = None) -> None:
        site = tmp_path / f"site{next(_serial)}"
        info = site / f"{name}_dist-1.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.5\n")
        listed = entry_points or f"[{NAME}]\n{name} = {entry or name}\n"
        (info / "entry_points.txt").write_text(listed)
        monkeypatch.syspath_prepend(str(site))

    yield make
    for module in set(sys.modules) - before:
        if module.startswith("third_party_"):
            del sys.modules[module]


def status_of(host: PluginHost, name: str) -> tuple[str, str]:
    return next((each.state, each.reason) for each in host.plugins() if each.name == name)


BROKEN = {
    "import error": ("import no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax error": ("def (", None, "SyntaxError"),
    "raises": ("raise ValueError('boom')", None, "ValueError: boom"),
    "exits": ("raise SystemExit(0)", None, "SystemExit: 0"),
    "no module": ("", "third_party_nowhere", "ModuleNotFoundError"),
    "no attribute": ("", "third_party_bad:plugin", "AttributeError"),
    "malformed": ("", "!!", "cannot import !!"),
    "misspelt hook": (OBSERVER.replace("vswa_metrics", "vswa_metric"), None, "did you mean 'vswa_metrics'?"),
    "none": ("plugin = None", "third_party_bad:plugin", "implements no hook"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_listed_with_its_reason_and_costs_no_other(
    install: Install, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, entry, reason = BROKEN[case]
    install("third_party_bad", code, entry)
    install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        assert ("loaded", "") == status_of(host, "third_party_good")
        assert "from_good 1\n" in host.metrics()
        state, said = status_of(host, "third_party_bad")

    assert "failed" == state
    assert reason in said
    assert "plugin 'third_party_bad' from third_party_bad-dist" in caplog.text


def test_a_package_with_an_unreadable_list_costs_no_other(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("third_party_bad", "", entry_points=f"[{NAME}]\nneither name nor value\n")
    for _ in range(2):  # found twice on sys.path, as with a working copy and an installed one
        install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        names = [each.name for each in host.plugins()]

        assert ("loaded", "") == status_of(host, "third_party_good")
        assert "prometheus" in names
        assert sorted(set(names)) == names
    assert "third_party_bad_dist-1.5.dist-info: unreadable entry points" in caplog.text


def test_the_second_of_two_packages_with_one_name_is_refused(install: Install) -> None:
    for name in ("third_party_one", "third_party_two"):
        install(name, OBSERVER.format(name), entry_points=f"[{NAME}]\nshared = {name}\n")
    with load_host(environ={}) as host:
        both = [each for each in host.plugins() if each.name == "shared"]

    assert [
        ("third_party_one-dist (third_party_one)", "loaded"),
        ("third_party_two-dist (third_party_two)", "failed"),
    ] == [(each.source, each.state) for each in both]
    assert "two plugins are named 'shared'" in both[1].reason


def test_the_list_says_name_version_hooks_and_where_from(install: Install) -> None:
    install("third_party_good", OBSERVER.format("good"))
    with load_host(environ={}) as host:
        line = next(each for each in host.plugins() if each.name == "third_party_good")

    assert ("1.5", ("vswa_metrics",), "third_party_good-dist (third_party_good)", "loaded") == (
        line.version,
        line.hooks,
        line.source,
        line.state,
    )


def test_a_plugin_that_is_switched_off_is_not_even_imported(install: Install) -> None:
    install("third_party_bad", "raise ValueError('imported')")
    for off in (
        {"no_plugin": ["third_party_bad"]},
        {"environ": {"VSWA_PLUGINS_DISABLED": " third_party_bad ,"}},
    ):
        with load_host(**({"environ": {}} | off)) as host:  # type: ignore[arg-type]
            assert ("disabled", "switched off by name") == status_of(host, "third_party_bad")
    assert "third_party_bad" not in sys.modules


def test_only_the_plugins_that_were_chosen_are_loaded(install: Install) -> None:
    install("third_party_good", OBSERVER.format("good"))
    install("third_party_other", OBSERVER.format("other"))
    with load_host(environ={"VSWA_PLUGINS": "third_party_good"}) as host:
        loaded = [each.name for each in host.plugins() if each.state == "loaded"]

        assert ["third_party_good"] == loaded
        assert ("disabled", "not named in VSWA_PLUGINS") == status_of(host, "third_party_other")
    with load_host(environ={"VSWA_PLUGINS": ""}) as host:
        assert {"disabled"} == {each.state for each in host.plugins()}


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("--no-plugin", {"no_plugin": ["prometheos"]}),
        ("VSWA_PLUGINS_DISABLED", {"environ": {"VSWA_PLUGINS_DISABLED": "prometheos"}}),
        ("VSWA_PLUGINS", {"environ": {"VSWA_PLUGINS": "gemma3_cpu,prometheos"}}),
    ],
)
def test_an_unknown_name_lists_the_known_ones(where: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_host(**({"environ": {}} | arguments))

    assert (
        f"{where}: unknown plugin 'prometheos': did you mean 'prometheus'? Known: affinity, dynamo_events, "
        in str(caught.value)
    )


def local_file(tmp_path: Path, code: str, name: str = "mine.py") -> str:
    path = tmp_path / name
    path.write_text(code)
    return str(path)


def test_a_local_file_is_loaded_even_where_only_some_packages_are(tmp_path: Path) -> None:
    where = local_file(tmp_path, OBSERVER.format("file"))
    with load_host([where], environ={"VSWA_PLUGINS": ""}) as host:
        assert ("loaded", "") == status_of(host, "mine")
        assert "from_file 1\n" == host.metrics()


def test_a_package_that_is_given_by_its_init_file_has_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "vswa_mine"
    folder.mkdir()
    where = local_file(folder, OBSERVER.format("file"), "__init__.py")
    with load_host(plugin=[where], environ={"VSWA_PLUGINS": ""}) as host:
        assert ["vswa_mine"] == [each.name for each in host.plugins() if each.state == "loaded"]


def test_a_local_file_can_be_switched_off_by_its_name(tmp_path: Path) -> None:
    where = local_file(tmp_path, "raise ValueError('imported')")
    with load_host([where], ["mine"], environ={"VSWA_PLUGINS": ""}) as host:
        assert "disabled" == status_of(host, "mine")[0]


def test_a_dotted_module_is_loaded(install: Install) -> None:
    install("third_party_module", OBSERVER.format("module"), entry_points="[other]\nx = y\n")
    with load_host(["third_party_module"], environ={"VSWA_PLUGINS": ""}) as host:
        assert "from_module 1\n" == host.metrics()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "cannot import this file: ModuleNotFoundError"),
        ("def (", "cannot import this file: SyntaxError"),
        ("raise SystemExit(1)", "cannot import this file: SystemExit: 1"),
        ("x = 1", "plugin 'mine' implements no hook"),
    ],
)
def test_a_local_file_that_cannot_be_used_is_an_error_and_leaves_no_trace(
    host: PluginHost, tmp_path: Path, code: str, message: str
) -> None:
    where = local_file(tmp_path, code)
    before = state(host)
    with pytest.raises(PluginError, match=message):
        host.load_local(where)

    assert before == state(host)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("./nowhere.py", "expected a Python file, found none at"),
        ("no.such.module", "for a file give its path, ending in .py"),
        ("..", "cannot import this module"),
        ("", "cannot import this module"),
    ],
)
def test_a_local_plugin_that_is_not_there_says_what_was_looked_for(
    host: PluginHost, where: str, message: str
) -> None:
    with pytest.raises(PluginError, match=message):
        host.load_local(where)


def test_after_close_no_plugin_is_called_and_no_file_stays_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    host = PluginHost()
    host.load_local(local_file(tmp_path, OBSERVER.format("file")))
    host.close()
    host.close()

    assert "" == host.metrics()
    assert [] == host.plugins()
    assert {name for name in set(sys.modules) - before if "local" in name} == set()


# -- an instance for each host -----------------------------------------------------------------------

COUNTING = """
from vswa_plugin.hookspecs import hookimpl

class Counting:
    def __init__(self{argument}):
        self.batches = {start}

    @hookimpl
    def vswa_kv_batch(self):
        self.batches += 1

    @hookimpl
    def vswa_metrics(self):
        return f"third_party_batches {{self.batches}}"
"""


def test_of_a_class_each_host_has_an_instance_of_its_own(install: Install) -> None:
    install("third_party_class", COUNTING.format(argument="", start=0), "third_party_class:Counting")
    with load_host(environ={}) as one, load_host(environ={}) as other:
        one.kv_batch(SOURCE, BATCH)
        one.kv_batch(SOURCE, BATCH)
        other.kv_batch(SOURCE, BATCH)

        assert [True, True] == [
            "third_party_batches 2\n" in one.metrics(),
            "third_party_batches 1\n" in other.metrics(),
        ]
        assert [{}, {}] == [one.failures(), other.failures()]


@pytest.mark.parametrize(
    ("argument", "start", "reason"),
    [
        (", worker", "0", "Counting: TypeError: Counting.__init__() missing 1 required positional argument"),
        ("", "[][0]", "Counting: IndexError: list index out of range"),
        ("", "exit(0)", "Counting: SystemExit: 0"),
    ],
)
def test_a_class_of_which_no_instance_can_be_made_is_refused_with_its_reason(
    install: Install, argument: str, start: str, reason: str
) -> None:
    code = COUNTING.format(argument=argument, start=start)
    install("third_party_class", code, "third_party_class:Counting")
    with load_host(environ={}) as host:
        state, said = status_of(host, "third_party_class")

    assert "failed" == state
    assert f"expected a class that can be called without arguments, got {reason}" in said
