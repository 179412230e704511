"""A worker and a frontend in the pods of a DynamoGraphDeployment, with a stand-in of the Kubernetes API."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conftest import Brokers, Run
from tests.kubernetes_api import pod_environment, serving
from vswa_plugin.dynamo.names import LOOPBACK_ENV
from vswa_plugin.launch.processes import Child, free_port, python_module

WORKER, FRONTEND = "gemma-worker-abc12345-0", "gemma-frontend-0"


async def answered(child: Child, url: str, words: str) -> Any:
    """The JSON of ``url`` once ``words`` are in it; raises where the program ends before."""
    async with aiohttp.ClientSession() as session:

        async def there() -> bool:
            try:
                async with session.get(url) as answer:
                    return answer.status == 200 and words in await answer.text()
            except (aiohttp.ClientError, OSError):
                return False

        await child.until(there, "there", 40)
        async with session.get(url) as answer:
            return json.loads(await answer.text())


def test_a_worker_serves_in_the_pod_that_dynamos_operator_makes(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    """Kubernetes is how frontend and worker find each other; etcd is there for our registry alone."""

    async def served() -> tuple[Any, Any, Any, list[str], list[int]]:
        async with serving([WORKER, FRONTEND], tmp_path) as (api, kubeconfig):
            port, system = free_port(), free_port()
            shared = {**brokers.env, **LOOPBACK_ENV, "DYN_NAMESPACE": "serving-gemma"}
            of_worker = {"DYN_NAMESPACE_WORKER_SUFFIX": "abc12345", "DYN_SYSTEM_PORT": str(system)}
            worker = await Child.start(
                "worker",
                python_module(
                    "vswa_plugin.worker", "--model", str(model_dir), "--served-model-name", "gemma"
                ),
                tmp_path,
                {**shared, **pod_environment(WORKER, kubeconfig), **of_worker},
            )
            frontend = await Child.start(
                "frontend",
                python_module("vswa_plugin.frontend", "--http-port", str(port)),
                tmp_path,
                {
                    **shared,
                    **pod_environment(FRONTEND, kubeconfig),
                    "DYN_NAMESPACE_PREFIX": "serving-gemma",
                    "DYN_SYSTEM_ENABLED": "false",
                },
            )
            try:
                await answered(frontend, f"http://127.0.0.1:{port}/v1/models", '"gemma"')
                live = await answered(worker, f"http://127.0.0.1:{system}/live", "generate")
                health = await answered(worker, f"http://127.0.0.1:{system}/health", "generate")
                body = {"model": "gemma", "prompt": "hello", "max_tokens": 3}
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer,
                ):
                    said = await answer.json()
            finally:
                codes = [await worker.stop(), await frontend.stop()]
            return live, health, said, api.applied, codes

    live, health, said, applied, codes = run(served())

    assert "ready" == live["status"] == health["status"] == health["endpoints"]["generate"]
    assert 3 == said["usage"]["completion_tokens"]
    assert {WORKER} == set(applied)
    assert [0, 0] == codes


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("ETCD_ENDPOINTS", "DYN_DISCOVERY_BACKEND: expected a registry beside 'kubernetes'"),
        ("POD_NAME", "Dynamo's runtime refuses a setting .*POD_NAME not available"),
        ("KUBECONFIG", "Dynamo's runtime refuses a setting .*failed to infer config"),
    ],
)
def test_what_a_pod_lacks_ends_the_worker_with_the_reason(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path, missing: str, words: str
) -> None:
    environ = {
        **brokers.env,
        **LOOPBACK_ENV,
        **pod_environment(WORKER, tmp_path / "kubeconfig"),
        "DYN_NAMESPACE": "serving-gemma",
        missing: "",
    }
    if missing == "KUBECONFIG":
        environ |= {"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)}
    if missing == "POD_NAME":
        del environ["POD_NAME"]

    async def ends() -> tuple[int, str]:
        command = python_module("vswa_plugin.worker", "--model-path", str(model_dir))
        child = await Child.start("worker", command, tmp_path, environ)
        code = await asyncio.wait_for(child.wait(), 40)
        return code, (tmp_path / "worker.log").read_text("utf-8")

    code, log = run(ends())

    assert code == 2, log
    last = log.strip().splitlines()[-1]
    assert last.startswith("vswa worker: error: ")
    assert re.search(words, last), last
