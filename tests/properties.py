"""How many examples Hypothesis tries: a number for each property, and a profile for all of them.

``laptop``  (default) as written; new examples each time, failures are remembered in ``.hypothesis``
``quick``   a tenth of them, for ``make quick``
``ci``      as written and the same each time, so that a change fails for what it changes

No profile has a deadline: on a loaded machine one would say nothing of the code.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

#: The examples of the profile ``laptop``, of which ``examples`` takes a share.
FULL = 100


def register_profiles() -> None:
    """Make the profiles known, and load the one that HYPOTHESIS_PROFILE names."""
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("laptop", max_examples=FULL, **common)
    settings.register_profile("quick", max_examples=FULL // 10, **common)
    settings.register_profile("ci", max_examples=FULL, derandomize=True, print_blob=True, **common)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "laptop"))


def examples(full: int, **others: Any) -> settings:
    """Settings of one property: ``full`` examples, or the share of them that the profile wants."""
    return settings(max_examples=max(1, full * settings().max_examples // FULL), **others)
