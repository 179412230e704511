"""How a hook's contract and a plugin's implementation are marked."""

from __future__ import annotations

import pluggy

#: The project name that pluggy marks with; also the entry point group.
NAME = "vswa_plugin"

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)
