"""What does not work right now and is tried again: each fault is logged when it comes, not at each try."""

from __future__ import annotations

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class Faults:
    """Reasons by what fails for them, which is the beginning of a sentence: ``worker 31 is not used``."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def report(self, what: str, reason: str) -> None:
        """Note that ``what`` fails for ``reason``; this is logged unless the last reason was the same."""
        if self._known.get(what) != reason:
            logger.error("%s: %s", what, reason)
        self._known[what] = reason

    def report_all(self, reasons: Mapping[str, str]) -> None:
        """Note all that fails now; whatever is not among ``reasons`` works."""
        for what, reason in reasons.items():
            self.report(what, reason)
        self._known = dict(reasons)

    def over(self, what: str) -> None:
        """Note that ``what`` works; if it fails again, that is logged."""
        self._known.pop(what, None)
