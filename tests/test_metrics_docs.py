"""docs/metrics.md by itself: its queries, units and rows; tests/cluster compares it with running programs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from tests.metrics_helpers import DOCS, documented, needs_promtool, promtool

ROWS = documented()
TEXT = DOCS.read_text("utf-8")
#: Units that a name says, in base units; all else is counted, in a unit that the page says.
IN_NAMES = ("seconds", "bytes")


def test_every_row_is_read_and_no_family_is_there_twice() -> None:
    assert TEXT.count("\n| `vswa_") + TEXT.count("\n| `process_") == len(ROWS)
    assert not [name for name, count in Counter(row.name for row in ROWS).items() if count > 1]


def test_names_end_as_prometheus_has_it() -> None:
    for row in ROWS:
        assert (row.type == "counter") == row.name.endswith("_total"), row.name
        stem = row.name.removesuffix("_total")
        for unit in IN_NAMES:
            assert (row.unit == unit) == stem.endswith(f"_{unit}"), (row.name, row.unit)


def test_each_query_uses_its_family_and_only_families_and_labels_that_there_are() -> None:
    known = {name: row.labels for row in ROWS for name in names_of(row.name, row.type)}
    for row in ROWS:
        used = re.findall(r"\b((?:vswa|process)_[a-z_]+)\b(?:\{([^}]*)\})?", row.query)
        assert {name for name, _ in used} & set(names_of(row.name, row.type)), row.query
        for name, selector in used:
            assert name in known, (row.name, name)
            assert set(re.findall(r"(\w+)!?=", selector)) <= known[name], row.query
        by = [label for group in re.findall(r"by \(([^)]*)\)", row.query) for label in group.split(", ")]
        of_all = frozenset().union(*(known[name] for name, _ in used)) | {"le", "instance"}
        assert set(by) <= of_all, row.query


def names_of(name: str, kind: str) -> list[str]:
    return [f"{name}_{part}" for part in ("bucket", "count", "sum")] if kind == "histogram" else [name]


@needs_promtool
def test_promtool_reads_every_query(tmp_path: Path) -> None:
    rules = [{"record": f"query:{number}", "expr": row.query} for number, row in enumerate(ROWS)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "docs", "rules": rules}]}))  # JSON is YAML

    assert "" == promtool("check", "rules", str(file))


@needs_promtool
def test_promtool_complains_of_what_is_no_query(tmp_path: Path) -> None:
    file = tmp_path / "rules.yml"
    file.write_text('{"groups": [{"name": "docs", "rules": [{"record": "a", "expr": "rate(x[5m]"}]}]}')

    assert "could not parse expression" in promtool("check", "rules", str(file))
