"""The plugins of one process: loaded, checked, put in order, listed and forgotten."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import pluggy

from vswa_plugin import hookspecs
from vswa_plugin.errors import PluginError
from vswa_plugin.host import checks as plugin_checks
from vswa_plugin.host import sources as plugin_sources
from vswa_plugin.host.calls import Implementation, Isolation

if TYPE_CHECKING:
    from typing import Self

# The host's: who lists the plugins switches its warnings off by that name.
logger = logging.getLogger("vswa_plugin.host.host")


@dataclass(frozen=True)
class PluginStatus:
    """One line of ``vswa plugins``. ``state`` is ``loaded``, ``disabled`` or ``failed``."""

    name: str
    version: str
    hooks: tuple[str, ...]
    source: str
    state: str
    reason: str = ""


class PluginSet:
    """Which plugins there are, and for each hook the implementations in the order of their calls.

    :param disabled: names that are not loaded, wherever they come from.
    :param trace: log every call of every implementation with its duration.
    :param clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        disabled: Collection[str] = (),
        trace: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = pluggy.PluginManager(hookspecs.NAME)
        self._manager.add_hookspecs(hookspecs)
        self._specs = {hook.__name__: tuple(inspect.signature(hook).parameters) for hook in hookspecs.HOOKS}
        self._calls: dict[str, tuple[Implementation, ...]] = dict.fromkeys(self._specs, ())
        #: (plugin, hook) that are not called.
        self._unused: set[tuple[str, str]] = set()
        self._statuses: list[PluginStatus] = []
        self._disabled = frozenset(disabled)
        self._clock = clock
        self._isolation = Isolation(trace=trace, clock=clock)

    def register(self, plugin: object, name: str, *, version: str = "", source: str = "code") -> None:
        """Add one plugin. A refused one leaves no trace; a disabled one is listed.

        :param plugin: a module or an object; or a class, of which this host makes an instance of its own.
        :raises PluginError: it breaks the contract of a hook, its name is taken, or no instance can be made.
        """
        plugin_checks.check_name(name)
        if name in self._disabled:
            self._statuses.append(PluginStatus(name, version, (), source, "disabled", "switched off by name"))
            return
        if inspect.isclass(plugin):
            plugin = _instance_of(plugin, name)
        self._refuse_twice(plugin, name, source)
        try:
            hooks = plugin_checks.check_plugin(self._manager, plugin, name, self._specs)
        except PluginError:
            raise
        except Exception as error:
            reason = plugin_sources.reason_of(error)
            raise PluginError(f"plugin {name!r} cannot be examined: {reason}") from error
        self._manager.register(plugin, name)
        self._statuses.append(PluginStatus(name, version, hooks, source, "loaded"))
        self._plan(hooks)

    def load_entry_points(self, *, only: Collection[str] | None = None) -> None:
        """Load the plugins of installed packages (entry point group ``vswa_plugin``).

        One that cannot be loaded is logged and listed as failed, and costs no other. The name of a
        first-party plugin is never another package's, even where the first-party plugin itself fails to load:
        who has asked for it by name must not get something else.

        :param only: load these and no others; None for all.
        """
        entries = plugin_sources.installed()
        own = {entry.name: entry for entry in entries if plugin_sources.is_first_party(entry)}
        for entry in entries:
            if entry.name in self._disabled:
                self._list(entry, "disabled", "switched off by name")
            elif only is not None and entry.name not in only:
                self._list(entry, "disabled", "not named in VSWA_PLUGINS")
            elif (kept := own.get(entry.name, entry)) is not entry:
                error = PluginError(_name_is_taken(entry.name, _source_of(kept), _source_of(entry)))
                self._list(entry, "failed", str(error), error)
            else:
                self._load_entry_point(entry)

    def load_local(self, where: str) -> None:
        """Load one plugin from a ``.py`` file or a dotted module name.

        :raises PluginError: it cannot be imported, or breaks the contract: the user named it.
        """
        name = plugin_sources.local_name(where)
        if name in self._disabled:
            self._statuses.append(PluginStatus(name, "", (), where, "disabled", "switched off by name"))
            return
        module = plugin_sources.load_local(where)
        try:
            self.register(module, name, version=str(getattr(module, "__version__", "")), source=where)
        except PluginError:
            plugin_sources.forget_local(module)
            raise

    def plugins(self) -> list[PluginStatus]:
        """All plugins that were found, also the disabled and failed ones, by name."""
        return sorted(self._statuses, key=lambda status: (status.name, status.source))

    def hooks_of(self, plugin: str) -> tuple[str, ...]:
        """The hooks that the loaded plugin of that name implements, sorted."""
        return next((s.hooks for s in self._statuses if s.name == plugin and s.state == "loaded"), ())

    def implements(self, hook: str) -> bool:
        """Whether any plugin is called for ``hook``: what only it is told need not be made where none is."""
        return bool(self._calls[hook])

    def option_variables(self) -> dict[str, Mapping[str, str]]:
        """Plugin -> environment variables of its own, each with the option that it stands for.

        Of those alone that take options (``vswa_options``).

        :raises PluginError: an ``option_variables`` that is no mapping.
        """
        takers = {each.plugin for each in self._calls["vswa_options"]}
        variables: dict[str, Mapping[str, str]] = {}
        for name, plugin in self._manager.list_name_plugin():
            if name in takers:
                # Static: an object may invent attributes, as mocks do.
                own = inspect.getattr_static(plugin, "option_variables", {})
                if not isinstance(own, Mapping):
                    raise PluginError(
                        f"plugin {name!r}: expected option_variables to map variables to names of options, "
                        f"got {type(own).__name__}"
                    )
                variables[name] = own
        return variables

    def failures(self) -> dict[tuple[str, str], int]:
        """(plugin, hook) -> calls that failed."""
        return self._isolation.failures()

    def close(self) -> None:
        """Forget all plugins; later calls find none. May be called twice."""
        for name, plugin in self._manager.list_name_plugin():
            self._manager.unregister(name=name)
            plugin_sources.forget_local(plugin)
        self._calls = dict.fromkeys(self._specs, ())
        self._unused.clear()
        self._statuses.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------

    def _refuse_twice(self, plugin: object, name: str, source: str) -> None:
        for status in self._statuses:
            if status.name == name and status.state == "loaded":
                raise PluginError(_name_is_taken(name, status.source, source))
        if (other := self._manager.get_name(plugin)) is not None:
            raise PluginError(f"plugin {name!r} is loaded already, under the name {other!r}")

    def _load_entry_point(self, entry: EntryPoint) -> None:
        try:
            plugin = entry.load()
        except plugin_sources.IMPORT_FAILURES as error:
            self._list(
                entry, "failed", f"cannot import {entry.value}: {plugin_sources.reason_of(error)}", error
            )
            return
        try:
            source = _source_of(entry)
            self.register(plugin, entry.name, version=plugin_sources.version_of(entry), source=source)
        except PluginError as error:
            self._list(entry, "failed", str(error), error)

    def _list(self, entry: EntryPoint, state: str, reason: str, error: BaseException | None = None) -> None:
        source = _source_of(entry)
        version = plugin_sources.version_of(entry)
        self._statuses.append(PluginStatus(entry.name, version, (), source, state, reason))
        if error is not None:
            # The traceback is for the plugin's author; everybody else gets one line per start.
            details = error if logger.isEnabledFor(logging.DEBUG) else None
            logger.warning(
                "plugin %r from %s is not loaded, the others are: %s",
                entry.name,
                source,
                reason,
                exc_info=details,
            )

    def _leave_out(self, plugin: str, hooks: Collection[str]) -> None:
        """Call ``plugin`` for these hooks no more."""
        self._unused.update((plugin, hook) for hook in hooks)
        self._plan(hooks)

    def _plan(self, hooks: Iterable[str]) -> None:
        """Fix the order of calls: by tier and name, whatever the order of loading was."""
        for hook in hooks:
            impls = sorted(getattr(self._manager.hook, hook).get_hookimpls(), key=_rank)
            self._calls[hook] = tuple(
                Implementation(impl.plugin_name, hook, impl.function, tuple(impl.argnames))
                for impl in impls
                if (impl.plugin_name, hook) not in self._unused
            )


def _source_of(entry: EntryPoint) -> str:
    return f"{plugin_sources.package_of(entry)} ({entry.value})"


def _instance_of(plugin: type, name: str) -> object:
    try:
        return plugin()
    except plugin_sources.IMPORT_FAILURES as error:
        raise PluginError(
            f"plugin {name!r}: expected a class that can be called without arguments, got "
            f"{plugin.__name__}: {plugin_sources.reason_of(error)}"
        ) from error


def _name_is_taken(name: str, source: str, other: str) -> str:
    return (
        f"two plugins are named {name!r}: one from {source}, one from {other}; "
        f"rename or uninstall one of them"
    )


def _rank(impl: pluggy.HookImpl) -> tuple[int, str]:
    return (0 if impl.tryfirst else 2 if impl.trylast else 1, impl.plugin_name)
