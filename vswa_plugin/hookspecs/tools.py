"""Hooks of commands: subcommands of ``vswa``, and what its measurements compare and simulate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.engine.predicted import RankSetup, Scorer, SimulatedRank
    from vswa_plugin.hookspecs.commands import Commands
    from vswa_plugin.selection import Chooser


@hookspec
def vswa_accuracy_scorers(layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> Sequence[Scorer] | None:
    """Add ways to predict how much of a prompt an engine reuses, to be compared on recorded engine traces.

    Called: ``vswa accuracy replay`` and the pytest plugin call it once per trace, before its first event.
        Return new scorers each time, because they keep state. They are used from one thread.
    Order: Plugins are called in the order of their names, after the built-in scorers.
    Combine: The result is all scorers. A plugin that adds a name that is taken loses its scorers.
    Errors: All scorers of a plugin that fails are left out. The failure is counted, and logged once per
        plugin and minute. A scorer that fails later is counted once, is not called any more, and is left out
        of the report.

    :param layout: the cache groups and the reuse rule of the trace's header; it is frozen.
    :param rules: all reuse rules, by name.
    :returns: objects with the shape of ``vswa_plugin.engine.predicted.Scorer``, or None.

    .. versionadded:: 0.1
    """


@hookspec(firstresult=True)
def vswa_simulated_rank(setup: RankSetup) -> SimulatedRank | None:
    """Build the cache of one engine rank without its model, for simulations of routing.

    Called: ``vswa accuracy route`` calls it once per simulated rank, before its first request, and so do
        commands of plugins through ``Commands.simulated_rank``.
    Order: The calls stop at the first answer. Look at ``setup.layout.rule`` before anything else.
    Combine: The first answer that is not None is used. Where all are None, the configuration is wrong.
    Errors: ConfigError says that sizes cannot work, and is shown to the user unchanged. After any other
        exception, this plugin has no answer. The failure is counted, and logged once per plugin and minute.

    :param setup: the cache groups, the reuse rule and the blocks of each group; it is frozen.
    :returns: an object with the shape of ``vswa_plugin.engine.predicted.SimulatedRank``, or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_simulated_choosers(clock: Callable[[], float]) -> Mapping[str, Chooser] | None:
    """Add ways to choose ranks, to be compared in simulations of routing.

    Called: ``vswa accuracy route`` calls it for each run. Return new ones each time, because they keep state.
    Order: Plugins are called in the order of their names, after the built-in policies.
    Combine: The result is all policies. A plugin that adds a name that is taken loses its policies.
    Errors: All policies of a plugin that fails are left out. The failure is counted, and logged once per
        plugin and minute. What a policy raises later ends the command.

    :param clock: the simulated time, in seconds.
    :returns: by name, objects with the shape of ``vswa_plugin.selection.Chooser``; or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_register_commands(commands: Commands) -> None:
    """Add subcommands to ``vswa``.

    ``vswa demo`` and ``vswa serve`` run two commands of the default engine's plugin (see ``vswa_engine``).
    That plugin adds ``make-model DIR``, which writes a small model there, and ``get-model NAME``, which
    installs a model and prints its directory alone on standard output.

    Called: ``vswa`` calls it before it prints its help or runs a command that is not built in. Be cheap:
        import in ``run`` what a command needs.
    Order: Plugins are called in the order of their names. Built-in commands cannot be replaced.
    Combine: The result is all commands that were added. ``commands.add`` raises PluginError for a name that
        is taken; the message names both owners.
    Errors: All commands of a plugin that fails are left out. The failure is counted, and logged with the
        plugin's name.

    :param commands: call ``commands.add(name, help, configure, run)`` for each command. ``configure(parser)``
        adds its arguments, and ``run(args)`` returns the exit code.
        Commands that simulate use its ``simulated_rank``.

    .. versionadded:: 0.1
    """
