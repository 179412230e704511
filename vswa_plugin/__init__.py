"""Exact KV-cache-aware routing for sliding-window models behind NVIDIA Dynamo.

docs/api.md lists what plugins and other programs may import. Everything else may change in any version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vswa_plugin.hookspecs import hookimpl

#: The version of this package.
__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl"]


def __getattr__(name: str) -> Any:
    """``hookimpl`` on first use: ``vswa --version`` must not import all contracts for it."""
    if name != "hookimpl":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vswa_plugin.hookspecs import hookimpl

    return hookimpl
