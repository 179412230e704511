"""A forwarder over prefill and decode workers that are made of a few lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from tests.router.test_forward import FakeCall, Step
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.engine.contract import ChunkDict
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.pools import Model
from vswa_plugin.router.promises import Promises
from vswa_plugin.selection import Weights
from vswa_plugin.wire.events import Rank, Stored

P1, P2, D1, D2, AGG = Rank(11), Rank(12, 1), Rank(21), Rank(22, 2), Rank(31)
LAYOUT = CacheLayout((CacheGroup(0, 32, 16), CacheGroup(1, None, 16)), "trtllm_v2", "m")
PROMPT = list(range(160))
HASHES = list(namespaced_sequence_hashes(PROMPT, 16))


def usage(cached: int | None) -> dict[str, Any]:
    details = {} if cached is None else {"cached_tokens": cached, "audio_tokens": 0}
    return {"prompt_tokens": 160, "prompt_tokens_details": details}


def computed(cached: int | None = 0, **more: Any) -> ChunkDict:
    """The last chunk of a prefill worker."""
    last = {"token_ids": [9], "finish_reason": "length", "completion_usage": usage(cached)}
    return {**last, "disaggregated_params": {"secret": [1, "x"]}, **more}


LAST: ChunkDict = {"token_ids": [7], "finish_reason": "stop", "completion_usage": usage(160)}


async def _freed() -> bool:
    return True


class Workers:
    """All workers; each says what ``steps`` has for it, None waits. ``heard`` is called before each.

    :ivar released: worker and params of each prompt that a router has given up.
    :ivar releasing: what a prefill worker does then; by default it frees the prompt.
    """

    def __init__(self, steps: Mapping[int, list[Step]]) -> None:
        self.steps = dict(steps)
        self.ids = [11, 12, 21, 22, 31]
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.heard: Callable[[], None] = lambda: None
        self.released: list[tuple[int, Any]] = []
        self.releasing: Callable[[], Awaitable[bool]] = _freed

    def instance_ids(self) -> list[int]:
        return self.ids

    async def release(self, worker_id: int, params: Any) -> bool:
        self.released.append((worker_id, params))
        return await self.releasing()

    async def generate(
        self, request: dict[str, Any], worker_id: int, call: FakeCall
    ) -> AsyncIterator[ChunkDict]:
        self.asked.append((worker_id, request))
        for step in self.steps[worker_id]:
            self.heard()
            if isinstance(step, Exception):
                raise step
            if step is None:
                await call.gone()  # as a stream of Dynamo, it ends when the client goes
                return
            yield dict(step)


class Served:
    """A forwarder with one model on P1, P2 and D1, D2; all workers well unless ``steps`` says otherwise."""

    def __init__(
        self,
        steps: Mapping[int, list[Step]] | None = None,
        hooks: Any = None,
        agg: bool = False,
        **weights: Any,
    ) -> None:
        well: dict[int, list[Step]] = {
            **{rank.worker_id: [computed()] for rank in (P1, P2)},
            **{rank.worker_id: [{"token_ids": [5]}, LAST] for rank in (D1, D2, AGG)},
        }
        self.index = WindowIndex()
        for rank in (P1, P2, D1, D2, AGG):
            self.index.join(rank, LAYOUT)
        self.promises = Promises()
        self.hashed = 0
        decider = Decider(self.index, Weights(**weights), self._hashes, hooks)
        self.forwarder = Forwarder(decider, self.promises, lambda rank: True)
        self.workers = Workers({**well, **(steps or {})})
        model = self.model = self.forwarder.models["m"] = Model("m", Naming(16, 16))
        model.clients = dict.fromkeys(self.workers.ids, self.workers)  # type: ignore[arg-type]
        model.prefill.ranks, model.decode.ranks = (P1, P2), (D1, D2)
        model.pool.ranks = (AGG,) if agg else ()
        self.book = model.pool.book

    def _hashes(self, *of_prompt: Any) -> Sequence[int]:
        self.hashed += 1
        return namespaced_sequence_hashes(*of_prompt)

    def holds(self, rank: Rank, blocks: int) -> None:
        """Resumable there."""
        for group in (0, 1):
            self.index.apply(rank, Stored(group, 0, None, tuple(HASHES[:blocks])))

    def chunks(self, call: Any = None, **request: Any) -> AsyncIterator[ChunkDict]:
        given = {"model": "m", "token_ids": PROMPT, "stop_conditions": {"max_tokens": 50, "min_tokens": 4}}
        return self.forwarder.forward({**given, **request}, call or FakeCall())

    async def all(self, call: Any = None, **request: Any) -> list[ChunkDict]:
        return [chunk async for chunk in self.chunks(call, **request)]

    async def released(self) -> list[tuple[int, Any]]:
        """Worker and params of each prompt that the router has given up; once that is over."""
        await self.forwarder.drain(0)
        return self.workers.released

    def asked(self) -> list[int]:
        return [worker_id for worker_id, _ in self.workers.asked]

    def idle(self) -> bool:
        return len(self.book) == 0 == self.forwarder.in_flight
