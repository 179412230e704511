"""Who may import what, for files outside any package: the import contracts in pyproject.toml say the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What an author begins with: copied elsewhere, where only the public rooms of the host are there to stay.
SHOWN = sorted(
    [*(ROOT / "plugins/examples").glob("*.py"), *(ROOT / "plugins/template/vswa_example").glob("*.py")]
)
PUBLIC = {"blocks", "engine", "errors", "hookspecs", "selection", "wire.events"}


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def is_public(module: str) -> bool:
    inside = module.removeprefix("vswa_plugin.")
    return any(inside == room or inside.startswith(f"{room}.") for room in PUBLIC)


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_the_examples_and_the_template_import_the_public_rooms_of_the_host_only(path: Path) -> None:
    ours = {module for module in imported_modules(path) if module.startswith((".", "vswa_plugin"))}

    assert ours
    assert set() == {module for module in ours if not is_public(module)}
