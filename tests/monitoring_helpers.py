"""The dashboard and the alert rules of deploy/monitoring, and the metrics that their queries name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy_helpers import DEPLOY
from tests.metrics_helpers import Row, documented

MONITORING = DEPLOY / "monitoring"
RULES = MONITORING / "rules.yaml"
#: Of Prometheus itself and of its scrapes.
_ANYWHERE = {"job", "instance", "le"}
_FUNCTIONS = {"bucket", "count", "sum"}


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboard.json").read_text("utf-8"))
    return read


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[tuple[str, str]]:
    """Title, and query with a fixed interval and all models."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")


def unknown_names(query: str) -> list[str]:
    """What a query names that docs/metrics.md does not have: metrics, and labels of theirs."""
    rows = {name: row for row in documented() for name in _names(row)}
    wrong = []
    used = re.findall(r"\b((?:vswa|process)_[a-z_]+)\b(?:\{([^}]*)\})?", query)
    for name, selector in used:
        if name not in rows:
            wrong.append(name)
            continue
        labels = rows[name].labels | _ANYWHERE
        wrong += [
            f"{name}.{label}" for label in re.findall(r"(\w+)\s*[!=]~?=?\"", selector) if label not in labels
        ]
    known = frozenset().union(*(rows[name].labels for name, _ in used if name in rows)) | _ANYWHERE
    for group in re.findall(r"by \(([^)]*)\)", query):
        wrong += [label for label in group.split(", ") if label not in known]
    return wrong


def _names(row: Row) -> list[str]:
    return [f"{row.name}_{part}" for part in _FUNCTIONS] if row.type == "histogram" else [row.name]
