"""vLLM's events with the losses of their wire, through the plugin as it is installed."""

from __future__ import annotations

import pytest
from vswa_plugins.recorder.hiding import Hiding
from vswa_plugins.vllm.adapter import LiveEventAdapter, lost

from tests.vllm_events_helpers import SIZE, layout_of, stored
from vswa_plugin.engine.contract import BlocksStored, EventsLost
from vswa_plugin.errors import ProtocolError
from vswa_plugin.host.loading import load_host

LAYOUT = layout_of(None)


def test_the_installed_plugins_read_the_format_with_its_losses() -> None:
    adapter = load_host(environ={}).event_adapter("vllm", LAYOUT)

    assert [EventsLost(3, 5)] == adapter.feed(lost(3, 5))


def test_events_are_those_of_the_adapter_of_events() -> None:
    [event] = LiveEventAdapter(LAYOUT).feed(stored("ab"))

    assert isinstance(event, BlocksStored) and 2 == len(event.blocks)


def test_copies_from_before_a_loss_are_not_counted() -> None:
    """One removal ends the block, though two copies of it were stored: the first may be gone already."""
    adapter = LiveEventAdapter(LAYOUT)
    adapter.feed(stored("a"))
    adapter.feed(lost(1, 2))
    adapter.feed(stored("a"))
    removed = {"type": "BlockRemoved", "block_hashes": stored("a")["block_hashes"], "group_idx": 0}

    assert 1 == len(adapter.feed(removed))


def test_a_trace_with_hidden_tokens_keeps_the_loss() -> None:
    assert lost(3, 5) == Hiding("vllm", SIZE, "vllm").event(lost(3, 5))


@pytest.mark.parametrize("numbers", [{}, {"expected": 1}, {"expected": "1", "got": 2}])
def test_a_loss_that_cannot_be_counted_is_a_loss_and_refused(numbers: dict[str, object]) -> None:
    adapter = LiveEventAdapter(LAYOUT)
    adapter.feed(stored("a"))
    with pytest.raises(ProtocolError, match="BatchesLost: expected two numbers"):
        adapter.feed({"type": "BatchesLost", **numbers})
    removed = {"type": "BlockRemoved", "block_hashes": stored("a")["block_hashes"], "group_idx": 0}
    adapter.feed(stored("a"))

    assert 1 == len(adapter.feed(removed))
