"""Hooks that show plugins the events and the requests of a worker, and one that reads their metrics."""

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

    Called: The publisher calls it once for each batch that has events, after the events have their ids. The
        batch may or may not be on its way to NATS by then. Batches of one source come in order, from one
        thread at a time. Heartbeats are not shown. This is a hot path: do no I/O, do not wait, and hand long
        work to a thread of your own.
    Order: The order has no effect, because observers do not see one another.
    Combine: The hook returns nothing.
    Errors: A plugin that fails misses this batch, which is published all the same. The failure is counted,
        and logged once per plugin and minute.

    :param source: the namespace, component, worker_id and dp_rank that publish; it is frozen.
    :param batch: the batch as it is sent. It has sequence hashes and never token ids. ``Layout`` is event 0
        of each epoch and gives the window of each group id.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_kv_stored(source: Source, stored: BlocksStored, nodes: Sequence[Node]) -> None:
    """Observe the token ids of blocks that the engine has announced.

    The token ids are sensitive, because they are the prompts of people. Token ids and engine hashes must not
    leave the worker process on any way of this project, and must not appear in a log.

    Called: The publisher calls it once for each event of the engine that stored blocks, new ones or ones that
        are announced again. The call comes before ``vswa_kv_batch`` shows the batch with this event, on the
        same thread. This is a hot path: do no I/O, and do not wait.
    Order: The order has no effect, because observers do not see one another.
    Combine: The hook returns nothing.
    Errors: A plugin that fails misses these blocks. The failure is counted, and logged once per plugin and
        minute.

    :param source: the namespace, component, worker_id and dp_rank that publish; it is frozen.
    :param stored: the engine's event in neutral form, with token ids, cache salt and LoRA; it is frozen.
    :param nodes: sequence hash, position and parent of the leading blocks of ``stored``, in order. They are
        fewer than its blocks where the others could not be named.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_engine_events(dp_rank: int, events: Sequence[RawEvent]) -> None:
    """Observe the KV events of an engine in the engine's own format.

    The events are sensitive, because they contain the token ids of people's prompts. Token ids and hashes
    must not leave the worker process unless its user asked for that, and must not appear in a log.

    Called: The engine's thread calls it with each list of events that the engine hands over, before anything
        else is done with them. The lists of one dp_rank come in the engine's order. This is a very hot path:
        append to something bounded, and do no more.
    Order: The order has no effect, because observers do not see one another.
    Combine: The hook returns nothing.
    Errors: A plugin that fails misses these events. The failure is counted, and logged once per plugin and
        minute.

    :param dp_rank: the engine's rank that the events are of.
    :param events: events in the format that ``WorkerContext.event_format`` names.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_request_arrived(request_id: str, request: RequestDict) -> None:
    """Observe one request before the engine gets it.

    The request is sensitive, because it contains the token ids of somebody's prompt. Token ids must not leave
    the worker process unless its user asked for that, and must not appear in a log.

    Called: The worker's event loop calls it once per request, before any event that the request causes. At
        the end of the request, ``vswa_request_finished`` is called. This is a hot path: do no I/O, and do not
        wait.
    Order: The order has no effect, because observers do not see one another.
    Combine: The hook returns nothing.
    Errors: A plugin that fails misses this request. The failure is counted, and logged once per plugin and
        minute.

    :param request_id: the frontend's id of the request; the record at its end has the same one.
    :param request: Dynamo's ``PreprocessedRequest``. Read it, and never change it.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_request_finished(record: RequestRecord) -> None:
    """Observe one request that has ended, whether it was finished, cancelled or failed.

    Called: The worker's event loop calls it once per request, when the engine has given its last chunk. This
        is a hot path: do no I/O, and do not wait.
    Order: The order has no effect, because observers do not see one another.
    Combine: The hook returns nothing.
    Errors: A plugin that fails misses this request. The failure is counted, and logged once per plugin and
        minute.

    :param record: counts of tokens, and durations in seconds. It is frozen, and never has token ids.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_metrics() -> str | None:
    """Return this plugin's metrics as Prometheus text, or None where it has none.

    Called: The event loop of a worker, a router or a selector calls it for each GET of ``/metrics``. It may
        take a few milliseconds.
    Order: The order has no effect.
    Combine: The texts are appended in the order of the plugins' names. The names of metrics start with
        ``vswa_`` or with a prefix of the plugin's own. A text is left out whole, because Prometheus would
        refuse the page, where it cannot be parsed, is longer than 1 MiB, has a series twice, or repeats a
        name of the program's own page or of an earlier plugin.
    Errors: The text of a plugin that fails is left out. The failure is counted, and logged once per plugin
        and minute.

    :returns: text in Prometheus' text format 0.0.4, or None.

    .. versionadded:: 0.1
    """
