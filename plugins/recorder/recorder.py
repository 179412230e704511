"""One worker: a recording for each of its ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vswa_plugin.accuracy.trace import header_of
from vswa_plugin.engine import Fields, RawEvent, RequestDict, RequestRecord, unchecked_token_ids
from vswa_plugin.errors import ConfigError, InvalidRequest

from .hiding import Hiding
from .recording import Recording

if TYPE_CHECKING:
    from vswa_plugin.hookspecs import WorkerContext

logger = logging.getLogger(__name__)


class Recorder:
    """All ranks of one worker, by dp_rank."""

    def __init__(self, ranks: Sequence[Recording]) -> None:
        self.ranks = tuple(ranks)
        self._rank_of: dict[str, int] = {}

    def events(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        self.ranks[dp_rank].events(events)

    def arrived(self, request_id: str, request: RequestDict) -> None:
        """Only what its tokens tell whole, and of which the rank is known."""
        if request.get("multi_modal_data") or request.get("mm_routing_info"):
            return
        fields = Fields(request)
        try:
            routing = fields.object("routing")
            rank = routing.integer("dp_rank", None, low=0)
            token_ids = unchecked_token_ids(fields)
            salt, lora = routing.text("cache_salt"), routing.text("lora_name")
        except InvalidRequest:  # the engine refuses it too: nothing will be reused
            return
        if rank is None and len(self.ranks) == 1:
            rank = 0
        if token_ids and rank is not None and rank < len(self.ranks):
            self._rank_of[request_id] = rank
            self.ranks[rank].arrived(request_id, token_ids, salt, lora, _prompt_logprobs(request))

    def finished(self, record: RequestRecord) -> None:
        rank = self._rank_of.pop(record.request_id, None)
        if rank is not None:
            self.ranks[rank].finished(record, elsewhere=rank != record.dp_rank)

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting and close all files.

        :raises TimeoutError: some are not closed in that time; they can be read as far as they are written.
        """
        deadline = time.monotonic() + timeout_s
        for rank in self.ranks:
            rank.finish()
        open_still = [rank for rank in self.ranks if not rank.close(deadline - time.monotonic())]
        if open_still:
            paths = ", ".join(str(rank.path) for rank in open_still)
            raise TimeoutError(f"expected these traces to be closed within {timeout_s:g} s: {paths}")


def _prompt_logprobs(request: RequestDict) -> int | None:
    """What makes an engine compute the whole prompt, whatever its cache holds; None: nothing does."""
    value = (request.get("output_options") or {}).get("prompt_logprobs")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def begin(worker: WorkerContext, directory: str, tokens: str) -> Recorder:
    """Open a file per rank.

    :param tokens: ``hidden`` or ``plain``.
    :raises ConfigError: a file cannot be made, or the tokens of such events cannot be hidden.
    """
    layout, settings = worker.info.layout, worker.settings
    hiding = None
    if tokens == "hidden":
        hiding = Hiding(worker.event_format, layout.block_size, layout.rule)
    where = Path(directory)
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"recorder.directory: expected a directory, got {where}: {error.strerror}"
        ) from error
    header = header_of(worker.event_format, layout, settings.engine, settings.served_model_name)
    began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    ranks = [
        Recording(where / f"{began}-{worker.worker_id}-{rank}.jsonl.gz", header, hiding)
        for rank in range(worker.info.data_parallel_size)
    ]
    logger.warning("recording %s, token ids %s: %s", settings.engine, tokens, where)
    return Recorder(ranks)
