"""Traces made by hand: vLLM's events over blocks that have a letter each, and requests between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import vswa_plugins.trtllm_events
import vswa_plugins.vllm_events

from tests.vllm_events_helpers import SIZE, tokens_of
from vswa_plugin.accuracy.replay import replay
from vswa_plugin.accuracy.report import Report
from vswa_plugin.accuracy.trace import TraceGroup, TraceHeader, TraceRequest, TraceWriter, open_trace
from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.engine.contract import EventAdapter

DATA = Path(__file__).parent / "data"
HEADER = TraceHeader("vllm", SIZE, groups=(TraceGroup("swa", 2 * SIZE), TraceGroup("full")))


def adapter_for(event_format: str, layout: CacheLayout) -> EventAdapter:
    """As the host's, without a host."""
    for plugin in (vswa_plugins.trtllm_events, vswa_plugins.vllm_events):
        adapter = plugin.vswa_event_adapter(event_format, layout)
        if adapter is not None:
            return adapter
    pytest.fail(f"no adapter for {event_format}")


def request(path: str, cached_tokens: int, more: Sequence[int] = ()) -> TraceRequest:
    """A prompt of the blocks of ``path`` and the tokens ``more``."""
    return TraceRequest((*tokens_of(path), *more), cached_tokens)


def write(path: Path, *records: TraceRequest | dict[str, Any], header: TraceHeader = HEADER) -> Path:
    with TraceWriter(path, header) as writer:
        for record in records:
            if isinstance(record, TraceRequest):
                writer.request(record)
            else:
                writer.event(record)
    return path


def replayed(path: Path, **options: Any) -> Report:
    return replay(open_trace(path), adapter_for, **options)
