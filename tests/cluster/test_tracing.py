"""A request through frontend, router, prefill and decode worker: one trace of Dynamo's spans and of ours, and
logs that name it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp

from tests.conftest import Brokers, Run
from tests.e2e_helpers import eventually, own_namespace
from tests.launch_helpers import running
from tests.tracing_helpers import Seen, collector
from vswa_plugin.launch.processes import python_module

OURS = ("vswa.route", "vswa.choose", "vswa.score", "vswa.worker", "vswa.serve", "vswa.admission")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_spans_join_the_trace_of_the_client_and_logs_name_it(
    run: Run[Any], tmp_path: Path, model_dir: Path, brokers: Brokers
) -> None:
    prompt = "A prompt of a few blocks, so that something is moved. " * 8

    async def body(endpoint: str, enough: Any) -> int:
        command = python_module("vswa_plugin.launch", "disagg_router", "--engine", "gemma3_cpu")
        command += ["--http-port", "0", "--model-path", str(model_dir), "--log-dir", str(tmp_path)]
        command += ["--namespace", own_namespace("traced"), "--served-model-name", "gemma"]
        env = {**brokers.env, "DYN_LOGGING_JSONL": "true", "OTEL_EXPORT_ENABLED": "true"}
        env |= {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        # Dynamo makes its spans at the level info.
        env |= {"OTEL_BSP_SCHEDULE_DELAY": "200", "DYN_LOG": "info"}
        async with running(tmp_path, command, env) as it:
            await it.serving()
            async with aiohttp.ClientSession() as http:
                headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
                asked = {"model": "gemma", "prompt": prompt, "max_tokens": 3}
                async with http.post(f"{it.url}/v1/completions", json=asked, headers=headers) as answer:
                    assert answer.status == 200
                refused = {**asked, "n": 2}
                async with http.post(f"{it.url}/v1/completions", json=refused, headers=headers) as answer:
                    status = answer.status
            await eventually(enough, "all spans have come", 30)
            return status

    with collector() as (seen, endpoint):

        def enough() -> bool:
            mine = [span for span in seen.spans if span.trace_id == TRACE and span.name in OURS]
            return len([span for span in mine if span.name == "vswa.serve"]) >= 3 and bool(
                [span for span in mine if span.name == "vswa.route" and span.failed]
            )

        assert 400 == run(body(endpoint, enough))
        spans = [span for span in seen.spans if span.trace_id == TRACE]

    check_spans(spans)
    check_logs(tmp_path)


def check_spans(spans: list[Seen]) -> None:
    by_id = {span.span_id: span for span in spans}
    parents = {(span.name, by_id[span.parent_id].name) for span in spans if span.parent_id in by_id}
    served = [span for span in spans if span.name == "vswa.serve" and not span.failed]
    choices = [span for span in spans if span.name == "vswa.choose" and span.attributes["vswa.ranks"] == 1]
    (transfer,) = (span for span in spans if span.name == "vswa.transfer")

    assert set(OURS) <= {span.name for span in spans}
    assert {("vswa.choose", "vswa.route"), ("vswa.score", "vswa.choose")} <= parents
    assert ("vswa.worker", "vswa.route") in parents
    assert {("vswa.admission", "vswa.serve"), ("vswa.transfer", "vswa.serve")} <= parents
    above = {above for name, above in parents if name in ("vswa.route", "vswa.serve")}
    assert above and not any(name.startswith("vswa.") for name in above), "ours stand below spans of Dynamo"
    assert {"vswa-router", "vswa-worker"} <= {span.service for span in spans if span.name in OURS}
    assert {"prefill", "decode"} <= {span.attributes["vswa.phase"] for span in choices}
    assert 3 in {span.attributes["vswa.output_tokens"] for span in served}
    assert 0 < transfer.attributes["vswa.tokens"]
    assert 0 < transfer.seconds < 30


def check_logs(folder: Path) -> None:
    """Each line is an object, of ours and of Dynamo; a refusal is one line, with its ids."""
    for name in ("router-0", "prefill-0", "decode-0", "frontend"):
        lines = [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]
        assert {"time", "level", "target", "message"} <= set(lines[0]), name
    log = (folder / "router-0.log").read_text()
    (refused,) = (
        line
        for line in map(json.loads, log.splitlines())
        if "n: expected 1" in line["message"] and line["target"].startswith("vswa_plugin")
    )

    assert TRACE == refused["trace_id"]
    assert refused["request_id"] in refused["message"]
    assert "INFO" == refused["level"]
    assert "Traceback" not in log
