"""The state of a deployment, as its processes report it over HTTP; no answer counts as an empty one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vswa_plugin.launch.settings import ClusterSettings, router_endpoint
from vswa_plugin.router.http.guard import token_from

#: A router shows it once per rank to which it sends requests (docs/metrics.md).
USED_METRIC = "vswa_router_load_requests"
#: A request waits for its engine, all else is answered at once.
ANSWER_TIMEOUT_S, REQUEST_TIMEOUT_S = 5.0, 30.0


class Probe:
    """Asks the frontend and the routers of one cluster; a context manager.

    :param url: of the frontend.
    """

    def __init__(self, settings: ClusterSettings, url: str) -> None:
        self._settings = settings
        self._url = url
        token = token_from(os.environ)
        self._token = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(ANSWER_TIMEOUT_S))

    async def __aenter__(self) -> Probe:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def instances(self) -> Counter[str]:
        """Workers and routers that the frontend knows, by Dynamo component."""
        health = _mapping(await self._get(f"{self._url}/health"))
        endpoints = ("generate", router_endpoint(self._settings).endpoint)
        ours = (i for i in health.get("instances", ()) if i["namespace"] == self._settings.namespace)
        return Counter(i["component"] for i in ours if i["endpoint"] in endpoints)

    async def lists_model(self) -> bool:
        listing = _mapping(await self._get(f"{self._url}/v1/models"))
        return self._settings.served_model_name in [model["id"] for model in listing.get("data", ())]

    async def serves_model(self) -> bool:
        """Whether the shortest possible request is served."""
        body = {"model": self._settings.served_model_name, "prompt": "Hi", "max_tokens": 1}
        timeout = aiohttp.ClientTimeout(REQUEST_TIMEOUT_S)
        try:
            url = f"{self._url}/v1/completions"
            async with self._session.post(url, json=body, timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):  # a time-out is an OSError
            return False

    async def routed_workers(self, router_url: str) -> set[int]:
        """Ids of the workers to which that router sends requests for the model."""
        labels = [
            sample.labels
            for family in text_string_to_metric_families(
                await self._get(f"{router_url}/metrics", self._token)
            )
            for sample in family.samples
            if sample.name == USED_METRIC
        ]
        name = self._settings.served_model_name
        return {int(each["worker"]) for each in labels if each["model"] == name}

    async def _get(self, url: str, headers: Mapping[str, str] | None = None) -> str:
        """The answer's text; nothing while there is none."""
        try:
            async with self._session.get(url, headers=headers) as answer:
                return await answer.text()
        except (aiohttp.ClientError, OSError):
            return ""


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
