"""What reads bytes that others sent, each with valid messages for it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from vswa_plugins.gemma3_cpu.transfer import messages as transfer
from vswa_plugins.gemma3_cpu.transfer.params import parse_params
from vswa_plugins.trtllm_events import TrtllmEventAdapter
from vswa_plugins.vllm_events import vswa_event_adapter

from tests.cases.follower_helpers import LAYOUT, entry_of
from tests.fuzz.mutations import Codec
from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.errors import VswaError
from vswa_plugin.following.reader import Apply, Reader, Reset
from vswa_plugin.index import WindowIndex
from vswa_plugin.publishing.history import History, HistoryOptions
from vswa_plugin.publishing.residency import Residency
from vswa_plugin.registry import decode_entry, encode_entry
from vswa_plugin.router.replicas import messages as load
from vswa_plugin.router.replicas.load import SharedLoad
from vswa_plugin.wire import control
from vswa_plugin.wire.events import Batch, Cleared, Layout, Moved, Rank, Removed, Stored, encode, layout_event
from vswa_plugin.wire.events import decode as decode_batch
from vswa_plugin.wire.subjects import source_of

DATA = Path(__file__).parents[1] / "data"
CORPUS = Path(__file__).with_name("corpus")
HASHES = tuple(range(2**63, 2**63 + 40))


class Target(NamedTuple):
    """:ivar read: raises an error of this project, or none.
    :ivar valid: what it reads without an error.
    :ivar codec: how values are spoilt; None: bytes only.
    """

    name: str
    read: Callable[[bytes], object]
    valid: Sequence[bytes]
    codec: Codec | None = None

    def corpus(self) -> list[bytes]:
        """Cases that failed once."""
        return [path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))]


BATCHES = [
    encode(each)
    for each in (
        Batch(1, 5, 0, 10**18, (layout_event(LAYOUT, 1.0), Stored(0, 0, None, HASHES))),
        Batch(
            1,
            5,
            2,
            10**18,
            (Removed(0, HASHES[:3]), Moved(0, HASHES[5:], "host"), Stored(0, 40, HASHES[-1], (7,))),
        ),
        Batch(1, 5, 5, 10**18, (Cleared(0), Cleared(None))),
        Batch(1, 5, 7, 10**18),
        Batch(
            1,
            6,
            0,
            10**18,
            (Layout((CacheGroup(0, 512, 32, "sliding"), CacheGroup(1, None, 64)), "vllm_hybrid", "h", "m"),),
        ),
    )
]


def _follow(payload: bytes) -> None:
    """A reader and an index take a batch as the next one, and the answer that the reader asks for."""
    reader, index, rank = Reader(), WindowIndex(kernel=False), Rank(1)
    for each in (BATCHES[0], payload, *BATCHES[1:3]):
        for effect in reader.on_batch(decode_batch(each), 0.0):
            _apply(index, rank, effect)
    reader.on_malformed(1.0)
    index.score(HASHES, 32 * len(HASHES) + 1)


def _apply(index: WindowIndex, rank: Rank, effect: object) -> None:
    match effect:
        case Reset() if rank in index.ranks:
            index.clear(rank)
        case Apply():
            for event in effect.events:
                if isinstance(event, Layout):
                    index.join(rank, event.cache_layout.check())
                else:
                    index.apply(rank, event)


REQUESTS = [
    control.encode(each)
    for each in (control.ReplayRequest(5, 0), control.SnapshotRequest(5), control.PartRequest(5, 1, 0))
]
REPLIES = [
    control.encode(each)
    for each in (
        control.Replay(5, tuple(BATCHES[:3]), 7),
        control.TooOld(5, 3),
        control.SnapshotHead(5, 1, 7, 2, 9),
        control.SnapshotPart(5, 1, 0, (layout_event(LAYOUT), Stored(0, 0, None, HASHES))),
        control.Refused(5, "expected epoch 6"),
    )
]


def _answer(payload: bytes) -> None:
    """A publisher never fails for what it is asked, and its answer can be read."""
    history = History(Residency(LAYOUT), HistoryOptions(), lambda: 0.0)
    history.begin_epoch(5)
    control.decode_reply(history.answer(payload))


def _repair(payload: bytes) -> None:
    """A reader takes in any answer that can be read, whatever it has asked for."""
    reply = control.decode_reply(payload)
    for first in (0, 7):
        reader = Reader()
        reader.on_batch(decode_batch(BATCHES[0]), 0.0)
        reader.on_batch(Batch(1, 5, first + 9, 0), 0.0)
        for _ in range(4):
            repair = reader._repair
            if repair is None or repair.pending is None:
                break
            reader.on_reply(repair.pending, reply, 1.0)
        reader.on_tick(100.0)


LOADS = [
    payload
    for words in (
        [load.Put(load.State(1, 7, 0, 90, 3), "m", HASHES, 1_281, 3, True), load.Free(2)],
        [load.Digest(0, None, (load.State(1, 7, 0, 0, 9), load.State(3, 8, 1, 0, 9))), load.Want(2, (4, 5))],
        [load.State(1, 8, 0, 0, 40), load.Bye()],
    )
    for payload in load.encode(1, words)
]


def _load(payload: bytes) -> None:
    shared = SharedLoad(2)
    shared.book("m", 32)
    for each in (LOADS[0], payload, LOADS[1]):
        shared.receive(each, 0.0)
    shared.take()
    shared.tick(99.0, True)


ENTRY = entry_of(7)
ENTRIES = [
    encode_entry(ENTRY),
    encode_entry(entry_of(7, epochs={0: 5, 1: 6}, taints=("a", "b"), status_url="http://h:1")),
]
PULLS = [transfer.frame(transfer.Pull(transfer.VERSION, "a" * 32, "f", ((0, 8), (2, 8))))[4:]]
ANSWERS = [
    transfer.frame(each)[4:]
    for each in (transfer.BlocksHeader(0, 2, 3, 300, 2**63), transfer.Done(300), transfer.PullRefused("no"))
]
VERDICTS = [transfer.frame(transfer.Ack(300))[4:], transfer.frame(transfer.Nack("no"))[4:]]
PARAMS = [
    b'{"kind":"gemma3_cpu","version":1,"host":"h","port":4,"ticket":"'
    + b"a" * 32
    + b'","fingerprint":"f","prompt_len":5,"cached_tokens":0,"first_token":3}'
]


def _json(payload: bytes) -> Any:
    """Text that some client has sent, where it is JSON at all: others have a test of their own."""
    try:
        return msgspec.json.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError):
        return None


TRTLLM = [
    msgspec.json.encode(msgspec.json.decode(line)["event"])
    for line in (DATA / "trtllm-events-v2.jsonl").read_bytes().splitlines()[:40]
]
TWO_GROUPS = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "m")


def _trtllm(payload: bytes) -> None:
    adapter = TrtllmEventAdapter(TWO_GROUPS)
    for each in (*TRTLLM[:3], payload):
        with contextlib.suppress(VswaError):
            adapter.feed(_json(each))


VLLM = [
    msgspec.msgpack.encode(each)
    for each in (
        ["BlockStored", [11, 12], None, list(range(64)), 32, None, "GPU", None, None, 0],
        {
            "type": "BlockStored",
            "block_hashes": [b"h" * 32],
            "parent_block_hash": None,
            "token_ids": list(range(32)),
            "block_size": 32,
            "lora_id": None,
        },
        ["BlockRemoved", [11], "GPU", 0],
        ["AllBlocksCleared"],
    )
]


def _vllm(payload: bytes) -> None:
    adapter = vswa_event_adapter("vllm", LAYOUT)
    assert adapter is not None
    for each in (VLLM[0], payload, VLLM[2]):
        try:
            raw = msgspec.msgpack.decode(each)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            continue
        with contextlib.suppress(VswaError):
            adapter.feed(raw)


def _subject(payload: bytes) -> None:
    source_of(payload.decode("utf-8", "replace"))


PACKED = Codec(msgspec.msgpack.decode, msgspec.msgpack.encode)
TEXT = Codec(json.loads, lambda value: json.dumps(value).encode())
TARGETS = (
    Target("batch", decode_batch, BATCHES, PACKED),
    Target("reader", _follow, BATCHES, PACKED),
    Target("request", control.decode_request, REQUESTS, PACKED),
    Target("publisher", _answer, REQUESTS, PACKED),
    Target("reply", control.decode_reply, REPLIES, PACKED),
    Target("repair", _repair, REPLIES, PACKED),
    Target("router-load", _load, LOADS, PACKED),
    Target("registry-entry", lambda payload: decode_entry(ENTRY.key, payload), ENTRIES, TEXT),
    Target(
        "subject", _subject, [b"vswa.v1.ns.backend.7.0.events", b"vswa.v1.n-s.b_c.ffffffffffffffff.3.events"]
    ),
    Target("transfer-pull", transfer.decode_pull, PULLS, PACKED),
    Target("transfer-answer", transfer.decode_answer, ANSWERS, PACKED),
    Target("transfer-verdict", transfer.decode_verdict, VERDICTS, PACKED),
    Target("transfer-params", lambda payload: parse_params(_json(payload)), PARAMS, TEXT),
    Target("trtllm-events", _trtllm, TRTLLM, TEXT),
    Target("vllm-events", _vllm, VLLM, PACKED),
)
