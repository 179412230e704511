"""The events of a vLLM that runs elsewhere: reached, asked for all, corrected by what they say, lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm import listening
from vswa_plugins.vllm.adapter import lost
from vswa_plugins.vllm.source import VllmSource

from tests.vllm_helpers import BS, CONFIG, CONTEXT, WAIT_S, WINDOW
from tests.vllm_publisher import KVEventsConfig, Publisher
from vswa_plugin.engine import SourceSettings, SourceState
from vswa_plugin.errors import ConfigError
from vswa_plugin.host.loading import load_host
from vswa_plugin.launch.processes import free_port


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "QUIET_S", 0.05)


@pytest.fixture
def ports() -> tuple[str, str]:
    return f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"


class Seen:
    """A source, what it has handed on, and its states."""

    def __init__(self, source: VllmSource) -> None:
        self.source = source
        self.events: list[tuple[int, Any]] = []
        self._changed = threading.Condition()

    def take(self, rank: int, events: Sequence[Any]) -> None:
        with self._changed:
            self.events += [(rank, event) for event in events]
            self._changed.notify_all()

    def changed(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def until(self, true: Callable[[SourceState], bool]) -> SourceState:
        with self._changed:
            assert self._changed.wait_for(lambda: true(self.source.state()), WAIT_S), self.source.state()
            return self.source.state()

    def arrived(self) -> bool:
        """Whether anything comes within a moment."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self.events), 0.05)

    def ended(self) -> SourceState:
        return self.until(lambda state: state.ended is not None)


def settings(model: Path, ports: tuple[str, str | None], **more: Any) -> SourceSettings:
    options = {"block_size": BS, **more.pop("options", {})}
    return SourceSettings("vllm", "agg", str(model), "gemma", *ports, options=options, **more)


@contextmanager
def started(given: SourceSettings) -> Iterator[Seen]:
    seen = Seen(VllmSource(given))
    seen.source.start(seen.take, seen.changed)
    try:
        yield seen
    finally:
        seen.source.stop()


@contextmanager
def engine(ports: tuple[str, str], rank: int = 0, kept: int = 100) -> Iterator[Publisher]:
    made = Publisher(KVEventsConfig(True, "zmq", *ports, kept, topic="kv"), rank)
    try:
        yield made
    finally:
        made.close()


def stored(group: int | None, window: int | None, size: int = BS, **more: Any) -> dict[str, Any]:
    kind = "full_attention" if window is None else "sliding_window"
    event = {
        "type": "BlockStored",
        "block_hashes": [1],
        "parent_block_hash": None,
        "token_ids": [*range(size)],
    }
    event |= {"block_size": size, "lora_id": None, "medium": "GPU", "group_idx": group}
    return event | {"kv_cache_spec_kind": kind, "kv_cache_spec_sliding_window": window, **more}


GOOD = stored(5, None)


def test_it_is_found_by_the_name_of_the_engine_and_needs_no_vllm(model: Path, ports: tuple[str, str]) -> None:
    source = load_host(environ={}).event_source(settings(model, ports))

    assert "vllm" == source.event_format
    assert [WINDOW] * 5 + [None] == [group.window_size for group in source.info.layout.groups]
    assert ((), CONTEXT, BS) == (source.caveats, source.info.context_length, source.info.layout.block_size)


def test_what_was_published_before_is_handed_on_before_it_is_ready(
    model: Path, ports: tuple[str, str]
) -> None:
    with engine(ports) as vllm:
        for _ in range(3):
            vllm.publish([GOOD])
        with started(settings(model, ports)) as seen:
            seen.until(lambda state: state.ready)
            assert [(0, GOOD)] * 3 == seen.events
            assert (3, 3, 0) == tuple(
                seen.source.stats()[name] for name in ("events", "repaired_batches", "lost_batches")
            )


def test_it_waits_for_a_worker_that_is_not_there_yet(model: Path, ports: tuple[str, str]) -> None:
    with started(settings(model, ports)) as seen:
        assert SourceState() == seen.source.state()
        with engine(ports):
            seen.until(lambda state: state.connected and state.ready)


def test_a_batch_that_fell_between_the_answer_and_the_subscription_is_found(
    model: Path, ports: tuple[str, str]
) -> None:
    with engine(ports) as vllm, started(settings(model, ports)) as seen:
        vllm.publish([GOOD])
        seen.until(lambda state: state.ready)
        vllm.dropped = 1
        vllm.publish([stored(0, WINDOW)])
        seen.until(lambda _: len(seen.events) == 2)


def test_without_a_replay_endpoint_what_went_by_is_lost(model: Path, ports: tuple[str, str]) -> None:
    with engine(ports) as vllm:
        vllm.publish([GOOD])
        with started(settings(model, (ports[0], None))) as seen:
            seen.until(lambda state: state.ready)
            # The subscription itself may still be on its way, and what is published before it is lost too.
            while not seen.arrived():
                vllm.publish([GOOD])
            seen.until(lambda _: len(seen.events) >= 2)
            (_, first), second = seen.events[:2]
            assert (lost(0, first["got"]), (0, GOOD)) == (first, second)
            assert first["got"] >= 1


def test_each_rank_is_read_at_its_port_and_all_must_be_reached(model: Path) -> None:
    first = free_port()
    ports = f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{first + 10}"
    with started(settings(model, ports, dp_ranks=(1, 2))) as seen, engine(ports, rank=1) as vllm:
        vllm.publish([GOOD])
        seen.until(lambda _: len(seen.events) == 1)
        assert not seen.source.state().connected
        with engine(ports, rank=2):
            seen.until(lambda state: state.ready)
        assert f"the connection to tcp://127.0.0.1:{first + 2} has ended" == seen.ended().ended
    assert [(1, GOOD)] == seen.events


def test_a_connection_that_is_lost_ends_it(model: Path, ports: tuple[str, str]) -> None:
    with started(settings(model, ports)) as seen:
        with engine(ports):
            seen.until(lambda state: state.ready)
        assert f"the connection to {ports[0]} has ended" == seen.ended().ended


def test_another_block_size_is_taken_over_for_the_next_connection(
    model: Path, ports: tuple[str, str]
) -> None:
    with engine(ports) as vllm, started(settings(model, ports, options={"max_model_len": 77})) as seen:
        vllm.publish([stored(5, None, 2 * BS)])
        state = seen.ended()

        assert f"cache group 5: expected blocks of {BS} tokens, got blocks of {2 * BS}" == state.ended
        assert {"block_size": 2 * BS, "max_model_len": 77} == state.options


def test_one_pool_for_all_layers_is_taken_over_too(model: Path, ports: tuple[str, str]) -> None:
    with engine(ports) as vllm, started(settings(model, ports)) as seen:
        vllm.publish([stored(0, None)])
        options = seen.ended().options
        assert options is not None and options["disable_hybrid_kv_cache_manager"] is True
        again = VllmSource(settings(model, ports, options=options))
        assert [None] == [group.window_size for group in again.info.layout.groups]


def test_another_window_is_left_to_the_adapter(
    model: Path, ports: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    other = stored(0, 2 * WINDOW)
    with engine(ports) as vllm, started(settings(model, ports)) as seen:
        for _ in range(3):
            vllm.publish([other])
        seen.until(lambda _: len(seen.events) == 3)
        assert seen.source.state().ended is None
    assert 1 == caplog.text.count("the layout follows the events")


def test_a_group_that_config_json_does_not_explain_ends_it(model: Path, ports: tuple[str, str]) -> None:
    with engine(ports) as vllm, started(settings(model, ports)) as seen:
        vllm.publish([stored(6, None)])
        state = seen.ended()

    assert "expected events of cache groups [0, 1, 2, 3, 4, 5], got some of 6" == state.ended
    assert state.options is None


def test_rubbish_is_counted_and_logged_once(
    model: Path, ports: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with engine(ports) as vllm, started(settings(model, ports)) as seen:
        for number in range(3):
            vllm.publish([], b"\xc1")
            seen.until(lambda _, number=number: len(seen.events) == number + 1)
        assert {"unreadable_messages": 3, "lost_batches": 3}.items() <= seen.source.stats().items()
    assert 1 == caplog.text.count("cannot be read")


def test_it_stops_at_once_though_nobody_answers(model: Path, ports: tuple[str, str]) -> None:
    """Else the worker's end would wait for the time-out of an answer."""
    asked = threading.Event()
    with engine(ports) as vllm:
        vllm.answers = False
        seen = Seen(VllmSource(settings(model, ports)))
        original = listening.EventListener._comes

        def comes(self: Any, socket: Any) -> bool:
            asked.set()
            return original(self, socket)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listening, "ANSWER_S", 1e6)
            patch.setattr(listening.EventListener, "_comes", comes)
            seen.source.start(seen.take, seen.changed)
            assert asked.wait(WAIT_S)
            seen.source.stop()
            assert seen.source._listener is not None and not seen.source._listener._thread.is_alive()


def test_a_cache_of_sliding_groups_alone_has_a_caveat(tmp_path: Path, ports: tuple[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "layer_types": ["sliding_attention"] * 6}))

    (caveat,) = VllmSource(settings(tmp_path, ports)).caveats
    assert "its events do not name all blocks" in caveat


@pytest.mark.parametrize("address", ["tcp://*:5557", "tcp://h", "h:5557", "udp://h:1", "tcp://h:x", ""])
def test_an_address_that_cannot_be_connected_to_is_refused(address: str, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"^events: expected an address to connect to, such as tcp://10"):
        VllmSource(settings(model, (address, None)))
    with pytest.raises(ConfigError, match=r"^replay: expected an address to connect to"):
        VllmSource(settings(model, ("tcp://h:1", address)))


@pytest.mark.parametrize("options", [{"block_size": 0}, {"blok_size": 1}, {"max_model_len": "x"}])
def test_an_option_that_cannot_be_used_is_refused(options: dict[str, Any], model: Path) -> None:
    with pytest.raises(ConfigError, match="options"):
        VllmSource(settings(model, ("tcp://h:1", None), options=options))
