"""The counters, apart from the hooks, so that a test has its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric

from vswa_plugin.engine import RequestRecord
from vswa_plugin.wire import Batch, Cleared, Event, Layout, Moved, Removed, Source, Stored, Unknown

#: For a group that no Layout has named: blocks are still counted, and the label shows the fault.
UNKNOWN_WINDOW = "unknown"
#: Label of an event that clears all groups at once.
ALL_WINDOWS = "all"

#: Seconds; from a prompt reused as a whole on a GPU to a long cold prompt on a CPU.
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
#: Seconds; from one token to a long answer.
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_OF_REQUESTS = ("model", "mode")


class _Registry(CollectorRegistry):
    """Without the times at which each counter was created, which would be families of their own."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [each for each in family.samples if not each.name.endswith("_created")]
            yield family


class Collector:
    """Counters of one host, in a registry of their own. May be used from any thread.

    :ivar used: anything was counted. A worker's layout is, at its start; a router counts nothing here, and
        counters that stay at 0 would read there as requests that do not come.
    :ivar mode: of the worker; one that prefills or decodes serves half of each request.
    """

    def __init__(self) -> None:
        self.used = False
        self.mode = ""
        self._registry = registry = _Registry()
        #: (source, group id) -> window label, from the last Layout of each source.
        self._windows: dict[tuple[Source, int], str] = {}
        # prometheus_client appends _total to the names of counters.
        self._stored = Counter("vswa_kv_blocks_stored", "Blocks stored.", ["window"], registry=registry)
        self._removed = Counter(
            "vswa_kv_blocks_removed", "Blocks removed from every tier.", ["window"], registry=registry
        )
        self._moved = Counter(
            "vswa_kv_blocks_moved", "Blocks moved to another tier.", ["window"], registry=registry
        )
        self._cleared = Counter(
            "vswa_kv_clears", "Times that all blocks of a window were cleared.", ["window"], registry=registry
        )
        self._prompt = Counter(
            "vswa_prompt_tokens", "Prompt tokens of ended requests.", _OF_REQUESTS, registry=registry
        )
        self._cached = Counter(
            "vswa_cached_tokens", "Prompt tokens whose KV was reused.", _OF_REQUESTS, registry=registry
        )
        self._output = Counter("vswa_output_tokens", "Tokens generated.", _OF_REQUESTS, registry=registry)
        self._first_token = Histogram(
            "vswa_time_to_first_token_seconds",
            "Time from arrival at the worker to the first token.",
            _OF_REQUESTS,
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self._duration = Histogram(
            "vswa_request_duration_seconds",
            "Time from arrival at the worker to the end of the request.",
            _OF_REQUESTS,
            buckets=DURATION_BUCKETS,
            registry=registry,
        )

    def count_batch(self, source: Source, batch: Batch) -> None:
        """Count the events of one batch; a heartbeat counts as nothing."""
        self.used = self.used or bool(batch.events)
        for event in batch.events:
            self._count_event(source, event)

    def count_request(self, record: RequestRecord) -> None:
        """Count one request that ended."""
        self.used = True
        labels = (record.model, self.mode)
        self._prompt.labels(*labels).inc(record.prompt_tokens)
        self._cached.labels(*labels).inc(record.cached_tokens)
        self._output.labels(*labels).inc(record.output_tokens)
        self._duration.labels(*labels).observe(record.total_s)
        if record.first_token_s is not None:
            self._first_token.labels(*labels).observe(record.first_token_s)

    def text(self) -> str:
        """All metrics in Prometheus text format."""
        return generate_latest(self._registry).decode()

    def _count_event(self, source: Source, event: Event | Unknown) -> None:
        match event:
            case Layout():
                self._learn(source, event)
            case Stored():
                self._stored.labels(self._window(source, event.group_id)).inc(len(event.sequence_hashes))
            case Removed():
                self._removed.labels(self._window(source, event.group_id)).inc(len(event.sequence_hashes))
            case Moved():
                self._moved.labels(self._window(source, event.group_id)).inc(len(event.sequence_hashes))
            case Cleared(group_id=None):
                self._cleared.labels(ALL_WINDOWS).inc()
            case Cleared(group_id=int(group_id)):
                self._cleared.labels(self._window(source, group_id)).inc()

    def _learn(self, source: Source, layout: Layout) -> None:
        for group in layout.groups:
            self._windows[source, group.group_id] = group.label
            # Shown from the start: a rate over a counter that appears with its first increment misses it.
            for counter in (self._stored, self._removed, self._moved):
                counter.labels(group.label)

    def _window(self, source: Source, group_id: int) -> str:
        return self._windows.get((source, group_id), UNKNOWN_WINDOW)
