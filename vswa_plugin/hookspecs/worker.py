"""Hooks of a worker before its first request: its engine, its event adapters, its connection to Dynamo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.engine.contract import Engine, EngineInfo, EngineSettings, EventAdapter
    from vswa_plugin.engine.sources import EventSource, SourceSettings


@dataclass(frozen=True)
class WorkerContext:
    """What a plugin needs to speak to Dynamo on behalf of a worker; given to ``vswa_worker_connected``.

    :param endpoint: the worker's endpoint as an object of Dynamo's runtime. Nothing is served on it yet.
    :param worker_id: Dynamo's number of this worker.
    :param settings: what the worker is to run.
    :param info: what the engine states about itself: layout, data-parallel ranks and limits.
    :param rules: all reuse rules by name; ``info.layout.rule`` is one of them.
    :param event_format: the format of the engine's own events, for example ``trtllm``.
    """

    endpoint: Any
    worker_id: int
    settings: EngineSettings
    info: EngineInfo
    rules: Mapping[str, ReuseRule]
    event_format: str = ""


@hookspec(firstresult=True)
def vswa_engine(settings: EngineSettings) -> Engine | None:
    """Build the engine that ``settings.engine`` names, or None where that is another plugin's name.

    Called: A worker calls it once, at its start, before it makes any connection. Make local checks only
        (package, model directory, options), which take two seconds at most. The slow part belongs in
        ``Engine.start``.
    Order: The calls stop at the first answer. Look at ``settings.engine`` before anything else.
    Combine: The first answer that is not None is used. Where all are None, the engine is unknown, and the
        worker lists those that are known.
    Default: ``settings.engine`` is empty where nobody has named an engine. A plugin whose engine is to be the
        default answers then too, and states the name in ``EngineInfo.engine``. All others return None.
    Errors: ConfigError is meant for the user: it is shown unchanged, and the worker exits with it. After any
        other exception, this plugin has no answer. If no other plugin answers, the worker exits and names
        this one.

    :param settings: what the worker is to run; it is frozen.
    :returns: an object with the shape of ``vswa_plugin.engine.Engine``, not yet started; or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_engine_names() -> list[str]:  # type: ignore[empty-body]  # pluggy never calls it
    """Name all engines that this plugin's ``vswa_engine`` answers for.

    Called: A worker calls it for ``--help`` and for the message about an unknown engine. It must not import
        the engine.
    Order: The order has no effect.
    Combine: The result is the sorted union of all answers.
    Errors: The names of a plugin that fails are left out. The failure is counted, and logged once per plugin
        and minute.

    :returns: names as ``--engine`` takes them, also those whose packages are not installed.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    """Build what turns one engine's raw events into ``EngineEvent``, or return None for another format.

    Called: A worker calls it at its start, to see that there is an adapter, and then once per dp_rank when
        that begins to publish. An adapter may keep state.
    Order: The calls stop at the first answer. Look at ``event_format`` before anything else.
    Combine: The first answer that is not None is used. Where all are None, the configuration is wrong.
    Errors: A plugin that fails has no answer. The failure is counted, and logged once per plugin and minute.
        The same holds for an adapter that later raises anything but ProtocolError, or returns anything but a
        list of engine events: the rank then begins a new epoch with nothing resident.

    :param event_format: the engine's ``event_format``, for example ``trtllm``.
    :param layout: the cache groups that the engine declared; it is frozen.
    :returns: an object with the shape of ``vswa_plugin.engine.EventAdapter``, or None. It may have that of
        ``PromptAdapter``: then it is given the prompts of all requests too, while it wants them.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_event_source(settings: SourceSettings) -> EventSource | None:
    """Build what reads the KV events of a worker of another project, or None for another engine.

    Called: `vswa relay` calls it at its start for each worker of its list, and again each time that a
        connection to one has ended. Make local checks only: connections belong in ``EventSource.start``.
    Order: The calls stop at the first answer. Look at ``settings.engine`` before anything else.
    Combine: The first answer that is not None is used. Where all are None, workers of this engine cannot be
        relayed, and the relay exits with a line that says so.
    Errors: ConfigError is meant for the user: at the start it is shown unchanged, and the relay exits with
        it. After any other exception, this plugin has no answer. Later, either costs this worker alone.

    :param settings: the worker, its address and its model; it is frozen.
    :returns: an object with the shape of ``vswa_plugin.engine.EventSource``, not yet started; or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_worker_connected(worker: WorkerContext) -> None:
    """Take note of a worker that has connected to Dynamo and knows its worker_id.

    Called: The worker's event loop calls it once, before the engine is started and so before any batch. A
        plugin closes in ``vswa_stopping`` what it opens here.
    Order: The order has no effect, because plugins do not see one another.
    Combine: The hook returns nothing.
    Errors: ConfigError is meant for the user: it is shown unchanged, and the worker exits with it. Any other
        exception is counted, and logged once per plugin and minute, and the worker goes on.

    :param worker: endpoint, worker_id, settings, engine info and reuse rules; it is frozen.

    .. versionadded:: 0.1
    """
