"""A worker of another project: it serves an endpoint of Dynamo's and publishes vLLM's events, no more.

It answers with a token of the prompt and keeps "blocks" for ever, in each of its cache groups. SIGUSR1 takes
it out of Dynamo's discovery. As a program: ``python -m tests.relay_worker OPTIONS``, JSON with ``endpoint``,
``events``, ``replay`` and ``groups`` (windows).
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tests.vllm_publisher import KVEventsConfig, Publisher
from vswa_plugin.blocks.hashing import sequence_hashes_of_tokens
from vswa_plugin.dynamo.runtime import connect, run_on_uvloop

BS = 32


class ForeignWorker:
    """:param options: see above."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        config = KVEventsConfig(True, "zmq", options["events"], options["replay"], topic="kv-events")
        self._publisher = Publisher(config, 0)
        self._held: set[int] = set()
        self._stop = asyncio.Event()

    async def run(self) -> int:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        runtime = connect()
        endpoint = runtime.endpoint(self._options["endpoint"])

        async def serve() -> None:
            await endpoint.serve_endpoint(self.generate, graceful_shutdown=True)

        serving = asyncio.create_task(serve())
        _say("SERVES", int(endpoint.connection_id()))
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, lambda: loop.create_task(self._hide(endpoint)))
        await self._stop.wait()
        runtime.shutdown()
        self._publisher.close()
        await asyncio.wait({serving}, timeout=10)
        return 0

    async def _hide(self, endpoint: Any) -> None:
        await endpoint.unregister_endpoint_instance()
        _say("HIDDEN", 1)

    # Dynamo looks the parameters up by these names.
    async def generate(self, request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
        prompt = list(request["token_ids"])
        names = sequence_hashes_of_tokens(prompt, BS)
        known = next((at for at, name in enumerate(names) if name not in self._held), len(names))
        self._store(prompt, names, known)
        _say("HELD", len(self._held))
        cached = min(known * BS, (len(prompt) - 1) // BS * BS)
        details = {"cached_tokens": cached}
        yield {
            "token_ids": prompt[:1],
            "index": 0,
            "finish_reason": "length",
            "completion_usage": {
                "prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1,
                "prompt_tokens_details": details,
            },
        }  # fmt: skip

    def _store(self, prompt: list[int], names: Any, known: int) -> None:
        new = [int(name) for name in names[known:]]
        if not new:
            return
        self._held.update(new)
        self._publisher.publish(
            [
                {
                    "type": "BlockStored",
                    "block_hashes": new,
                    "parent_block_hash": int(names[known - 1]) if known else None,
                    "token_ids": prompt[known * BS : len(names) * BS],
                    "block_size": BS,
                    "lora_id": None,
                    "medium": "GPU",
                    "group_idx": number,
                    "kv_cache_spec_kind": "full_attention" if window is None else "sliding_window",
                    "kv_cache_spec_sliding_window": window,
                }
                for number, window in enumerate(self._options["groups"])
            ]
        )


def _say(word: str, number: int) -> None:
    sys.stdout.write(f"{word} {number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_on_uvloop(ForeignWorker(json.loads(sys.argv[1])).run()))
