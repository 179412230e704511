"""What plugins are shown while a worker serves, and what they tell of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vswa_plugin.engine.contract import BlocksStored, Node, RawEvent, RequestDict
    from vswa_plugin.engine.records import RequestRecord
    from vswa_plugin.wire.events import Batch, Source


@hookspec
def vswa_kv_batch(source: Source, batch: Batch) -> None:
    """Observe one numbered batch of KV events, of all windows.

    Called: on the publisher's side, once per batch that has events, after its events got their ids and
        before or after it is handed to the wire; batches of one source come in order, from one thread at
        a time. Not for heartbeats. Hot path: no I/O, no waiting; hand long work to a thread of your own.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses this batch, which is published all the same; counted, logged once per
        plugin and minute.

    :param source: frozen; namespace, component, worker_id and dp_rank that publish.
    :param batch: the batch as it goes out: sequence hashes, never token ids. ``Layout`` is event 0 of
        each epoch and says which group id has which window.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_kv_stored(source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
    """Observe the token ids of blocks that the engine has announced. Sensitive: they are people's prompts.

    Tokens and engine hashes must not leave the worker process by any way of our own, nor reach a log.

    Called: on the publisher's side, once per event of the engine that stored blocks, new or announced again,
        before ``vswa_kv_batch`` shows the batch that it falls into; on the same thread. Hot path: no I/O, no
        waiting.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses these blocks; counted, logged once per plugin and minute.

    :param source: frozen; namespace, component, worker_id and dp_rank that publish.
    :param stored: frozen; the engine's event in neutral form, with token ids, cache salt and LoRA.
    :param nodes: sequence hash, position and parent of the leading blocks of ``stored``, in order; fewer than
        its blocks where the others could not be named.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_engine_events(dp_rank: int, events: Sequence[RawEvent]) -> None:
    """Observe an engine's KV events as it gave them. Sensitive: they hold the tokens of people's prompts.

    Tokens and hashes must not leave the worker process unless its user asked for that, nor reach a log.

    Called: on the engine's thread, with each list of events that it hands over, before anything else is done
        with them; per dp_rank in the engine's order. Very hot path: append to something bounded, no more.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses these events; counted, logged once per plugin and minute.

    :param dp_rank: of the engine's rank.
    :param events: in the format that ``WorkerContext.event_format`` names.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_request_arrived(request_id: str, request: RequestDict) -> None:
    """Observe one request before the engine gets it. Sensitive: it holds the tokens of somebody's prompt.

    Tokens must not leave the worker process unless its user asked for that, nor reach a log.

    Called: on the worker's event loop, once per request, before any event that it causes;
        ``vswa_request_finished`` tells its end. Hot path: no I/O, no waiting.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses this request; counted, logged once per plugin and minute.

    :param request_id: the frontend's id, as in the record at its end.
    :param request: Dynamo's ``PreprocessedRequest``; read it, never change it.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_request_finished(record: RequestRecord) -> None:
    """Observe one request that ended: finished, cancelled or failed.

    Called: on the worker's event loop, once per request, when the engine has given its last chunk. Hot path:
        no I/O, no waiting.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses this request; counted, logged once per plugin and minute.

    :param record: frozen; counts of tokens and durations in seconds, never token ids.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_metrics() -> str | None:
    """Give this plugin's metrics as Prometheus text, or None where it has none.

    Called: for each GET of ``/metrics`` of a worker, a router or a selector, on its event loop; a few
        milliseconds at most.
    Order: of no effect.
    Combine: the texts are appended, by plugin name. Names start with ``vswa_`` or the plugin's own prefix;
        a text that does not parse, that is longer than 1 MiB, that has a series twice, or that repeats a
        name of the program's own page or of an earlier plugin, is left out whole, because Prometheus would
        refuse the page.
    Errors: that plugin's text is left out; counted, logged once per plugin and minute.

    :returns: Prometheus text format 0.0.4, or None.

    .. versionadded:: 0.1
    """
