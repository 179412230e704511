"""The events of a vLLM that runs elsewhere, for ``vswa relay``: one connection, from its begin to its end.

Nothing of vLLM is imported. What the worker is comes from its model's config.json and a few options; what its
events say of block size and cache groups goes over that.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from vswa_plugin.blocks import VLLM, CacheGroup, CacheLayout, Memory, Pool
from vswa_plugin.engine import EngineInfo, EventSink, Section, SourceSettings, SourceState
from vswa_plugin.errors import ConfigError, shown

from . import model
from .adapter import FORMAT
from .checks import LayoutCheck
from .grouping import layout_of, with_one_pool
from .listening import CAUGHT_UP, GONE, REACHED, EventListener
from .options import BLOCK_SIZE, precision_of
from .package import ENGINE
from .sockets import Sockets

logger = logging.getLogger(__name__)

SIZE, CONTEXT, BLOCKS, ONE_POOL = (
    "block_size",
    "max_model_len",
    "num_gpu_blocks_override",
    "disable_hybrid_kv_cache_manager",
)
OPTIONS = (SIZE, CONTEXT, BLOCKS, ONE_POOL, *model.Precision._fields)
_ADDRESS = re.compile(r"tcp://[^\s:*/]+:\d+|tcp://\[[0-9A-Fa-f:.%]+\]:\d+|ipc://\S+")


class VllmSource:
    """One worker; has the shape of ``vswa_plugin.engine.EventSource``.

    :raises ConfigError: an address, an option or config.json cannot be used, or pyzmq is not installed.
    """

    event_format = FORMAT

    def __init__(self, settings: SourceSettings) -> None:
        try:
            import zmq  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"--engine {ENGINE}: the package pyzmq is not installed: pip install 'vswa-plugin[relay]'"
            ) from error
        self._settings = settings
        self._sockets = Sockets(
            _address(settings, "events", settings.endpoint),
            "" if settings.replay is None else _address(settings, "replay", settings.replay),
        )
        self._options = Section(settings.options, settings.where, "options")
        self.info = _info(settings, self._options)
        self.caveats = _caveats(self.info.layout.groups)
        self._check = LayoutCheck(self.info.layout)
        self._noted: set[str] = set()
        self._lock = threading.Lock()
        self._reached: set[int] = set()
        self._caught_up: set[int] = set()
        self._ended: str | None = None
        self._fitting: dict[str, Any] | None = None
        self._on_change: Callable[[], None] = lambda: None
        self._listener: EventListener | None = None

    def start(self, on_events: EventSink, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        ranks = self._settings.dp_ranks
        listener = self._listener = EventListener(
            [_of_rank(self._sockets, rank) for rank in ranks],
            on_events,
            self._contradiction,
            self._end,
            ranks,
            self._connection,
        )
        listener.start()
        listener.published()

    def state(self) -> SourceState:
        with self._lock:
            ranks = len(self._settings.dp_ranks)
            return SourceState(
                len(self._reached) == ranks, len(self._caught_up) == ranks, self._ended, self._fitting
            )

    def stats(self) -> dict[str, int]:
        listener = self._listener
        if listener is None:
            return {}
        names = ("events", "batches", "repaired_batches", "lost_batches", "unreadable_messages")
        return {name: getattr(listener, name) for name in names}

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.stop(look=False)

    def _connection(self, rank: int, change: str) -> None:
        """From the listener's thread."""
        if change == GONE:
            self._end(f"the connection to {_of_rank(self._sockets, rank).endpoint} has ended")
            return
        with self._lock:
            {REACHED: self._reached, CAUGHT_UP: self._caught_up}[change].add(rank)
        self._on_change()

    def _end(self, reason: str) -> None:
        with self._lock:
            self._ended = self._ended or reason
        self._on_change()

    def _contradiction(self, event: object) -> str | None:
        """What ``event`` says against the layout, where the adapter of events cannot follow it."""
        wrong = self._check.contradiction(event)
        if wrong is None or wrong in self._noted or not isinstance(event, Mapping):
            return None
        self._noted.add(wrong)
        changed = self._fitting_options(event)
        if changed is not None:
            with self._lock:
                self._fitting = {**self._options.data, **changed}
            return wrong
        if self._is_declared(event):
            logger.warning("%s: %s; the layout follows the events", self._settings.endpoint, wrong)
            return None
        return wrong

    def _is_declared(self, event: Mapping[Any, Any]) -> bool:
        """Whether group and block size are as declared, so that only the window differs."""
        group = self._group(event)
        return group is not None and event.get("block_size") == group.block_size

    def _group(self, event: Mapping[Any, Any]) -> CacheGroup | None:
        number, groups = event.get("group_idx"), self.info.layout.groups
        if number is None and len(groups) == 1:
            return groups[0]
        return next((group for group in groups if group.group_id == number), None)

    def _fitting_options(self, event: Mapping[Any, Any]) -> dict[str, Any] | None:
        """The options with which the layout would be as the event says; None where there are none."""
        groups, size, declared = self.info.layout.groups, event.get("block_size"), self._group(event)
        if type(size) is int and size > 0 and declared is not None and size != declared.block_size:
            ratio = declared.block_size // min(group.block_size for group in groups)
            return {SIZE: max(1, size // ratio)}
        # All layers in one pool: what was declared as a sliding group is one of global attention.
        kind, first = event.get("kv_cache_spec_kind"), event.get("group_idx") in (0, None)
        if first and len(groups) > 1 and groups[0].window_size is not None and kind == "full_attention":
            return {ONE_POOL: True}
        return None


def _address(settings: SourceSettings, name: str, address: str) -> str:
    if not _ADDRESS.fullmatch(address):
        raise ConfigError(
            f"{name}: expected an address to connect to, such as tcp://10.0.0.5:5557, got {shown(address)} "
            f"(in {settings.where})"
        )
    return address


def _of_rank(sockets: Sockets, rank: int) -> Sockets:
    """As vLLM adds the number of a rank to its addresses; one without a number has rank 0 alone."""
    made = sockets if rank == 0 else sockets.of_rank(rank)
    return Sockets(made.endpoint, made.replay_endpoint if sockets.replay_endpoint else "")


def _info(settings: SourceSettings, options: Section) -> EngineInfo:
    options.check(OPTIONS)
    block_size = options.integer(SIZE, BLOCK_SIZE)
    shape = model.load_shape(settings.model_path, precision_of(options))
    layers = with_one_pool(shape.layers) if options.boolean(ONE_POOL, False) else shape.layers
    layout = layout_of(layers, block_size, settings.served_model_name).check()
    context = options.integer(CONTEXT, None) or shape.context_length
    if context is None:
        raise options.error(
            CONTEXT, "a number of tokens, because config.json has no max_position_embeddings", None
        )
    return EngineInfo(
        layout=layout,
        context_length=context,
        max_num_seqs=0,
        max_num_batched_tokens=0,
        # What such an engine has room for is not said anywhere: a guess, as for one that has not started.
        total_kv_blocks=options.integer(BLOCKS, -(-4 * context // block_size)),
        data_parallel_size=len(settings.dp_ranks),
        engine=ENGINE,
        memory=_memory(layout, options),
    )


def _memory(layout: CacheLayout, options: Section) -> Memory:
    """One pool, of which the operator may have given the size; one of its blocks is never used."""
    blocks = options.integer(BLOCKS, None)
    return Memory((Pool(tuple(g.group_id for g in layout.groups), blocks and max(1, blocks - 1)),), VLLM)


def _caveats(groups: tuple[CacheGroup, ...]) -> tuple[str, ...]:
    """Where the events alone do not name all blocks: see docs/vllm.md."""
    finest = min(group.block_size for group in groups)
    if any(group.kind == "full" and group.block_size == finest for group in groups):
        return ()
    return (
        "its cache has no group of global attention with the smallest blocks, so its events do not name all "
        "blocks; those that are not named are taken for missing",
    )
