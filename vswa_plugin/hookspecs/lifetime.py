"""The first and the last that a plugin is called for: its options, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Collection

    from vswa_plugin.engine.options import Section


@hookspec
def vswa_options(options: Section) -> Collection[str] | None:
    """Read this plugin's own options: from a file and the environment, as docs/writing-plugins.md says.

    Called: once per host, before any other hook, also where no option was given. Say with ``options.check``
        which names there are, and read each with its type: ``options.text("directory", None)``. Keep the
        values, not ``options``; open nothing yet, because commands of ``vswa`` call this too.
    Order: of no effect; each plugin gets its own options.
    Combine: each answer concerns its own plugin alone.
    Errors: ConfigError, as ``options`` raises it, is the user's answer: it goes through unchanged and the
        program exits with it. Any other exception, and a name that is no hook of this plugin, is counted and
        logged with the plugin's name, and the plugin goes on without: all its hooks are called.

    :param options: read only; empty where none was given. Environment variables that a plugin has besides
        ``VSWA_PLUGIN_<NAME>_<KEY>`` are its attribute ``option_variables``: variable -> name of an option.
    :returns: names of this plugin's hooks that need not be called with these options, so that a plugin that
        is switched off costs nothing; None: all are called.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_stopping(budget_s: float) -> None:
    """End in order: write what is waiting, close files and connections, stop threads.

    Called: once by a worker, a router and a selector that ends, however it ends, even where its start was not
        complete. Its requests have ended, its engine has stopped and its last batch was handed to the wire;
        its connections to NATS and to Dynamo are still open. On a thread of its own: waiting is allowed.
        Commands of ``vswa`` do not call it. After it only ``vswa_metrics`` is called, and
        ``vswa_request_finished`` for a request that was not done in time.
    Order: of no effect; all plugins end at the same time.
    Combine: nothing is returned.
    Errors: counted, logged with the plugin's name. One that takes longer than ``budget_s`` counts as failed:
        the program ends without waiting for it any further, and its thread ends with the process.

    :param budget_s: seconds that all plugins together may take.

    .. versionadded:: 0.1
    """
