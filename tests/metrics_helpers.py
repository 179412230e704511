"""Pages of metrics, read and checked as Prometheus would."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `([a-z_]+)` \| (\w+) \| (\w*) \| (.*?) \| (.+?) \| `(.+)` \|$", re.MULTILINE)

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)"
)


class Family(NamedTuple):
    """:param labels: that its samples have, without a histogram's ``le``."""

    type: str
    labels: frozenset[str]
    samples: list[Sample]

    def total(self, **labels: str) -> float:
        """Sum of the samples with these labels."""
        return sum(each.value for each in self.samples if labels.items() <= each.labels.items())


def families_of(page: str) -> dict[str, Family]:
    """By name, as TYPE lines have it; each must be there once, and each series once."""
    found: dict[str, Family] = {}
    for family in text_string_to_metric_families(page):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert name not in found, f"{name} is there twice"
        labels = frozenset(label for each in family.samples for label in each.labels) - {"le"}
        found[name] = Family(family.type, labels, family.samples)
        series = [(each.name, *sorted(each.labels.items())) for each in family.samples]
        assert len(series) == len(set(series)), f"{name} has a series twice"
    return found


class Row(NamedTuple):
    """A row of docs/metrics.md."""

    name: str
    type: str
    unit: str
    labels: frozenset[str]
    query: str


def documented() -> list[Row]:
    rows = _ROW.findall(DOCS.read_text("utf-8"))
    return [
        Row(name, kind, unit, frozenset(re.findall(r"`(\w+)`", labels)), query)
        for name, kind, unit, labels, _, query in rows
    ]


def promtool(*arguments: str, given: str = "") -> str:
    """What promtool complains of; empty: nothing."""
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, timeout=60, check=False
    )
    return "" if done.returncode == 0 and not done.stderr else done.stdout + done.stderr
