"""Engine traces of running workers, for ``vswa accuracy replay``; see README.md."""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vswa_plugin.engine.contract import RawEvent, RequestDict
    from vswa_plugin.engine.records import RequestRecord
    from vswa_plugin.hookspecs import WorkerContext

    from .recorder import Recorder

#: A directory; nothing is recorded where it is not set.
DIRECTORY_ENV = "VSWA_RECORD"
#: ``hidden`` (also where it is not set) or ``plain``.
TOKENS_ENV = "VSWA_RECORD_TOKENS"

# One per process, as the worker is.
_recorder: Recorder | None = None


@hookimpl
def vswa_worker_connected(worker: WorkerContext) -> None:
    global _recorder
    close()
    if os.environ.get(DIRECTORY_ENV):
        from .recorder import begin

        _recorder = begin(worker, os.environ[DIRECTORY_ENV], os.environ.get(TOKENS_ENV) or "hidden")
        atexit.register(close)


@hookimpl
def vswa_engine_events(dp_rank: int, events: Sequence[RawEvent]) -> None:
    if _recorder is not None:
        _recorder.events(dp_rank, events)


@hookimpl
def vswa_request_arrived(request_id: str, request: RequestDict) -> None:
    if _recorder is not None:
        _recorder.arrived(request_id, request)


@hookimpl
def vswa_request_finished(record: RequestRecord) -> None:
    if _recorder is not None:
        _recorder.finished(record)


def close() -> None:
    """Write what is waiting, and end."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        recorder.close()
