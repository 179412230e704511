"""What an engine's plugin and a worker agree on before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.engine.contract import Engine, EngineInfo, EngineSettings, EventAdapter


@dataclass(frozen=True)
class WorkerContext:
    """What a plugin needs to speak to Dynamo on behalf of a worker; given to ``vswa_worker_connected``.

    :param endpoint: the worker's endpoint as an object of Dynamo's runtime; nothing is served on it yet.
    :param worker_id: Dynamo's number of this worker.
    :param settings: what the worker was asked to run.
    :param info: what the engine states about itself: layout, data-parallel ranks, limits.
    :param rules: all reuse rules by name; ``info.layout.rule`` is one of them.
    :param event_format: of the engine's own events, e.g. ``trtllm``.
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

    Called: once per worker, at its start, before any connection is made. Local checks only (package,
        model directory, options), at most two seconds; the slow part belongs in ``Engine.start``.
    Order: stops at the first answer; look at ``settings.engine`` before anything else.
    Combine: first non-None. None from all means "unknown engine", and the worker says which are known.
    Default: ``settings.engine`` is empty where nobody has named an engine. A plugin whose engine is to be the
        default answers then too, and says the name in ``EngineInfo.engine``; all others give None.
    Errors: ConfigError is the user's answer: it goes through unchanged and the worker exits with it.
        Any other exception costs this plugin's answer; if no other plugin answers, the worker exits and
        names this one.

    :param settings: frozen; what the worker was asked to run.
    :returns: an object with the shape of ``vswa_plugin.engine.Engine``, not yet started; or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_engine_names() -> list[str]:  # type: ignore[empty-body]  # pluggy never calls it
    """Name all engines that this plugin's ``vswa_engine`` answers for.

    Called: for ``--help`` and for the message about an unknown engine. Must not import the engine.
    Order: of no effect.
    Combine: the union of all answers, sorted.
    Errors: that plugin's names are left out; counted, logged once per plugin and minute.

    :returns: names as given to ``--engine``, also those whose packages are not installed.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_event_adapter(event_format: str, layout: CacheLayout) -> EventAdapter | None:
    """Build the adapter from one engine's raw events to ours, or None for a format of another plugin.

    Called: at the worker's start, to see that there is one, then once per dp_rank when it begins to publish.
        An adapter may keep state.
    Order: stops at the first answer; look at ``event_format`` before anything else.
    Combine: first non-None. None from all is an error of the configuration.
    Errors: that plugin has no answer; counted, logged once per plugin and minute. The same holds for what
        the adapter raises later beside ProtocolError, or answers that is no list of engine events: the rank
        then begins a new epoch with nothing resident.

    :param event_format: the engine's ``event_format``, e.g. ``trtllm``.
    :param layout: frozen; the cache groups that the engine declared.
    :returns: an object with the shape of ``vswa_plugin.engine.EventAdapter``, or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_worker_connected(worker: WorkerContext) -> None:
    """Take note of a worker that has connected to Dynamo and knows its worker_id.

    Called: once per worker, on its event loop, before the engine is started and so before any batch. What a
        plugin opens here it closes in ``vswa_stopping``.
    Order: of no effect; plugins do not see one another.
    Combine: nothing is returned.
    Errors: ConfigError is the user's answer: it goes through unchanged and the worker exits with it. Any
        other exception is counted, logged once per plugin and minute, and the worker goes on.

    :param worker: frozen; endpoint, worker_id, settings, engine info and reuse rules.

    .. versionadded:: 0.1
    """
