"""Every extension point of vswa-plugin. The docstrings are the contract; there is no logic here.

A plugin is a module or an object with functions that carry the names below and the mark ``@hookimpl``::

    from vswa_plugin.hookspecs import hookimpl

    @hookimpl
    def vswa_kv_batch(source, batch):
        ...

What holds for all hooks:

* Implementations are plain functions: no ``async def``, no generators, no wrappers.
* Arguments are passed by name; an implementation takes those that it needs and leaves out the rest.
* Arguments are shared by all plugins: read them, never change them.
* Each implementation is called on its own. One that fails costs its own answer and nothing else: the
  failure is counted, and logged once per plugin, hook and minute.
* ``tryfirst=True`` and ``trylast=True`` move an implementation to the front or the back; otherwise plugins
  are called by their name, in alphabetical order, so the order in which they were loaded never shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vswa_plugin.accuracy.ranks import RankSetup, SimulatedRank
    from vswa_plugin.accuracy.scorers import Scorer
    from vswa_plugin.commands import Commands
    from vswa_plugin.engine import (
        BlocksStored,
        Engine,
        EngineInfo,
        EngineSettings,
        EventAdapter,
        RawEvent,
        RequestDict,
    )
    from vswa_plugin.events import Batch, Rank, Source
    from vswa_plugin.layout import CacheLayout
    from vswa_plugin.nodes import Node
    from vswa_plugin.records import RequestRecord
    from vswa_plugin.reuse import ReuseRule
    from vswa_plugin.selection import RoutedRequest, Scored

#: The project name that pluggy marks with; also the entry point group.
NAME = "vswa_plugin"

hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


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


# -- engines ---------------------------------------------------------------------------------------


@hookspec(firstresult=True)
def vswa_engine(settings: EngineSettings) -> Engine | None:
    """Build the engine that ``settings.engine`` names, or None where that is another plugin's name.

    Called: once per worker, at its start, before any connection is made. Local checks only (package,
        model directory, options), at most two seconds; the slow part belongs in ``Engine.start``.
    Order: stops at the first answer; look at ``settings.engine`` before anything else.
    Combine: first non-None. None from all means "unknown engine", and the worker says which are known.
    Errors: ConfigError is the user's answer: it goes through unchanged and the worker exits with it.
        Any other exception costs this plugin's answer; if no other plugin answers, the worker exits and
        names this one.

    :param settings: frozen; what the worker was asked to run.
    :returns: an object with the shape of ``vswa_plugin.engine.Engine``, not yet started; or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_engine_names() -> list[str]:  # type: ignore[empty-body]
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
    Errors: that plugin has no answer; counted, logged once per plugin and minute.

    :param event_format: the engine's ``event_format``, e.g. ``trtllm``.
    :param layout: frozen; the cache groups that the engine declared.
    :returns: an object with the shape of ``vswa_plugin.engine.EventAdapter``, or None.

    .. versionadded:: 0.1
    """


# -- worker ----------------------------------------------------------------------------------------


@hookspec
def vswa_worker_connected(worker: WorkerContext) -> None:
    """Take note of a worker that has connected to Dynamo and knows its worker_id.

    Called: once per worker, on its event loop, before the engine is started and so before any batch. What a
        plugin opens here lives as long as the process.
    Order: of no effect; plugins do not see one another.
    Combine: nothing is returned.
    Errors: ConfigError is the user's answer: it goes through unchanged and the worker exits with it. Any
        other exception is counted, logged once per plugin and minute, and the worker goes on.

    :param worker: frozen; endpoint, worker_id, settings, engine info and reuse rules.

    .. versionadded:: 0.1
    """


# -- routing ---------------------------------------------------------------------------------------


@hookspec
def vswa_reuse_rules() -> Mapping[str, ReuseRule] | None:
    """Add reuse rules: how far an engine can resume a prompt, from the blocks that each group holds.

    Called: once where predictions are made, at the start of a router or of a command that explains them.
        The rules themselves are then on the hot path: no I/O, no state, from any thread.
    Order: by plugin name; a rule that is there already cannot be replaced.
    Combine: all rules, the built-in ones included. A name that is taken costs that plugin its rules; the
        message names both owners.
    Errors: all rules of that plugin are left out; counted, logged once per plugin and minute.

    :returns: by name, objects with the shape of ``vswa_plugin.reuse.ReuseRule``; a layout names its rule.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_score(request: RoutedRequest, candidates: Sequence[Scored]) -> Mapping[Rank, float] | None:
    """Adjust what some candidates cost: blocks to add, below 0 to take off.

    Called: on a router's event loop, once per request and phase, after all were scored and before one is
        chosen. Hot path: no I/O, no waiting.
    Order: of no effect; all see the costs of the router itself.
    Combine: the sum of all answers, added to the router's own costs.
    Errors: that plugin adjusts nothing for this request; counted, logged once per plugin and minute. A rank
        that is no candidate and a number that is not finite are errors.

    :param request: frozen; lengths, sequence hashes and what the client sent in ``x-dynamo-meta-*`` headers,
        never token ids.
    :param candidates: frozen; rank, cached tokens, load and cost in blocks of each that may serve it.
    :returns: by rank, blocks to add; ranks left out keep their cost. None adjusts nothing.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_select_worker(request: RoutedRequest, candidates: Sequence[Scored]) -> Rank | None:
    """Choose the rank that serves a request, or None to leave that to others.

    Called: on a router's event loop, once per request and phase, after ``vswa_score``. Hot path: no I/O, no
    waiting.
    Order: stops at the first answer; the router's own choice comes last.
    Combine: first non-None. None from all: the cheapest, or one drawn by ``--router-temperature``.
    Errors: that plugin has no answer; counted, logged once per plugin and minute. A rank that is no
        candidate is an error.

    :param request: frozen; as ``vswa_score`` gets it.
    :param candidates: frozen; with all adjustments in their costs.
    :returns: the rank of one of the candidates, or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_accuracy_scorers(layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> Sequence[Scorer] | None:
    """Add ways to predict how much of a prompt an engine reuses, to be compared on recorded engine traces.

    Called: by ``vswa accuracy replay`` and the pytest plugin, once per trace, before its first event. Give
        new scorers each time: they keep state, and are used from one thread.
    Order: by plugin name, behind the built-in ones.
    Combine: all scorers. A name that is taken costs that plugin its scorers.
    Errors: all scorers of that plugin are left out; counted, logged once per plugin and minute.

    :param layout: frozen; the cache groups and the reuse rule of the trace's header.
    :param rules: all reuse rules by name.
    :returns: objects with the shape of ``vswa_plugin.accuracy.scorers.Scorer``, or None.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_simulated_rank(setup: RankSetup) -> SimulatedRank | None:
    """Build the cache of one engine rank without its model, for simulations of routing.

    Called: by ``vswa accuracy route``, once per simulated rank, before its first request.
    Order: stops at the first answer; look at ``setup.layout.rule`` before anything else.
    Combine: first non-None. None from all is an error of the configuration.
    Errors: ConfigError, sizes that cannot work, goes through unchanged. Any other exception costs this
        plugin's answer; counted, logged once per plugin and minute.

    :param setup: frozen; cache groups, reuse rule, blocks of each group.
    :returns: an object with the shape of ``vswa_plugin.accuracy.ranks.SimulatedRank``, or None.

    .. versionadded:: 0.1
    """


# -- observers -------------------------------------------------------------------------------------


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

    Called: on the worker's event loop, once per request, after its last chunk was sent. Hot path: no I/O,
        no waiting.
    Order: of no effect; observers do not see one another.
    Combine: nothing is returned.
    Errors: that plugin misses this request; counted, logged once per plugin and minute.

    :param record: frozen; counts of tokens and durations in seconds, never token ids.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_metrics() -> str | None:
    """Give this plugin's metrics as Prometheus text, or None where it has none.

    Called: for each GET of ``/metrics``, on the worker's event loop; a few milliseconds at most.
    Order: of no effect.
    Combine: the texts are appended, by plugin name. Names start with ``vswa_`` or the plugin's own prefix;
        a text that does not parse, or that repeats a metric of an earlier plugin, is left out whole,
        because Prometheus would refuse the page.
    Errors: that plugin's text is left out; counted, logged once per plugin and minute.

    :returns: Prometheus text format 0.0.4, or None.

    .. versionadded:: 0.1
    """


# -- command line ----------------------------------------------------------------------------------


@hookspec
def vswa_register_commands(commands: Commands) -> None:
    """Add subcommands to ``vswa``.

    Called: by ``vswa`` when it prints its help or runs a command that is not built in. Be cheap: import
        what a command needs in its ``run``.
    Order: by plugin name; built-in commands cannot be replaced.
    Combine: all commands that were added. A name that is taken raises PluginError from ``commands.add``,
        which names both owners.
    Errors: all commands of that plugin are left out; counted, logged with the plugin's name.

    :param commands: call ``commands.add(name, help, configure, run)`` per command;
        ``configure(parser)`` adds arguments, ``run(args)`` returns the exit code.

    .. versionadded:: 0.1
    """
