"""Who may import what: the few rules that keep the architecture visible from the folder list."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOST = ROOT / "vswa_plugin"
PLUGINS = ROOT / "plugins"
#: Package -> the only modules of the host that import it.
EDGES = {
    "nats": {"wire/transport.py"},
    "etcd3": {"registry/_etcd3_client.py"},
    "dynamo": {"dynamo/runtime.py", "dynamo/client.py", "dynamo/frontend.py"},
}
#: Modules without I/O, lowest first: each imports only itself, those before it, and what is pure outside.
PURE = (
    "errors",
    "blocks.layout",
    "blocks.kernel",
    "blocks.hashing",
    "wire.events",
    "engine.contract",
    "engine.options",
    "engine.requests",
    "blocks.reuse",
    "publishing.nodes",
    "wire.control",
    "publishing.residency",
    "wire.numbering",
    "publishing.healing",
    "publishing.history",
    "following.reader",
    "following.view",
)
#: The only plugin that others may import: what its package lists in ``__all__``, nothing inside.
SHARED = "vswa_plugins.trtllm_events"
#: Folders that are imported under another name.
FOLDERS = {"plugins": "vswa_plugins"}
IO = {"asyncio", "socket", "subprocess", "threading", "aiohttp", "nats", "dynamo", "grpc", "etcd3"}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it: modules, and names taken from them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module that ``node`` imports from, also where it says so by dots."""
    named = [node.module] if node.module else []
    if not node.level:
        return ".".join(named)
    top, *below = path.relative_to(ROOT).parts[: -node.level]
    return ".".join([FOLDERS.get(top, top), *below, *named])


def importers(package: str, folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*.py")
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }


def module_of(name: str) -> str | None:
    """The module of the host that ``name`` is or is taken from; None where it is a package."""
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if HOST.joinpath(*parts[:end]).with_suffix(".py").is_file():
            return ".".join(parts[:end])
    return None


@pytest.mark.parametrize("package", EDGES)
def test_each_peer_is_imported_in_one_place(package: str) -> None:
    assert EDGES[package] == importers(package, HOST)


def test_the_host_knows_no_plugin() -> None:
    assert set() == importers("vswa_plugins", HOST)


@pytest.mark.parametrize("module", PURE)
def test_a_pure_module_does_no_io_and_looks_down_only(module: str) -> None:
    found = set(imports(HOST / f"{module.replace('.', '/')}.py"))
    ours = {module_of(name) for name in found if name.startswith("vswa_plugin.")} - {None}
    below = set(PURE[: PURE.index(module) + 1])

    assert set() == {name.split(".")[0] for name in found} & IO
    assert ours <= below


def test_the_embedded_engine_never_imports_the_rules_that_it_is_compared_with() -> None:
    engine = PLUGINS / "gemma3_cpu"

    assert set() == importers("vswa_plugin.blocks.reuse", engine)
    assert set() == importers("vswa_plugin.index", engine)


@pytest.mark.parametrize(
    "plugin", sorted({path.relative_to(PLUGINS).parts[0] for path in PLUGINS.glob("*/**/*.py")})
)
def test_plugins_do_not_reach_into_each_other(plugin: str) -> None:
    found = {name for path in (PLUGINS / plugin).rglob("*.py") for name in imports(path)}
    own = f"vswa_plugins.{plugin}."
    others = {name for name in found if name.startswith("vswa_plugins.") and not f"{name}.".startswith(own)}

    assert others <= {SHARED, *(f"{SHARED}.{name}" for name in import_module(SHARED).__all__)}
