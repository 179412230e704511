"""Engine traces of running workers, for ``vswa accuracy replay``; see README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vswa_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vswa_plugin.engine import RawEvent, RequestDict, RequestRecord, Section
    from vswa_plugin.hookspecs import WorkerContext

    from .recorder import Recorder

#: What is called only to record.
RECORDING = (
    "vswa_worker_connected",
    "vswa_engine_events",
    "vswa_request_arrived",
    "vswa_request_finished",
    "vswa_stopping",
)
#: What may become of token ids; the first where nobody says.
TOKENS = ("hidden", "plain")


class RecorderPlugin:
    """The hooks of one worker, and its recordings while it records."""

    option_variables: ClassVar[Mapping[str, str]] = {
        "VSWA_RECORD": "directory",
        "VSWA_RECORD_TOKENS": "tokens",
    }

    def __init__(self) -> None:
        self._recorder: Recorder | None = None
        self._directory: str | None = None
        self._tokens = TOKENS[0]

    @hookimpl
    def vswa_options(self, options: Section) -> Sequence[str] | None:
        options.check({"directory", "tokens"})
        self._directory = options.text("directory", None)
        self._tokens = options.choice("tokens", TOKENS, TOKENS[0])
        return RECORDING if self._directory is None else None

    @hookimpl
    def vswa_worker_connected(self, worker: WorkerContext) -> None:
        if self._directory is not None:
            from .recorder import begin

            self._recorder = begin(worker, self._directory, self._tokens)

    @hookimpl
    def vswa_engine_events(self, dp_rank: int, events: Sequence[RawEvent]) -> None:
        if self._recorder is not None:
            self._recorder.events(dp_rank, events)

    @hookimpl
    def vswa_request_arrived(self, request_id: str, request: RequestDict) -> None:
        if self._recorder is not None:
            self._recorder.arrived(request_id, request)

    @hookimpl
    def vswa_request_finished(self, record: RequestRecord) -> None:
        if self._recorder is not None:
            self._recorder.finished(record)

    @hookimpl
    def vswa_stopping(self, budget_s: float) -> None:
        """Write what is waiting, and close the files."""
        if self._recorder is not None:
            self._recorder.close(budget_s)
