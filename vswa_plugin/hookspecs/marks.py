"""How a hook's contract and a plugin's implementation are marked."""

from __future__ import annotations

import pluggy

#: The project name that pluggy marks with; also the entry point group.
NAME = "vswa_plugin"

#: Marks the contract of a hook.
hookspec = pluggy.HookspecMarker(NAME)
#: Marks a plugin's implementation of a hook.
hookimpl = pluggy.HookimplMarker(NAME)
