"""Dashboard, alert rules and scrape configurations by themselves; tests/cluster has a deployment for them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy_helpers import compose
from tests.metrics_helpers import needs_promtool, promtool
from tests.monitoring_helpers import MONITORING, RULES, dashboard, panel_queries, panels, rules, unknown_names


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_alerts_name_metrics_and_labels_that_there_are(rule: dict[str, Any]) -> None:
    by = {label for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(", ")}
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))

    assert [] == unknown_names(rule["expr"])
    assert shown <= (by or {"instance"}), "expected labels that the result of the query has"
    assert {"summary", "action"} == set(rule["annotations"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")


@pytest.mark.parametrize(("title", "query"), [*panel_queries()])
def test_panels_name_metrics_and_labels_that_there_are(title: str, query: str) -> None:
    assert [] == unknown_names(query)


def test_wrong_names_are_seen() -> None:
    wrong = 'sum by (modell) (rate(vswa_index_rank{model="a"}[1m])) + vswa_index_ranks{state="live"}'

    assert ["vswa_index_rank", "vswa_index_ranks.state", "modell"] == unknown_names(wrong)


def test_the_legend_of_a_panel_has_labels_of_its_query() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            kept = {label for group in grouped for label in group.split(", ")}
            aggregated = re.match(r"(?:sum|max|min|count|histogram_quantile)\b", target["expr"])
            assert named <= kept or not aggregated, panel["title"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    every = dashboard()["panels"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in every)
        for x, y in itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
    ]

    assert len(every) == len({panel["id"] for panel in every})
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_panels_use_the_chosen_data_source() -> None:
    variables = {each["name"] for each in dashboard()["templating"]["list"]}

    assert {"datasource", "model"} == variables
    assert all("${datasource}" == panel["datasource"]["uid"] for panel in panels())


@needs_promtool
def test_promtool_reads_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    made = [{"record": f"panel:{n}", "expr": query} for n, (_, query) in enumerate(panel_queries())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": made}]}))

    assert "" == promtool("check", "rules", str(file))


@needs_promtool
def test_the_alerts_fire_when_they_should() -> None:
    assert "" == promtool("check", "rules", "--lint-fatal", str(RULES))
    assert "" == promtool("test", "rules", str(MONITORING / "rules_test.yaml"))


@needs_promtool
@pytest.mark.parametrize("name", ["compose", "kubernetes", "launch"])
def test_prometheus_reads_its_configurations(name: str, tmp_path: Path) -> None:
    text = (MONITORING / f"prometheus-{name}.yaml").read_text("utf-8")
    read = yaml.safe_load(text.replace("TARGETS", str(tmp_path / "targets.json")))
    for job in read["scrape_configs"]:
        job.pop("kubernetes_sd_configs", None)  # which Debian's build does not have
    (tmp_path / "targets.json").write_text("[]")
    (tmp_path / "rules.yaml").write_text(RULES.read_text("utf-8"))
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(read))

    assert "" == promtool("check", "config", str(tmp_path / "prometheus.yaml"))


def test_prometheus_scrapes_the_services_of_the_compose_file() -> None:
    read = yaml.safe_load((MONITORING / "prometheus-compose.yaml").read_text("utf-8"))
    found = {
        name: entry["port"]
        for job in read["scrape_configs"]
        for entry in job["dns_sd_configs"]
        for name in entry["names"]
    }
    expected = {}
    for name, service in compose()["services"].items():
        words = service.get("command", [])
        for option in ("--status-port", "--http-port"):
            if option in words:
                expected[name] = int(words[words.index(option) + 1])

    assert expected == found
