"""A publisher of events as vLLM's, on real sockets of ZeroMQ."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq


@dataclass
class KVEventsConfig:
    enable_kv_cache_events: bool = False
    publisher: str | None = None
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""


class Publisher:
    """As vLLM's ``ZmqEventPublisher``, but that it publishes where it is called.

    :ivar dropped: how many of the next batches get a number and reach nobody.
    """

    def __init__(self, config: KVEventsConfig, rank: int) -> None:
        self._context = zmq.Context()
        self._rank = rank
        self._topic = config.topic.encode()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.bind(_offset(config.endpoint, rank))
        self._router = self._context.socket(zmq.ROUTER)
        assert config.replay_endpoint is not None
        self._router.bind(_offset(config.replay_endpoint, rank))
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.answers = True
        self.dropped = 0
        self.next = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def publish(self, events: list[Any], payload: bytes | None = None) -> None:
        with self._lock:
            if payload is None:
                payload = msgspec.msgpack.encode([0.0, events, self._rank])
            if self.dropped:
                self.dropped -= 1
            else:
                self._pub.send_multipart((self._topic, self.next.to_bytes(8, "big"), payload))
            self._ring.append((self.next, payload))
            self.next += 1

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._ended.is_set():
            if not self._router.poll(20):
                continue
            client, _, start = self._router.recv_multipart()
            if not self.answers:
                continue
            with self._lock:
                kept = list(self._ring)
            for number, payload in kept:
                if number >= int.from_bytes(start, "big"):
                    self._router.send_multipart(
                        (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                    )
            self._router.send_multipart((client, b"", b"", b"\xff" * 8, b""))


def _offset(endpoint: str, rank: int) -> str:
    """As vLLM: by the number behind the last colon, in addresses that have tcp in them."""
    if rank == 0:
        return endpoint
    if "tcp" not in endpoint:
        raise ValueError("Invalid endpoint: must contain 'inproc' or 'tcp'")
    before, _, port = endpoint.rpartition(":")
    return f"{before}:{int(port) + rank}"
