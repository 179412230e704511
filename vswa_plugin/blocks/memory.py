"""The memory of a rank besides its cache groups: pools, their sizes, the order of eviction. Pure."""

from __future__ import annotations

import msgspec

#: Order of eviction of TensorRT-LLM's manager V2. In each, what nobody holds for the longest time goes first.
TRTLLM_V2 = "trtllm_v2"
#: Order of eviction of TensorRT-LLM's manager V1.
TRTLLM_V1 = "trtllm_v1"
#: Order of eviction of vLLM, whose groups have one pool.
VLLM = "vllm"
EVICTION_ORDERS = (TRTLLM_V2, TRTLLM_V1, VLLM)


class Pool(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that some cache groups take from, each of them any block.

    :param group_ids: those groups.
    :param blocks: on the device; None: the engine does not say.
    :param host_blocks: on the host, to which evicted ones move; None: the engine does not say.
    """

    group_ids: tuple[int, ...]
    blocks: int | None = None
    host_blocks: int | None = None


class Memory(msgspec.Struct, frozen=True, array_like=True):
    """The memory of one rank, as far as its engine says; what is None is learnt from its events or assumed.

    :param pools: each cache group in one of them. A group that is in none has a pool of its own.
    :param eviction: one of :data:`EVICTION_ORDERS`; a later version may state another one.
    :param step_tokens: the most tokens that one step of the engine computes.
    :param max_requests: the most requests that run at a time.
    """

    pools: tuple[Pool, ...] = ()
    eviction: str | None = None
    step_tokens: int | None = None
    max_requests: int | None = None

    @property
    def stated(self) -> bool:
        """Whether the size of any pool is known."""
        return any(pool.blocks is not None for pool in self.pools)
