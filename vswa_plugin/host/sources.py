"""Where plugins come from: entry points of installed packages, and files or modules named by the user."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

from vswa_plugin.errors import PluginError
from vswa_plugin.hookspecs import NAME

logger = logging.getLogger(__name__)

#: What importing somebody's module can end in. SystemExit: a script that was never meant to be imported.
IMPORT_FAILURES = (Exception, SystemExit)

#: The package that this host and the first-party plugins are installed with.
OWN_PACKAGE = "vswa-plugin"

_LOCAL_PREFIX = "vswa_local_plugin_"


def installed() -> list[metadata.EntryPoint]:
    """The entry points of the group ``vswa_plugin``, by name; a package with a broken list is left out."""
    found = [entry for entries in _readable() for entry in entries]
    return sorted(found, key=lambda entry: (entry.name, entry.value))


def is_first_party(entry: metadata.EntryPoint) -> bool:
    """Whether ``entry`` comes with this project's own package, whatever the module is called."""
    return re.sub(r"[-_.]+", "-", package_of(entry)).lower() == OWN_PACKAGE


def _readable() -> Iterator[metadata.EntryPoints]:
    try:
        yield metadata.entry_points(group=NAME)
        return
    except Exception as error:
        logger.warning("an installed package has unreadable entry points (%s); reading one by one", error)
    # The standard call fails as a whole, so that one package would cost all plugins.
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            name = distribution.name.lower().replace("_", "-")
            # A package that is found twice on sys.path counts once, where it is found first.
            if name not in seen:
                yield distribution.entry_points.select(group=NAME)
            seen.add(name)
        except Exception as error:
            where = getattr(distribution, "_path", distribution)
            logger.warning("%s: unreadable entry points, its plugins are left out: %s", where, error)


def version_of(entry: metadata.EntryPoint) -> str:
    """Version of the package that brought ``entry``; empty where it does not say."""
    try:
        return str(entry.dist.version) if entry.dist else ""
    except Exception:
        return ""


def package_of(entry: metadata.EntryPoint) -> str:
    """Name of the package that brought ``entry``."""
    try:
        return str(entry.dist.name) if entry.dist else "unknown package"
    except Exception:
        return "unknown package"


def local_name(where: str) -> str:
    """The plugin name of a ``--plugin`` argument: a file's stem, or the module's dotted name.

    A package that is given by its ``__init__.py`` has the name of its folder.
    """
    if not _is_file(where):
        return where
    path = Path(where)
    return path.stem if path.stem != "__init__" else path.resolve().parent.name


def load_local(where: str) -> ModuleType:
    """Import a plugin from a ``.py`` file or a dotted module name.

    :raises PluginError: it is not there, or its import fails; says which, and the reason.
    """
    if not _is_file(where):
        try:
            return importlib.import_module(where)
        except IMPORT_FAILURES as error:
            raise PluginError(
                f"--plugin {where}: cannot import this module: {reason_of(error)}; "
                f"for a file give its path, ending in .py"
            ) from error
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"--plugin {where}: expected a Python file, found none at {path}")
    name = _LOCAL_PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"--plugin {where}: expected a file that ends in .py, got {path.name}")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and msgspec structs look their module up by name while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except IMPORT_FAILURES as error:
        forget_local(module)
        raise PluginError(f"--plugin {where}: cannot import this file: {reason_of(error)}") from error
    return module


def forget_local(module: object) -> None:
    """Take a module that came from a file out of ``sys.modules``; others stay."""
    name = getattr(module, "__name__", "")
    if isinstance(name, str) and name.startswith(_LOCAL_PREFIX):
        sys.modules.pop(name, None)


def reason_of(error: BaseException) -> str:
    """One line for people: the kind of the error and its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _is_file(where: str) -> bool:
    return where.endswith(".py") or os.sep in where
