"""Import every module that the source tree has from what is installed: ``python import_all.py TREE``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

#: Folder of the tree -> the name under which it is installed.
PACKAGES = {"vswa_plugin": "vswa_plugin", "plugins": "vswa_plugins"}


def modules(tree: Path) -> Iterator[str]:
    """Names of all modules that lie in packages; a folder without ``__init__.py`` is none."""
    for folder, name in PACKAGES.items():
        for path in sorted((tree / folder).rglob("*.py")):
            parts = path.relative_to(tree / folder).with_suffix("").parts
            parents = [path.parents[up] for up in range(len(parts))]
            if all((parent / "__init__.py").is_file() for parent in parents):
                yield ".".join([name, *(part for part in parts if part != "__init__")])


def problems(tree: Path) -> Iterator[str]:
    installed = Path(sys.prefix).resolve()
    for name in modules(tree):
        try:
            origin = import_module(name).__file__
        except ImportError as error:
            yield f"{name}: expected in the wheel, got {error!r}: is its package listed in pyproject.toml?"
            continue
        if origin is None or installed not in Path(origin).resolve().parents:
            yield f"{name}: expected from {installed}, got {origin}: the wheel is not what is tested"


if __name__ == "__main__":
    sys.exit("\n".join(problems(Path(sys.argv[1]))) or None)
