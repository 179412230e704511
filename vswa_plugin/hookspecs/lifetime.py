"""The hooks that a plugin is called for first and last: its options, and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Collection

    from vswa_plugin.engine.options import Section


@hookspec
def vswa_options(options: Section) -> Collection[str] | None:
    """Read this plugin's own options, which come from a file and from the environment.

    docs/writing-plugins.md says where the options come from.

    Called: The host calls it once, before any other hook, also where no option was given. Name all options
        with ``options.check``, and read each with its type, as in ``options.text("directory", None)``. Keep
        the values and not ``options``. Open nothing yet, because commands of ``vswa`` call this hook too.
    Order: The order has no effect, because each plugin gets its own options.
    Combine: Each answer is about its own plugin alone.
    Errors: ConfigError, as ``options`` raises it, is meant for the user: it is shown unchanged, and the
        program exits with it. Any other exception, and a name that is no hook of this plugin, is counted and
        logged with the plugin's name. The plugin then stays loaded, and all its hooks are called.

    :param options: the options, which are read-only and empty where none was given. A plugin may read other
        environment variables than ``VSWA_PLUGIN_<NAME>_<KEY>``: its attribute ``option_variables`` maps each
        of them to the name of an option.
    :returns: names of this plugin's hooks that need not be called with these options, so that a plugin that
        is switched off costs nothing; or None, and all are called.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_stopping(budget_s: float) -> None:
    """End in order: write what is waiting, close files and connections, and stop threads.

    Called: A worker, a router and a selector call it once as they end, however they end, even where their
        start was not complete. By then the requests have ended, the engine has stopped, and the last batch
        was handed to the wire. The connections to NATS and to Dynamo are still open. Each call has a thread
        of its own, so waiting is allowed. Commands of ``vswa`` do not call this hook. After it, only
        ``vswa_metrics`` is called, and ``vswa_request_finished`` for a request that did not end in time.
    Order: The order has no effect, because all plugins end at the same time.
    Combine: The hook returns nothing.
    Errors: A failure is counted, and logged with the plugin's name. A plugin that takes longer than
        ``budget_s`` counts as failed: the program ends without waiting for it any further, and the plugin's
        thread ends with the process.

    :param budget_s: seconds that all plugins together may take.

    .. versionadded:: 0.1
    """
