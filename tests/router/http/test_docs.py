"""docs/router-api.md names every operation and limit that there is."""

from __future__ import annotations

import re
from pathlib import Path

from vswa_plugin.router.http.dump import MAX_VISITS
from vswa_plugin.router.http.messages import MAX_HASHES, MAX_TOKENS, SelectQuery
from vswa_plugin.router.http.operations import ERRORS, OPERATIONS
from vswa_plugin.router.replicas.messages import MAX_HASHES as MAX_SHARED
from vswa_plugin.router.selector.choices import NVEXT

TEXT = (Path(__file__).parents[3] / "docs" / "router-api.md").read_text("utf-8")


def test_every_operation_error_and_limit_is_named() -> None:
    for operation in OPERATIONS:
        assert f"`{operation.method} {operation.path}" in TEXT
    for status in set(ERRORS) - {500}:
        assert f"| {status} |" in TEXT
    for limit in (MAX_TOKENS, MAX_HASHES, MAX_SHARED, MAX_VISITS):
        assert f"{limit:,}" in TEXT


def test_every_wish_of_a_gateway_and_every_pin_is_named() -> None:
    for name in (
        *SelectQuery.__struct_fields__,
        *NVEXT,
        *(field for fields in NVEXT.values() for field in fields),
    ):
        assert re.search(rf'["`]{name}["`]', TEXT), name
