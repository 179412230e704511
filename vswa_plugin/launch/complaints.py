"""Why Dynamo's frontend does not serve a model: it tries again and again, and only its log has the reason."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from vswa_plugin.errors import ConnectError
from vswa_plugin.launch.processes import Child

#: What its log says of a model that it has found and cannot serve (1.6.1).
_MARK = "Model materialization failed"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_REASON = re.compile(r'error="?((?:[^"\\]|\\.)*)"?')
_MAX_SHOWN = 500


def complaint_in(log: str, model: str) -> str | None:
    """The last reason that a frontend's log gives for not serving ``model``, or None."""
    for line in reversed(log.splitlines()):
        plain = _COLOURS.sub("", line)
        # The group names the model and its endpoint, as a list in a quoted text.
        if _MARK in plain and f'["{model}"' in plain.replace("\\", ""):
            found = _REASON.search(plain)
            return (found[1] if found and found[1] else plain.strip())[:_MAX_SHOWN]
    return None


class Complaints:
    """Waits for a frontend, and passes on what it complains of meanwhile.

    :param say: gets a line for each new complaint.
    """

    def __init__(self, frontend: Child, model: str, say: Callable[[str], None]) -> None:
        self._frontend = frontend
        self._model = model
        self._say = say
        self._last: str | None = None

    async def until(self, serves: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """As :meth:`Child.until`; the error after ``timeout_s`` says what the frontend complained of last."""

        async def listening() -> bool:
            if await serves():
                return True
            self._listen()
            return False

        try:
            await self._frontend.until(listening, f"serving {self._model}", timeout_s)
        except ConnectError as error:
            self._listen()
            if self._last is None:
                raise
            raise ConnectError(f"{error}; the frontend says: {self._last}") from error

    def _listen(self) -> None:
        found = complaint_in(self._frontend.log(), self._model)
        if found is not None and found != self._last:
            self._last = found
            self._say(f"the frontend does not serve {self._model} yet: {found}")
