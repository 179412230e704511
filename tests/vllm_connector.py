"""NIXL's connector of the stand-in of vLLM: it hands over no blocks, and refuses what the real one refuses.

A prefill engine keeps a finished prompt until a decode engine has fetched it; both are in this process.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

_ROLES = ("kv_producer", "kv_both", "kv_consumer")
#: Of vLLM's connectors, whether they can keep several cache groups.
_HYBRID = {"NixlConnector": True, "NixlPullConnector": True, "ExampleConnector": False}
#: Without these the real one computes the prompt itself.
_NEEDED = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
#: Of one token in one group.
BYTES = 100


@dataclass
class KVTransferConfig:
    kv_connector: str | None = None
    engine_id: str | None = None
    kv_role: str | None = None
    kv_connector_extra_config: dict[str, Any] = field(default_factory=dict)
    kv_load_failure_policy: str = "fail"

    def __post_init__(self) -> None:
        self.engine_id = self.engine_id or str(uuid.uuid4())
        if self.kv_role is not None and self.kv_role not in _ROLES:
            raise ValueError(f"Unsupported kv_role: {self.kv_role}. Supported roles are {_ROLES}")
        if self.kv_connector is not None and self.kv_role is None:
            raise ValueError(f"Please specify kv_role when kv_connector is set, supported roles are {_ROLES}")


class KVConnectorFactory:
    @classmethod
    def supports_hma_config(cls, config: KVTransferConfig) -> bool:
        if config.kv_connector == "MultiConnector":
            inner = config.kv_connector_extra_config["connectors"]
            return all(_HYBRID[each["kv_connector"]] for each in inner)
        if config.kv_connector not in _HYBRID:
            raise ValueError(f"Unsupported connector type: {config.kv_connector}")
        return _HYBRID[config.kv_connector]


class StatLoggerBase(ABC):
    @abstractmethod
    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

    @abstractmethod
    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None: ...

    @abstractmethod
    def log_engine_initialized(self) -> None: ...


class Connector:
    """Of one engine.

    :param freed: called when a prompt has been fetched: while one waits, the engine core goes on with steps.
    :ivar held: blocks of each group, by request, that wait for a decode engine.
    """

    engines: ClassVar[dict[str, Connector]] = {}

    def __init__(self, config: KVTransferConfig, groups: Sequence[Any], freed: Callable[[], None]) -> None:
        assert config.engine_id is not None
        self.engine_id, self.groups, self.freed = config.engine_id, groups, freed
        self.held: dict[str, list[list[int]]] = {}
        self._counted: dict[str, list[int]] = {}
        Connector.engines[self.engine_id] = self

    def close(self) -> None:
        self.held.clear()
        Connector.engines.pop(self.engine_id, None)

    def hold(self, finish_reason: str | None, prompt: list[int], cached: int) -> dict[str, Any] | None:
        """``kv_transfer_params`` of a request that has ended as it should."""
        if finish_reason not in ("length", "stop"):
            return None
        number = uuid.uuid4().hex
        ids = [list(range(self._blocks(group, len(prompt)))) for group in self.groups]
        self.held[number] = ids
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": tuple(ids),
            "remote_engine_id": self.engine_id,
            "remote_request_id": number,
            "remote_host": "localhost",
            "remote_port": 5600,
            "tp_size": 1,
            "remote_num_tokens": len(prompt),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": cached,
        }

    def fetch(self, params: dict[str, Any]) -> bool:
        """False: the transfer has failed."""
        if not params.get("remote_block_ids") or not all(name in params for name in _NEEDED):
            return True
        remote = Connector.engines.get(params["remote_engine_id"])
        shapes = [(group.window_size, group.block_size) for group in self.groups]
        if remote is None or shapes != [(group.window_size, group.block_size) for group in remote.groups]:
            self._count("num_failed_handshakes", 1)
            return False
        ids = remote.held.pop(params["remote_request_id"], None)
        if ids is None:
            self._count("num_failed_transfers", 1)
            return False
        self._count("bytes_transferred", BYTES * sum(map(len, ids)))
        remote.freed()
        return True

    def expire(self) -> None:
        """The time of all that waits is over."""
        self._count("num_kv_expired_reqs", *[1] * len(self.held))
        self.held.clear()

    def scheduler_stats(self) -> Any:
        """Those of one step."""
        counted, self._counted = self._counted, {}
        usage = sum(len(group) for ids in self.held.values() for group in ids) / 777
        return SimpleNamespace(kv_cache_usage=usage, kv_connector_stats=counted or None)

    def _count(self, name: str, *values: int) -> None:
        self._counted.setdefault(name, []).extend(values)

    @staticmethod
    def _blocks(group: Any, tokens: int) -> int:
        whole = -(-tokens // group.block_size)
        return (
            whole if group.window_size is None else min(whole, -(-group.window_size // group.block_size) + 1)
        )
