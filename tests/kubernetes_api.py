"""As much of a Kubernetes API server as Dynamo's discovery uses, on a port of this machine.

Pods are ready from the start, and each is in the EndpointSlice of its component. ``DynamoWorkerMetadata``
objects are kept as they are applied. A watch is a stream of JSON lines, in the order of one resource version.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

NAMESPACE = "serving"
_META = f"/apis/nvidia.com/v1alpha1/namespaces/{NAMESPACE}/dynamoworkermetadatas"
_SLICES = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class KubernetesApi:
    """:ivar applied: names of the DynamoWorkerMetadata that were applied, in order.
    :ivar seen: method and path of each request.
    :ivar faults: called with each request in turn: another answer than the right one, or None.
    """

    def __init__(self, pods: Sequence[str]) -> None:
        self.applied: list[str] = []
        self.seen: list[str] = []
        self.faults: Callable[[web.Request], Awaitable[web.StreamResponse | None]] | None = None
        self._version = 1
        self._changed = asyncio.Condition()
        #: path -> name -> object
        self._objects: dict[str, dict[str, dict[str, Any]]] = {_META: {}, _SLICES: {}, _PODS: {}}
        self._log: dict[str, list[dict[str, Any]]] = {path: [] for path in self._objects}
        for pod in pods:
            self._objects[_SLICES][pod] = self._stamped(_endpoint_slice(pod))
            self._objects[_PODS][pod] = self._stamped(_pod(pod))

    def _stamped(self, made: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        made["metadata"] |= {"namespace": NAMESPACE, "resourceVersion": str(self._version)}
        made["metadata"].setdefault("uid", f"uid-{made['metadata']['name']}")
        return made

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path}")
        if self.faults is not None and (fault := await self.faults(request)) is not None:
            return fault
        path, _, name = request.path.rpartition("/")
        if request.path in self._objects:
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request)
            items = list(self._objects[request.path].values())
            return web.json_response(
                {"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": str(self._version)},
                 "items": items}
            )  # fmt: skip
        if path not in self._objects:
            return _no_such(request.path)
        if request.method == "PATCH":
            return web.json_response(await self._apply(path, name, json.loads(await request.read())))
        there = self._objects[path].get(name)
        if there is None:
            return _no_such(request.path)
        if request.method == "DELETE":
            await self._note(path, "DELETED", self._objects[path].pop(name))
        return web.json_response(there)

    async def _apply(self, path: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
        known = name in self._objects[path]
        made = self._objects[path][name] = self._stamped(given)
        self.applied.append(name)
        await self._note(path, "MODIFIED" if known else "ADDED", made)
        return made

    async def _note(self, path: str, kind: str, changed: dict[str, Any]) -> None:
        async with self._changed:
            self._log[path].append({"type": kind, "object": changed})
            self._changed.notify_all()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        log, since = self._log[request.path], int(request.query.get("resourceVersion") or 0)
        sent = sum(int(each["object"]["metadata"]["resourceVersion"]) <= since for each in log)
        while True:
            for event in log[sent:]:
                await response.write(json.dumps(event).encode() + b"\n")
                sent += 1
            async with self._changed:
                while len(log) == sent:
                    await self._changed.wait()


def failure(code: int, reason: str, message: str) -> dict[str, Any]:
    """The object by which the API says that it does not do what it was to do."""
    kind = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**kind, "reason": reason, "message": message, "code": code}


def refused(code: int, reason: str, message: str) -> web.Response:
    return web.json_response(failure(code, reason, message), status=code)


def _no_such(path: str) -> web.Response:
    return refused(404, "NotFound", f"{path} not found")


def _endpoint_slice(pod: str) -> dict[str, Any]:
    labels = {
        "kubernetes.io/service-name": "workers",
        "nvidia.com/dynamo-discovery-backend": "kubernetes",
        "nvidia.com/dynamo-discovery-enabled": "true",
    }
    target = {"kind": "Pod", "name": pod, "namespace": NAMESPACE, "uid": f"uid-{pod}"}
    ready = {"ready": True, "serving": True, "terminating": False}
    endpoint = {"addresses": ["127.0.0.1"], "conditions": ready, "targetRef": target}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {"name": pod, "labels": labels},
        "endpoints": [endpoint],
        "ports": [{"name": "system", "port": 9090, "protocol": "TCP"}],
    }


def _pod(pod: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod},
        "spec": {"containers": []},
        "status": {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


@asynccontextmanager
async def serving(pods: Sequence[str], folder: Path) -> AsyncIterator[tuple[KubernetesApi, Path]]:
    """The server, and a kubeconfig file by which clients find it."""
    api = KubernetesApi(pods)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
        "current-context": "x",
    }
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    try:
        yield api, file
    finally:
        await runner.cleanup()


def pod_environment(pod: str, kubeconfig: Path) -> dict[str, str]:
    """What Dynamo's operator gives to a worker's container, as far as its page of defaults says."""
    return {
        "KUBECONFIG": str(kubeconfig),
        "POD_NAME": pod,
        "POD_NAMESPACE": NAMESPACE,
        "POD_UID": f"uid-{pod}",
        "DYN_DISCOVERY_BACKEND": "kubernetes",
        "DYN_PARENT_DGD_K8S_NAME": "gemma",
        "DYN_PARENT_DGD_K8S_NAMESPACE": NAMESPACE,
        "DYN_COMPONENT": "worker",
        "DYN_HEALTH_CHECK_ENABLED": "false",
        "DYN_SYSTEM_ENABLED": "true",
        "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["generate"]',
        "NIXL_TELEMETRY_ENABLE": "n",
    }
