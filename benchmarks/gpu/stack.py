"""The processes of the benchmark: brokers, vLLM workers of ours, and the front ends of each policy."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vswa_plugin.dynamo.names import ETCD_ENV, LOOPBACK_ENV, NATS_ENV, default_endpoint
from vswa_plugin.launch.brokers import start_etcd, start_nats
from vswa_plugin.launch.processes import Child, free_port, python_module

MODEL = "bench"
#: Until a front end serves the model, once all workers are up.
FRONT_S = 60.0
#: Draining included.
STOP_S = 45.0
#: The options and the environment of our router, for each policy that has one.
ROUTERS: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "exact": ((), {}),
    "placement": ((), {"VSWA_PLUGIN_PLACEMENT_MODE": "placement"}),
    "forecast": (("--promise", "forecast"), {}),
}
#: How the frontend of each policy chooses a worker; before our router there is one to choose, the router.
POLICIES: Mapping[str, str] = {
    **dict.fromkeys(ROUTERS, "round-robin"),
    "dynamo": "kv",
    "round_robin": "round-robin",
}
#: What is compared where nothing else is asked for.
USUAL = ("exact", "placement", "dynamo", "round_robin")
Say = Callable[[str], None]


class Stack:
    """All is stopped by :meth:`stop`, whatever has been started.

    :param profile: see profiles/.
    :param folder: for logs and etcd's data.
    """

    def __init__(self, profile: Mapping[str, Any], model: Path, folder: Path, say: Say) -> None:
        self._profile, self._model, self._folder, self._say = profile, model, folder, say
        self._children: list[Child] = []
        self._workers: dict[str, tuple[Child, str]] = {}
        self._fronts: dict[str, str] = {}
        self._routers: dict[str, str] = {}
        self._routed = ""
        #: Workers by namespace.
        self._served: Counter[str] = Counter()
        self._env: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None
        folder.mkdir(parents=True, exist_ok=True)

    async def start_brokers(self) -> None:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30))
        nats, nats_url = await start_nats(self._folder)
        self._children.append(nats)
        etcd, etcd_url = await start_etcd(self._folder, self._folder / "etcd-data")
        self._children.append(etcd)
        self._env = {
            **LOOPBACK_ENV,
            NATS_ENV: nats_url,
            ETCD_ENV: etcd_url,
            "OPENBLAS_NUM_THREADS": "1",
            "DYN_LOG": os.environ.get("DYN_LOG", "warn"),
            **{name: os.environ.get(name, value) for name, value in self._profile["environment"].items()},
        }

    async def start_worker(
        self,
        name: str,
        namespace: str,
        dynamo_events: str,
        *options: str,
        mode: str = "agg",
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start one; it need not be up yet.

        :param dynamo_events: what the plugin of that name publishes for Dynamo's own router.
        """
        url = f"http://127.0.0.1:{(port := free_port())}"
        command = python_module("vswa_plugin.worker", "--mode", mode, "--engine", "vllm")
        command += ["--model-path", str(self._model), "--served-model-name", MODEL, "--register", "frontend"]
        command += ["--endpoint", f"dyn://{default_endpoint(mode, namespace)}", "--status-port", str(port)]
        command += ["--override-engine-args", json.dumps(self._profile["engine"]), *options]
        child = await self._start(name, command, {"VSWA_DYNAMO_EVENTS": dynamo_events, **(env or {})})
        self._workers[name] = (child, url)
        self._served[namespace] += 1

    async def start_front(self, policy: str, namespace: str, name: str = "") -> None:
        """Start what stands before the workers of ``namespace``.

        :param name: for :meth:`url`; the policy unless given.
        """
        name = name or policy
        shown = namespace
        if policy in ROUTERS:
            options, env = ROUTERS[policy]
            shown, self._routed = f"{namespace}-{policy}", namespace
            self._routers[name] = f"http://127.0.0.1:{(port := free_port())}"
            command = python_module("vswa_plugin.router", "--endpoint", f"dyn://{shown}.router.generate")
            command += [
                "--namespace",
                namespace,
                "--served-model-name",
                MODEL,
                "--http-port",
                str(port),
                *options,
            ]
            await self._start(f"router-{name}", command, env)
        port = free_port()
        command = python_module("vswa_plugin.frontend", "--http-port", str(port), "--namespace", shown)
        command += ["--router-mode", POLICIES[policy]]
        await self._start(f"frontend-{name}", command, {})
        self._fronts[name] = f"http://127.0.0.1:{port}"

    async def ready(self, workers_s: float) -> None:
        """Return once all workers serve, and each front end knows them and serves the model.

        :raises ChildDied, ConnectError: which one does not.
        """
        for name, (child, url) in self._workers.items():
            await child.until(partial(self._answers, f"{url}/ready"), "ready", workers_s)
            self._say(f"{name} is ready")
        front = self._children[-1]
        for name, url in self._fronts.items():
            await front.until(partial(self._serves, url), f"serving behind {name}", FRONT_S)
        for name, url in self._routers.items():
            await front.until(partial(self._router_knows, url), f"known to the router of {name}", FRONT_S)

    def url(self, name: str) -> str:
        return self._fronts[name]

    async def counters(self, front: str) -> dict[str, Counter[str]]:
        """What has been counted so far: totals of the engines, promises of the router of ``front``."""
        made: dict[str, Counter[str]] = {
            "engines": Counter(),
            "promises": Counter(),
            "requests_by_worker": Counter(),
        }
        for worker, (_, url) in self._workers.items():
            for name, _, value in await self._samples(url):
                if name.startswith("vswa_engine_") and name.endswith("_total"):
                    made["engines"][name.removeprefix("vswa_engine_").removesuffix("_total")] += int(value)
                if name == "vswa_engine_requests_total":
                    made["requests_by_worker"][worker] += int(value)
        router = self._routers.get(front)
        for name, labels, value in await self._samples(router) if router else ():
            if name == "vswa_router_predictions_total":
                made["promises"][labels["result"]] += int(value)
            elif name == "vswa_router_predicted_cached_tokens_total":
                made["promises"]["promised_tokens"] += int(value)
            elif name == "vswa_router_reported_cached_tokens_total":
                made["promises"]["reported_tokens"] += int(value)
        return made

    def check(self) -> None:
        """Raise ChildDied if anything has ended."""
        for child in self._children:
            child.check()

    async def stop(self) -> dict[str, int]:
        """Stop all, workers first; exit codes by name."""
        workers = [child for child, _ in self._workers.values()]
        others = [child for child in reversed(self._children) if child not in workers]
        codes = dict(
            zip(self._workers, await asyncio.gather(*(each.stop(STOP_S) for each in workers)), strict=True)
        )
        for child in others:
            codes[child.name] = await child.stop()
        if self._session is not None:
            await self._session.close()
        return codes

    async def _start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Child:
        child = await Child.start(name, command, self._folder, {**self._env, **env})
        self._children.append(child)
        return child

    async def _router_knows(self, url: str) -> bool:
        known = {
            labels["worker"]
            for name, labels, _ in await self._samples(url)
            if name == "vswa_router_load_requests" and labels["model"] == MODEL
        }
        return len(known) == self._served[self._routed]

    async def _serves(self, url: str) -> bool:
        body = {"model": MODEL, "prompt": [7] * 20, "max_tokens": 1}
        assert self._session is not None
        try:
            async with self._session.post(f"{url}/v1/completions", json=body) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def _answers(self, url: str) -> bool:
        assert self._session is not None
        try:
            async with self._session.get(url) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False

    async def _samples(self, url: str) -> list[tuple[str, dict[str, str], float]]:
        assert self._session is not None
        async with self._session.get(f"{url}/metrics") as answer:
            text = await answer.text()
        return [
            (sample.name, sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        ]
