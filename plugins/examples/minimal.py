"""Print, per window, how many KV blocks a worker has stored and removed."""

from collections import Counter

from vswa_plugin.hookspecs import hookimpl
from vswa_plugin.wire import Batch, Layout, Removed, Source, Stored

windows: dict[tuple[Source, int], str] = {}
stored: Counter[str] = Counter()
removed: Counter[str] = Counter()


@hookimpl
def vswa_kv_batch(source: Source, batch: Batch) -> None:
    for event in batch.events:
        if isinstance(event, Layout):
            windows.update({(source, group.group_id): group.label for group in event.groups})
        elif isinstance(event, Stored):
            stored[windows[source, event.group_id]] += len(event.sequence_hashes)
        elif isinstance(event, Removed):
            removed[windows[source, event.group_id]] += len(event.sequence_hashes)
    for window in sorted(stored | removed):
        print(f"window {window}: {stored[window]} blocks stored, {removed[window]} removed", flush=True)
