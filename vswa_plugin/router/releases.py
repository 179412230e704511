"""Finished prompts that no decode worker will fetch: their prefill workers free what they hold for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from vswa_plugin.dynamo.client import WorkerClient
from vswa_plugin.errors import RequestError
from vswa_plugin.router.counts import RequestCounts

logger = logging.getLogger(__name__)

#: How long a prefill worker may take to answer. It frees the prompt after a while of its own accord.
RELEASE_TIMEOUT_S = 5.0


class Releases:
    """Messages to prefill workers that are under way. Event loop only.

    :param counts: where the prompts that were freed are counted.
    """

    def __init__(self, counts: RequestCounts) -> None:
        self._counts = counts
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self, model: str, client: WorkerClient, worker_id: int, params: Mapping[str, Any]) -> None:
        """Begin to tell worker ``worker_id`` that nobody fetches the prompt that ``params`` names."""
        task = asyncio.create_task(
            self._release(model, client, worker_id, params), name=f"release {worker_id}"
        )
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def settled(self) -> None:
        """Wait for the messages that are under way."""
        while self._under_way:
            await asyncio.wait(set(self._under_way))

    async def _release(
        self, model: str, client: WorkerClient, worker_id: int, params: Mapping[str, Any]
    ) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                released = await client.release(worker_id, params)
            if released:
                self._counts.released(model)
        except (RequestError, TimeoutError) as error:
            logger.info(
                "prefill worker %d could not be told that a prompt will not be fetched: %s",
                worker_id,
                error or type(error).__name__,
            )
