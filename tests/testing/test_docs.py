"""The examples of docs/testing.md pass, each as a file of tests of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PAGE = (Path(__file__).parents[2] / "docs/testing.md").read_text()
EXAMPLES = re.findall(r"<!-- example -->\n```python\n(.*?)```", PAGE, re.S)


def test_every_block_of_python_on_the_page_is_an_example_that_is_run() -> None:
    assert len(EXAMPLES) == PAGE.count("```python")


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_pass(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(code)
    outcomes = pytester.runpytest_inprocess("-p", "no:cacheprovider").parseoutcomes()

    assert {"passed"} == outcomes.keys() - {"warnings", "skipped"}


def test_the_page_names_every_module_that_authors_import() -> None:
    names = set(re.findall(r"^\| `vswa_plugin\.testing\.(\w+)` \|", PAGE, re.M))
    folder = Path(__file__).parents[2] / "vswa_plugin/testing"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}

    assert names == {name for name in modules if not name.endswith("_checks")}
