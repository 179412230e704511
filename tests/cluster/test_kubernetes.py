"""A worker and a frontend in the pods of a DynamoGraphDeployment, with a stand-in of the Kubernetes API."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.conftest import Brokers, Run
from tests.kubernetes_api import failure, pod_environment, refused, serving
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


#: Tries Dynamo's discovery as a worker does before it loads its model, for two seconds.
TRY = """
import sys

import uvloop
from vswa_plugin.dynamo.kubernetes import reach_kubernetes
from vswa_plugin.dynamo.runtime import connect
from vswa_plugin.program.run import run_program

async def main():
    await reach_kubernetes(connect().endpoint("serving-gemma.backend.generate"), 2.0, writes=True)

sys.exit(run_program("try", lambda: uvloop.run(main()) or 0))
"""


@pytest.mark.parametrize(
    ("method", "code", "reason", "words"),
    [
        ("GET", 401, "Unauthorized", "lists nothing within 2 s.*401 or 403.*lacks get, list and watch of"),
        ("GET", 403, "Forbidden", "lists nothing within 2 s.*401 or 403.*lacks get, list and watch of"),
        ("PATCH", 403, "Forbidden", "does not take the object of this pod.*lacks get, create and patch of"),
        ("PATCH", 404, "NotFound", "does not take the object of this pod.*at 404 the custom resource def"),
        ("PATCH", 500, "InternalError", "does not take the object of this pod.*lines above have the API's"),
    ],
)
def test_an_api_that_refuses_is_named_before_a_model_is_loaded(
    run: Run[Any], brokers: Brokers, tmp_path: Path, method: str, code: int, reason: str, words: str
) -> None:
    async def faults(request: web.Request) -> web.StreamResponse | None:
        return refused(code, reason, "because") if request.method == method else None

    async def ends() -> tuple[int, str]:
        async with serving([WORKER], tmp_path) as (api, kubeconfig):
            api.faults = faults
            environ = {**brokers.env, **LOOPBACK_ENV, **pod_environment(WORKER, kubeconfig)}
            command = [sys.executable, "-c", TRY]
            child = await Child.start("try", command, tmp_path, environ | {"DYN_SYSTEM_ENABLED": "false"})
            ended = await asyncio.wait_for(child.wait(), 40)
            return ended, (tmp_path / "try.log").read_text("utf-8")

    ended, log = run(ends())
    said = [line for line in log.splitlines() if line.startswith("try: failed: ")]

    assert (1, 1) == (ended, len(said)), log
    assert re.search(words, said[0])
    assert f"code: {code}" in log  # Dynamo's own line, to which ours refers
    assert "Traceback" not in log


def test_a_hiccup_of_the_api_ends_no_worker(
    run: Run[Any], brokers: Brokers, model_dir: Path, tmp_path: Path
) -> None:
    """Two writes fail before the model is loaded, one as it is shown, and of the watches the first: one is
    cut, one is too old."""
    hiccups: list[str] = []

    async def faults(request: web.Request) -> web.StreamResponse | None:
        watch = request.query.get("watch") in ("true", "1")
        if not watch and request.method != "PATCH":
            return None
        written = "model" if b'"type":"Model"' in await request.read() else "instance"
        kind = request.path if watch else written
        if hiccups.count(kind) == (2 if kind == "instance" else 1):
            return None
        hiccups.append(kind)
        if not watch:
            return refused(500, "InternalError", "etcdserver: request timed out")
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if "endpointslices" in request.path:
            gone = failure(410, "Expired", "too old resource version: 1 (2)")
            await response.write(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        else:
            await response.write(b'{"type": "ADDED", "obj')
            assert request.transport is not None
            request.transport.close()
        return response

    async def served() -> tuple[Any, int, str]:
        async with serving([WORKER], tmp_path) as (api, kubeconfig):
            api.faults = faults
            system = free_port()
            worker = await Child.start(
                "worker",
                python_module("vswa_plugin.worker", "--model", str(model_dir), "--served-model-name", "g"),
                tmp_path,
                {
                    **brokers.env,
                    **LOOPBACK_ENV,
                    **pod_environment(WORKER, kubeconfig),
                    "DYN_NAMESPACE": "serving-hiccup",
                    "DYN_SYSTEM_PORT": str(system),
                },
            )
            try:
                health = await answered(worker, f"http://127.0.0.1:{system}/health", "generate")

                async def shown() -> bool:
                    return "the model is shown" in (tmp_path / "worker.log").read_text("utf-8")

                await worker.until(shown, "shown", 40)
            finally:
                code = await worker.stop()
            return health, code, (tmp_path / "worker.log").read_text("utf-8")

    health, code, log = run(served())

    assert "ready" == health["endpoints"]["generate"]
    assert 0 == code
    assert 2 == log.count("does not take the object of this pod"), log
    assert 1 == log.count("trying on in 1 s: Failed to apply DynamoWorkerMetadata")
    assert 5 == len(hiccups)
