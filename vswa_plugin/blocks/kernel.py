"""The compiled kernel, where there is one: table and walk of the window index, and sequence hashes.

It is optional. ``VSWA_KERNEL=0`` switches it off; without it pure Python does the same, more slowly.
"""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

from vswa_plugin.errors import ConfigError

logger = logging.getLogger(__name__)

#: Must equal the VERSION of the built module: an editable install can carry an old build.
VERSION = 4
SWITCH = "VSWA_KERNEL"
REBUILD = "install the package again with a C compiler at hand (pip install .)"


def load_kernel() -> ModuleType | None:
    """The compiled module, or None where it is switched off, was not built, or is of another version."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        module = importlib.import_module("vswa_plugin._kernel")
    except ImportError as error:
        logger.debug("no compiled kernel, pure Python serves: %s", error)
        return None
    if module.VERSION != VERSION:
        logger.warning(
            "expected compiled kernel version %s, got %s; pure Python serves: %s",
            VERSION,
            module.VERSION,
            REBUILD,
        )
        return None
    return module


def require_kernel() -> ModuleType:
    """The compiled module.

    :raises ConfigError: there is none; says how to get it.
    """
    module = load_kernel()
    if module is None:
        raise ConfigError(f"expected the compiled kernel, found none: {REBUILD}, and do not set {SWITCH}=0")
    return module
