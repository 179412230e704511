"""The contract between the host and an engine plugin: settings in, chunks and KV events out.

An engine plugin answers the hook ``vswa_engine`` with an object that has the shape of :class:`Engine`.
Requests and chunks have Dynamo's own shapes (``PreprocessedRequest`` and ``LLMEngineOutput`` as plain
dicts), so a worker passes them on as they are. The engine's KV events stay in the engine's own format;
an :class:`EventAdapter`, found through the hook ``vswa_event_adapter``, turns each into the neutral
:data:`EngineEvent` below. Engine hashes and token ids never leave the worker process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import msgspec

from vswa_plugin.blocks.layout import CacheLayout
from vswa_plugin.blocks.memory import Memory

#: An engine's own name of a block; opaque to us, unique per token prefix within one engine.
EngineHash: TypeAlias = int | str
#: One event as the engine gave it, e.g. TensorRT-LLM's JSON object as a dict.
RawEvent: TypeAlias = Mapping[str, Any]
#: Called by the engine, from any thread, with (dp_rank, events); must return at once and never raise.
EventSink: TypeAlias = Callable[[int, Sequence[RawEvent]], None]
#: Dynamo's PreprocessedRequest as a plain mapping.
RequestDict: TypeAlias = Mapping[str, Any]
#: Dynamo's LLMEngineOutput as a plain dict.
ChunkDict: TypeAlias = dict[str, Any]

#: What a worker may be: it serves whole requests, or one of their two phases.
MODES = ("agg", "prefill", "decode")
#: Which router a worker may work behind: ours, ours beside an Envoy, or the one in Dynamo's frontend.
ROUTERS = ("exact", "picker", "stock")
#: The variable in which the launcher names it to workers.
ROUTER_ENV = "VSWA_ROUTER"

#: The section of :attr:`EngineSettings.options` whose keys mean the same to every engine: ``reuse_rule``, the
#: name of a rule that the engine can keep its cache by; and, where its pools can be sized one by one,
#: ``kv_blocks``: blocks of each rank's pools, by ``sliding`` (of every sliding window) and ``global``. An
#: engine refuses what it cannot do.
ANY_ENGINE = "vswa"

#: Key of a request's first chunk for what only the worker reads; it is taken off before Dynamo sees the
#: chunk. A mapping that may hold ``dp_rank``, the rank that serves the request; ``transferred_tokens``,
#: the prompt tokens that another worker computed and this one received (``cached_tokens`` is then that
#: worker's count, not this one's); ``queue_s``, the seconds that the request waited to be admitted; and
#: ``transfer_s``, the seconds that those tokens took to come.
WORKER_ONLY = "vswa"


class EngineSettings(msgspec.Struct, frozen=True):
    """What a worker is to run; given to ``vswa_engine``.

    :param engine: the name given to ``--engine``; empty where none was named, see ``vswa_engine``.
    :param mode: one of :data:`MODES`.
    :param model_path: directory (or file) of the model.
    :param served_model_name: the name clients use.
    :param options: the engine's own options: ``--extra-engine-args`` file merged with
        ``--override-engine-args``.
    :param options_source: where ``options`` came from, for error messages.
    :param data_parallel_size: ranks to serve, each with a cache of its own.
    """

    engine: str
    mode: str
    model_path: str
    served_model_name: str
    options: dict[str, Any] = {}
    options_source: str = "no --extra-engine-args"
    data_parallel_size: int = 1


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine states about itself before it starts. Token counts unless said otherwise."""

    layout: CacheLayout
    context_length: int
    max_num_seqs: int
    max_num_batched_tokens: int
    #: Blocks of the global group (the number Dynamo calls total_kv_blocks), of one rank.
    total_kv_blocks: int
    data_parallel_size: int = 1
    #: Directory with config and tokenizer for Dynamo, where it is not the model path itself; there once the
    #: engine has started.
    model_dir: str | None = None
    #: Version of the engine's package, for operators; empty where it is not known.
    engine_version: str = ""
    #: The name that ``--engine`` takes; an engine that answers for an empty one must give it.
    engine: str = ""
    #: Names in :meth:`Engine.stats` of what only grows, such as ``steps``: counters, all else are gauges.
    totals: frozenset[str] = frozenset()
    #: Where no engine was named: why this one answers, for operators.
    reason: str = ""
    #: Pools and order of eviction of one rank; None: the engine does not say, so that readers learn what they
    #: can from its events.
    memory: Memory | None = None

    @property
    def capacity(self) -> dict[str, int]:
        """Window label (``512``, ``global``) -> blocks that one rank's device has for it, for operators.

        A window whose pool others share, or whose size is not known, is left out.
        """
        labels = {group.group_id: group.label for group in self.layout.groups}
        blocks: dict[str, int] = {}
        for pool in self.memory.pools if self.memory is not None else ():
            if len(pool.group_ids) == 1 and pool.blocks is not None:
                label = labels[pool.group_ids[0]]
                blocks[label] = blocks.get(label, 0) + pool.blocks
        return blocks


class Engine(Protocol):
    """One running model. Built by ``vswa_engine`` with local checks only; ``start`` does the slow part."""

    #: Format of the engine's events, as ``vswa_event_adapter`` gets it, e.g. ``"trtllm"``.
    event_format: str

    @property
    def info(self) -> EngineInfo:
        """What the engine states about itself; complete once it has started."""

    def start(self, on_events: EventSink) -> None:
        """Load the model and begin to serve. Called once, in a thread; may take minutes.

        :raises ConfigError: what the user can correct.
        """

    def stop(self) -> None:
        """End all requests and free what is held. Called once, in a thread, after the last request."""

    def generate(self, request: RequestDict) -> AsyncIterator[ChunkDict]:
        """Yield chunks for one request, as an async generator on the worker's event loop.

        The last chunk has ``finish_reason`` and ``completion_usage`` with
        ``prompt_tokens_details.cached_tokens``; in mode ``prefill`` ``disaggregated_params`` too, which
        the request of mode ``decode`` brings back in ``prefill_result``. An engine of several ranks says
        in the first chunk, under :data:`WORKER_ONLY`, which one serves. Closing the generator cancels the
        request and frees its blocks: an engine does its clean-up in ``finally``.

        :raises InvalidRequest: the request can never be served.
        :raises Overloaded: not now; the queue is full.
        :raises Unavailable: the engine stops or has failed.
        """

    def failure(self) -> str | None:
        """Why the engine cannot serve any more, or None while it can. Cheap; a worker asks it often."""

    def stats(self) -> dict[str, float]:
        """Numbers by name (``running``, ``waiting``, ``blocks_used``...), cheap, from any thread.

        Shown as ``vswa_engine_<name>``. A name ends in ``_<window>`` where it is of one cache group (``512``,
        ``global``), and in ``_rank_<dp_rank>`` where it is of one rank of several: both are shown as labels.
        Units are base units: seconds, bytes. The names are lower-case letters, digits and ``_``.
        """


class PromptHolder(Protocol):
    """What an engine of mode ``prefill`` may have besides, where it can let go of a finished prompt."""

    def release(self, params: Mapping[str, Any]) -> bool:
        """No decode worker will fetch the prompt of these ``disaggregated_params``: free what it holds.

        Cheap, on the worker's event loop. It does no harm to a prompt that is gone, or that a decode worker
        has begun to fetch: a router may be late, or wrong.

        :returns: whether anything was held for it.
        :raises InvalidRequest: these are no params of this engine.
        """


class EngineBlock(msgspec.Struct, frozen=True, gc=False):
    """One block of a ``stored`` event. Fewer tokens than the block size: a partial block.

    :param token_ids: all tokens between the end of its parent, or the root, and its own end: those of one
        hash unit, or of several.
    :param next_token_ids: in layouts with a lookahead: the tokens after it, as many as the layout states.
    """

    hash: EngineHash
    token_ids: tuple[int, ...]
    next_token_ids: tuple[int, ...] = ()


class BlocksStored(msgspec.Struct, frozen=True):
    """Consecutive blocks now resident in one group; the first one's parent is ``parent_hash``.

    The parent may be any block before it that was announced, of whichever group.
    """

    group_id: int
    parent_hash: EngineHash | None
    blocks: tuple[EngineBlock, ...]
    tier: str = "device"
    cache_salt: str | None = None
    lora_name: str | None = None
    dp_rank: int = 0


class BlocksRemoved(msgspec.Struct, frozen=True):
    """Blocks gone from every tier of one group. May name blocks that were never announced."""

    group_id: int
    hashes: tuple[EngineHash, ...]
    dp_rank: int = 0


class BlocksMoved(msgspec.Struct, frozen=True):
    """Blocks now on another tier: ``device``, ``host`` or ``disk``; still resident."""

    group_id: int
    hashes: tuple[EngineHash, ...]
    tier: str
    dp_rank: int = 0


#: Window in a :class:`GroupCreated` that says: there is no group of that id, though one was declared.
NO_SUCH_GROUP = 0


class GroupCreated(msgspec.Struct, frozen=True):
    """The engine's own statement about one group, to be compared with the layout that it declared.

    :param window_size: in tokens; None: the group has none; or NO_SUCH_GROUP.
    :param kind: as in :class:`~vswa_plugin.blocks.layout.CacheGroup`, where the window does not say it.
    """

    group_id: int
    window_size: int | None
    dp_rank: int = 0
    kind: str | None = None


class EventsLost(msgspec.Struct, frozen=True):
    """The engine's event ids skipped or went back: what was held before is not known any more.

    A skip says that its buffer overflowed, and what was lost cannot be requested again. An id below the
    expected one says that the engine started again.
    """

    expected_id: int
    got_id: int
    dp_rank: int = 0


#: What an event adapter makes of an engine's raw events.
EngineEvent: TypeAlias = BlocksStored | BlocksRemoved | BlocksMoved | GroupCreated | EventsLost


class EventAdapter(Protocol):
    """Turns one engine's raw events into :data:`EngineEvent`; keeps what state that needs."""

    def feed(self, raw: RawEvent) -> list[EngineEvent]:
        """Events that ``raw`` means, in order; empty for one that carries nothing we use.

        :raises ProtocolError: ``raw`` is not an event of this format; says the field and what came. What it
            said is lost, so its reader takes nothing for held from then on: nor may the adapter.
        """


class PromptAdapter(EventAdapter, Protocol):
    """An adapter that computes what its engine's events leave out; optional, see :func:`with_prompts`."""

    @property
    def wants_prompts(self) -> bool:
        """Whether :meth:`prompt` is of any use now."""

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        """A request with this prompt goes to the engine. Cheap: it is only noted."""

    def prepare(self) -> bool:
        """Do a piece of the work that :meth:`settle` would do at once; True where nothing is left."""

    def settle(self) -> list[EngineEvent]:
        """What the events fed so far mean beyond what :meth:`feed` returned: no more are there for now."""


class _WithoutPrompts:
    """Any other adapter, in that shape."""

    wants_prompts = False

    def __init__(self, adapter: EventAdapter) -> None:
        self.feed = adapter.feed

    def prompt(self, token_ids: Sequence[int], cache_salt: str | None, lora_name: str | None) -> None:
        """Do nothing: its engine's events leave nothing out."""

    def prepare(self) -> bool:
        return True

    def settle(self) -> list[EngineEvent]:
        return []


def with_prompts(adapter: EventAdapter) -> PromptAdapter:
    """``adapter`` where it has the parts of :class:`PromptAdapter`, else one with it that has them."""
    if all(hasattr(adapter, part) for part in ("wants_prompts", "prompt", "prepare", "settle")):
        return cast("PromptAdapter", adapter)
    return _WithoutPrompts(adapter)


class Node(NamedTuple):
    """What names one block of one prefix.

    :param sequence_hash: name of all tokens up to its end: Dynamo's chained hash, and in layouts with a
        lookahead one that covers the tokens after it too.
    :param position: index in its sequence of the hash unit in which it ends; in plain layouts, of the block.
    :param parent_hash: name of the prefix one hash unit before its end; None at the root.
    """

    sequence_hash: int
    position: int
    parent_hash: int | None
