"""``vswa new-plugin``: each kind is written, passes its tests at once, and is loaded once installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vswa_plugin.cli.main import main
from vswa_plugin.cli.new_plugin import KINDS, package, plugin_name
from vswa_plugin.errors import ConfigError

HOOKS = {
    "observer": {"vswa_request_finished", "vswa_metrics"},
    "engine": {"vswa_engine", "vswa_engine_names", "vswa_event_adapter"},
    "rule": {"vswa_reuse_rules"},
    "scorer": {"vswa_accuracy_scorers"},
    "cost": {"vswa_options", "vswa_score"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of each kind."""
    folder = tmp_path_factory.mktemp("plugins")
    for kind in KINDS:
        assert 0 == main(["new-plugin", f"my-{kind}", "--kind", kind, "--directory", str(folder / kind)])
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_new_plugin_pass_at_once(written: Path, kind: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=written / kind, capture_output=True, text=True, timeout=50, check=False
    )

    assert 0 == done.returncode, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def test_new_plugins_are_loaded_where_they_are_installed(written: Path, tmp_path: Path) -> None:
    """With the entry points of their pyproject.toml, as pip writes them down."""
    for kind in KINDS:
        project = tomllib.loads((written / kind / "pyproject.toml").read_text())["project"]
        ((group, points),) = project["entry-points"].items()
        info = tmp_path / f"{project['name'].replace('-', '_')}-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    paths = os.pathsep.join([str(tmp_path), *(str(written / kind) for kind in KINDS)])
    command = [sys.executable, "-m", "vswa_plugin", "plugins", "--json"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    loaded = {each["name"]: (each["state"], set(each["hooks"])) for each in json.loads(done.stdout)}

    assert {f"my_{kind}": ("loaded", hooks) for kind, hooks in HOOKS.items()} == {
        name: found for name, found in loaded.items() if name.startswith("my_")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_template_but_its_code_is_left(kind: str) -> None:
    files = package("house_rules", kind)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    first = files["vswa_house_rules/__init__.py"].split('"""')[1]

    assert {
        "README.md",
        "pyproject.toml",
        "vswa_house_rules/__init__.py",
        "tests/test_house_rules.py",
    } == set(files)
    assert not [path for path, text in files.items() if "example" in (path + text).lower()]
    assert ("vswa-house-rules", first.rstrip(".")) == (project["name"], project["description"])
    assert first in files["README.md"]
    assert all(text.endswith("\n") for text in files.values())


@pytest.mark.parametrize("given", ["house-rules", "house_rules", "vswa-house-rules", "vswa_house_rules"])
def test_a_name_may_be_that_of_the_plugin_or_of_its_package(given: str) -> None:
    assert "house_rules" == plugin_name(given)


@pytest.mark.parametrize("given", ["", "A", "1a", "a b", "a-", "../a", "ä", "a" * 41, "vswa-", "-a", "a.b"])
def test_what_is_no_name_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="NAME: expected up to 40 lower-case"):
        plugin_name(given)


def test_the_name_of_a_plugin_that_is_there_is_refused_with_its_owner() -> None:
    with pytest.raises(ConfigError, match="got 'gemma3_cpu', which vswa-plugin brings"):
        plugin_name("gemma3-cpu")


@pytest.mark.parametrize("what", ["a file", "a full folder", "below a file"])
def test_a_place_that_is_taken_is_refused_and_left_as_it_was(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    if what == "a full folder":
        place.mkdir()
        (place / "mine").write_text("x")
    else:
        place.write_text("x")
    directory = place / "deeper" if what == "below a file" else place

    assert 2 == main(["new-plugin", "mine", "--kind", "rule", "--directory", str(directory)])
    assert "--directory: expected" in capsys.readouterr().err
    assert ([place] == list(tmp_path.iterdir()) and not place.is_dir()) or ["mine"] == os.listdir(place)


TUTORIAL = (Path(__file__).parents[2] / "docs/writing-plugins.md").read_text()


def test_the_tutorial_leads_to_a_plugin_whose_tests_pass(tmp_path: Path) -> None:
    """Its first command, then its files and the lines for pyproject.toml, put where it says."""
    assert "    vswa new-plugin reuse --kind observer\n    cd vswa-reuse\n" in TUTORIAL
    folder = tmp_path / "vswa-reuse"
    assert 0 == main(["new-plugin", "reuse", "--kind", "observer", "--directory", str(folder)])
    replaced = re.findall(r"<!-- tutorial (\S+) -->\n```python\n(.*?)```\n", TUTORIAL, re.S)
    for path, text in replaced:
        assert (folder / path).is_file(), "the tutorial changes what was written"
        (folder / path).write_text(text)
    project = (folder / "pyproject.toml").read_text()
    (entry,) = re.findall(r'^    (reuse = "vswa_reuse:\w+")$', TUTORIAL, re.M)
    name, _, place = tomllib.loads(entry)["reuse"].partition(":")

    assert 'reuse = "vswa_reuse"\n' in project and ["vswa_reuse/__init__.py", "tests/test_reuse.py"] == [
        path for path, _ in replaced
    ]
    assert f"class {place}:" in (folder / name / "__init__.py").read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=50, check=False)
    assert 0 == done.returncode and "2 passed" in done.stdout, done.stdout + done.stderr
