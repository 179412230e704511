"""Who may import what: the few rules that keep the architecture visible from the folder list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = ROOT / "vswa_plugin"
#: Package -> the only modules of the host that import it.
EDGES = {
    "nats": {"transport.py"},
    "etcd3": {"registry/_etcd3_client.py"},
    "dynamo": {"dynamo.py", "dynamo_client.py"},
}
#: Modules without I/O, lowest first: each imports only itself, those before it, and what is pure outside.
PURE = (
    "errors",
    "layout",
    "kernel",
    "hashing",
    "events",
    "engine",
    "reuse",
    "nodes",
    "control",
    "residency",
    "batches",
    "healing",
    "history",
    "stream",
    "view",
)
IO = {"asyncio", "socket", "subprocess", "threading", "aiohttp", "nats", "dynamo", "grpc", "etcd3"}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str, folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


@pytest.mark.parametrize("package", EDGES)
def test_each_peer_is_imported_in_one_place(package: str) -> None:
    assert EDGES[package] == importers(package, HOST)


def test_the_host_knows_no_plugin() -> None:
    assert set() == importers("vswa_plugins", HOST)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_does_no_io_and_looks_down_only(module: str) -> None:
    found = set(imports(HOST / f"{module}.py"))
    ours = {name.split(".")[1] for name in found if name.startswith("vswa_plugin.")}
    below = set(PURE[: PURE.index(module) + 1])

    assert set() == {name.split(".")[0] for name in found} & IO
    assert ours <= below


def test_the_embedded_engine_never_imports_the_rules_that_it_is_compared_with() -> None:
    engine = ROOT / "plugins" / "gemma3_cpu"

    assert set() == importers("vswa_plugin.reuse", engine)
    assert set() == importers("vswa_plugin.index", engine)


def test_plugins_do_not_reach_into_each_other() -> None:
    plugins = ROOT / "plugins"
    for folder in plugins.iterdir():
        if folder.is_dir():
            others = {
                name
                for path in folder.rglob("*.py")
                for name in imports(path)
                if name.startswith("vswa_plugins.") and not name.startswith(f"vswa_plugins.{folder.name}")
            }
            assert set() == others, folder.name
