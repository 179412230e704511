"""What commands ask: subcommands of ``vswa``, and what its measurements compare and simulate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vswa_plugin.hookspecs.marks import hookspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vswa_plugin.blocks.layout import CacheLayout
    from vswa_plugin.blocks.reuse import ReuseRule
    from vswa_plugin.engine.predicted import RankSetup, Scorer, SimulatedRank
    from vswa_plugin.hookspecs.commands import Commands


@hookspec
def vswa_accuracy_scorers(layout: CacheLayout, rules: Mapping[str, ReuseRule]) -> Sequence[Scorer] | None:
    """Add ways to predict how much of a prompt an engine reuses, to be compared on recorded engine traces.

    Called: by ``vswa accuracy replay`` and the pytest plugin, once per trace, before its first event. Give
        new scorers each time: they keep state, and are used from one thread.
    Order: by plugin name, behind the built-in ones.
    Combine: all scorers. A name that is taken costs that plugin its scorers.
    Errors: all scorers of that plugin are left out; counted, logged once per plugin and minute. A scorer that
        fails later is counted once, asked no more, and left out of the report.

    :param layout: frozen; the cache groups and the reuse rule of the trace's header.
    :param rules: all reuse rules by name.
    :returns: objects with the shape of ``vswa_plugin.engine.predicted.Scorer``, or None.

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
    :returns: an object with the shape of ``vswa_plugin.engine.predicted.SimulatedRank``, or None.

    .. versionadded:: 0.1
    """


@hookspec
def vswa_register_commands(commands: Commands) -> None:
    """Add subcommands to ``vswa``.

    Called: by ``vswa`` when it prints its help or runs a command that is not built in. Be cheap: import
        what a command needs in its ``run``.
    Order: by plugin name; built-in commands cannot be replaced.
    Combine: all commands that were added. A name that is taken raises PluginError from ``commands.add``,
        which names both owners.
    Errors: all commands of that plugin are left out; counted, logged with the plugin's name.
    Two names have a meaning to ``vswa demo`` and ``vswa serve``, which run them for the default engine: the
        plugin of that engine (see ``vswa_engine``) adds ``make-model DIR``, which writes a small model there,
        and ``get-model NAME``, which installs a model and prints its directory alone on standard output.

    :param commands: call ``commands.add(name, help, configure, run)`` per command;
        ``configure(parser)`` adds arguments, ``run(args)`` returns the exit code.

    .. versionadded:: 0.1
    """
