"""Every extension point of vswa-plugin. The docstrings of the hooks are the contract.

A plugin is a module or an object with functions that carry the names of hooks and the mark ``@hookimpl``::

    from vswa_plugin.hookspecs import hookimpl

    @hookimpl
    def vswa_kv_batch(source, batch):
        ...

What holds for all hooks:

* Implementations are plain functions: no ``async def``, no generators, no wrappers.
* Arguments are passed by name. An implementation takes those that it needs and leaves out the rest.
* All plugins share the arguments: read them, and never change them.
* Each implementation is called on its own. After a failure only that plugin's answer is missing. The failure
  is counted, and logged once per plugin, hook and minute.
* ``tryfirst=True`` and ``trylast=True`` move an implementation to the front or the back. Otherwise plugins
  are called in alphabetical order of their names. The order in which they were loaded has no effect.

    worker.py      engines, their events, and a worker's start
    routing.py     reuse rules, and the choice of a rank
    observers.py   events and requests that plugins observe, and the plugins' metrics
    lifetime.py    a plugin's options, and its end
    tools.py       what commands measure and simulate, and further commands
    commands.py    a subcommand of ``vswa``
    marks.py       how a contract and an implementation of it are marked
"""

from __future__ import annotations

from vswa_plugin.hookspecs.commands import Command, Commands
from vswa_plugin.hookspecs.lifetime import vswa_options, vswa_stopping
from vswa_plugin.hookspecs.marks import NAME, hookimpl, hookspec
from vswa_plugin.hookspecs.observers import (
    vswa_engine_events,
    vswa_kv_batch,
    vswa_kv_stored,
    vswa_metrics,
    vswa_request_arrived,
    vswa_request_finished,
)
from vswa_plugin.hookspecs.routing import (
    vswa_choice_terms,
    vswa_load_changed,
    vswa_rank_changed,
    vswa_reuse_rules,
    vswa_score,
    vswa_select_worker,
)
from vswa_plugin.hookspecs.tools import (
    vswa_accuracy_scorers,
    vswa_register_commands,
    vswa_simulated_choosers,
    vswa_simulated_rank,
)
from vswa_plugin.hookspecs.worker import (
    WorkerContext,
    vswa_engine,
    vswa_engine_names,
    vswa_event_adapter,
    vswa_event_source,
    vswa_worker_connected,
)

#: All hooks, in the order in which docs/hooks.md explains them.
HOOKS = (
    vswa_options,
    vswa_engine,
    vswa_engine_names,
    vswa_event_adapter,
    vswa_event_source,
    vswa_worker_connected,
    vswa_reuse_rules,
    vswa_score,
    vswa_select_worker,
    vswa_load_changed,
    vswa_rank_changed,
    vswa_choice_terms,
    vswa_kv_batch,
    vswa_kv_stored,
    vswa_engine_events,
    vswa_request_arrived,
    vswa_request_finished,
    vswa_metrics,
    vswa_stopping,
    vswa_accuracy_scorers,
    vswa_simulated_rank,
    vswa_simulated_choosers,
    vswa_register_commands,
)

__all__ = ["HOOKS", "NAME", "Command", "Commands", "WorkerContext", "hookimpl", "hookspec"]
