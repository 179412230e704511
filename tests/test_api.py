"""The public surface: docs/api.md says what the code says, and the first-party plugins get by with it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import vswa_plugin
from tests.api_page import PUBLIC, names_of, page

ROOT = Path(__file__).parents[1]
#: These speak to NATS, or stand in for it.
NEEDS_NATS = {
    "vswa_plugin.following.fleet",
    "vswa_plugin.following.subscriber",
    "vswa_plugin.testing.streams",
    "vswa_plugin.testing.memory",
}
#: These bring the tools of tests with them.
NEEDS_PYTEST = {
    f"vswa_plugin.testing.{name}"
    for name in ("conformance", "mutations", "phases", "registries", "registry_outages", "rules", "scorers")
}
PACKAGES = sorted(path.parent for path in (ROOT / "vswa_plugin").rglob("__init__.py"))


def test_the_page_of_public_names_says_what_the_code_says() -> None:
    written = (ROOT / "docs" / "api.md").read_text()

    assert page() == written, "run: python -m tests.api_page > docs/api.md"


@pytest.mark.parametrize("path", PUBLIC)
def test_every_public_name_is_explained_in_a_sentence(path: str) -> None:
    assert [] == [public.name for public in names_of(import_module(path)) if not public.line]


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_name_is_listed_once(path: str) -> None:
    names = import_module(path).__all__

    assert len(set(names)) == len(names)


def _imports(path: Path) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").split(".")[0] == "vswa_plugin"
        ):
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, alias.name, "*") for alias in node.names if alias.name.startswith("vswa_plugin")
            )


def _is_public(module: str, name: str) -> bool:
    return module in PUBLIC and name in import_module(module).__all__


def test_first_party_plugins_import_public_names_only() -> None:
    private = [
        f"{path.relative_to(ROOT)}:{line}: {module}.{name}"
        for path in sorted((ROOT / "plugins").rglob("*.py"))
        for line, module, name in _imports(path)
        if not _is_public(module, name)
    ]

    assert [] == private


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)).replace("/", "."))
def test_a_package_says_what_each_of_its_modules_is_for(package: Path) -> None:
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    listed = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    named = set(re.findall(r"^ *(\w+(?:\.py)?) {2,}\S", listed, re.MULTILINE))

    if package.name == "vswa_plugin":
        assert not named
    else:
        assert modules | rooms == named - {"__main__.py"}


def _imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after ``statement``."""
    code = f"import sys; {statement}; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(shown.stdout.split())


def test_the_version_is_known_without_importing_the_contracts() -> None:
    imported = _imported_by("import vswa_plugin; vswa_plugin.__version__")

    assert not {name for name in imported if name.startswith("vswa_plugin.")}


def test_the_mark_of_a_hook_is_at_the_root() -> None:
    from vswa_plugin.hookspecs import hookimpl

    assert hookimpl is vswa_plugin.hookimpl
    with pytest.raises(AttributeError, match="no attribute 'hookspec'"):
        vswa_plugin.hookspec  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("path", PUBLIC)
def test_public_modules_need_no_broker_and_no_framework(path: str) -> None:
    heavy = {"etcd3", "dynamo", "torch", "numpy"}
    heavy |= set() if path in NEEDS_NATS else {"nats", "aiohttp"}
    heavy |= set() if path in NEEDS_PYTEST else {"pytest", "hypothesis"}

    assert not heavy & _imported_by(f"import {path}")
