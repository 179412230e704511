"""vLLM's events as a worker gets them: its own, and between them the losses of the wire. Pure.

vLLM's events carry no numbers, its batches do. Who receives the batches puts the event of :func:`lost` where
some are missing for good, so that a trace of a worker holds the loss at its place too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vswa_plugin.blocks import CacheLayout
from vswa_plugin.engine import EngineEvent, RawEvent
from vswa_plugin.errors import ProtocolError, shown

from ..vllm_events import VllmEventAdapter

#: Of the events, as ``vllm_events`` reads them.
FORMAT = "vllm"
_LOST = "BatchesLost"


def lost(expected: int, got: int) -> dict[str, Any]:
    """The event which says that the batches in [expected, got) are missing."""
    return {"type": _LOST, "expected": expected, "got": got}


class LiveEventAdapter:
    """Adapter of one data-parallel rank; has the shape of ``vswa_plugin.engine.PromptAdapter``."""

    def __init__(self, layout: CacheLayout) -> None:
        self._adapter = VllmEventAdapter(layout)
        self.prompt = self._adapter.prompt
        self.prepare = self._adapter.prepare
        self.settle = self._adapter.settle

    @property
    def wants_prompts(self) -> bool:
        return self._adapter.wants_prompts

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """Events that ``raw`` means, in order.

        :raises ProtocolError: as ``VllmEventAdapter.feed``.
        """
        if not isinstance(raw, Mapping) or raw.get("type") != _LOST:
            return self._adapter.feed(raw)
        expected, got = raw.get("expected"), raw.get("got")
        if not isinstance(expected, int) or not isinstance(got, int):
            # What is lost is lost, whether or not it can be counted.
            self._adapter.lost(0, 0)
            raise ProtocolError(f"{_LOST}: expected two numbers of batches, got {shown((expected, got))}")
        return self._adapter.lost(expected, got)
