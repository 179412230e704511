"""Flags of Dynamo's own workers on our command line, by the tables of dynamo_flags.py and vllm_flags.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vswa_plugin.engine import ROUTER_ENV
from vswa_plugin.engine.option_files import json_options
from vswa_plugin.errors import ConfigError, shown, unknown_choice
from vswa_plugin.worker.dynamo_flags import COMBINED, DOTTED, FLAGS, Fate, Flag, Takes, names_of
from vswa_plugin.worker.vllm_flags import VLLM_FLAGS

_ON, _OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
#: Dynamo's --disaggregation-mode -> --mode.
DISAGGREGATION = {
    "agg": "agg",
    "pd": "agg",
    "prefill_and_decode": "agg",
    "prefill": "prefill",
    "decode": "decode",
}
_DEST = "dynamo_flags"


class FromDynamo(NamedTuple):
    """What the given flags and variables come to.

    :param options: engine options, under those of a file.
    :param sources: flags and variables that these come from.
    :param variables: to be set before Dynamo's runtime or a plugin reads them.
    :param notes: of what has no effect, for the log.
    """

    options: dict[str, Any]
    sources: tuple[str, ...]
    variables: dict[str, str]
    notes: tuple[str, ...]


class _Given(NamedTuple):
    """A flag with its value, and where it was given: on the command line or by its variable."""

    flag: Flag
    where: str
    value: str


class _Collect(argparse.Action):
    def __init__(self, *, flag: Flag, **more: Any) -> None:
        super().__init__(**more)
        self._flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        where = option_string or self._flag.name
        if self._flag.takes is Takes.SWITCH:
            value = "false" if where.startswith("--no-") else "true"
        elif values is None:
            value = "true"
        else:
            value = values if isinstance(values, str) else " ".join(map(str, values))
        before = [each for each in getattr(namespace, _DEST, ()) if each.flag is not self._flag]
        setattr(namespace, _DEST, [*before, _Given(self._flag, where, value)])


def add_dynamo_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags but those that our own options stand for; ``--help`` names the page that lists them."""
    nargs: dict[Takes, int | str | None] = {
        Takes.VALUE: None,
        Takes.SWITCH: 0,
        Takes.SEVERAL: "*",
        Takes.MAYBE: "?",
    }
    parser.set_defaults(**{_DEST: []})
    for flag in (*FLAGS, *VLLM_FLAGS):
        if flag.fate is not Fate.OWN:
            parser.add_argument(
                *names_of(flag),
                action=_Collect,
                flag=flag,
                nargs=nargs[flag.takes],
                dest=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def take_dotted(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """``argv`` without the flags ``--trtllm.section.option VALUE``, and the options that these set.

    :raises ConfigError: a flag without a value, or one that contradicts another.
    """
    rest: list[str] = []
    options: dict[str, Any] = {}
    words = iter(enumerate(argv))
    for at, word in words:
        if word == "--":
            rest += argv[at:]
            break
        if not word.startswith(DOTTED):
            rest.append(word)
            continue
        if at + 1 == len(argv) or argv[at + 1].startswith("--"):
            raise ConfigError(f"{shown(word)}: expected a value behind it, got none")
        _, value = next(words)
        _lay(options, word.removeprefix(DOTTED), _plain(value), word)
    return rest, options


def from_dynamo(given: argparse.Namespace, environ: Mapping[str, str]) -> FromDynamo:
    """What flags and variables come to; a variable counts where its flag is not given.

    :raises ConfigError: one is refused; the message says what to use instead.
    """
    found: list[_Given] = list(getattr(given, _DEST, ()))
    there = {each.flag.name for each in found}
    if COMBINED.name in there:
        there |= {"--publish-kv-events", "--publish-metrics"}
    found += [
        _Given(flag, variable, environ[variable])
        for flag in FLAGS
        if (variable := flag.env) is not None
        and variable in environ
        and flag.fate not in (Fate.OWN, Fate.VARIABLE)
        and flag.name not in there
    ]
    made = FromDynamo({}, tuple(each.where for each in found if each.flag.fate is Fate.OPTION), {}, ())
    notes: list[str] = []
    for each in found:
        _READ[each.flag.fate](each, made, environ, notes)
    return made._replace(notes=tuple(notes))


def mode_of(given: str | None, disaggregation: str | None, environ: Mapping[str, str]) -> str:
    """``--mode``, else Dynamo's ``--disaggregation-mode``, else its variable, else ``agg``.

    :raises ConfigError: Dynamo's option has another value than it takes, or says something else than ours.
    """
    variable = "DYN_TRTLLM_DISAGGREGATION_MODE"
    option, theirs = "--disaggregation-mode", disaggregation
    if theirs is None and given is None:
        option, theirs = variable, environ.get(variable) or None
    if theirs is None:
        return given or "agg"
    if theirs == "encode":
        raise ConfigError(f"{option}: expected one of {', '.join(DISAGGREGATION)}, got encode: text alone")
    if theirs not in DISAGGREGATION:
        raise ConfigError(f"{option}: {unknown_choice('mode', theirs, DISAGGREGATION)}")
    mode = DISAGGREGATION[theirs]
    if given not in (None, mode):
        raise ConfigError(f"--mode: expected {mode}, as {option} says, got {given}; give one of them")
    return mode


def _option(each: _Given, made: FromDynamo, environ: Mapping[str, str], notes: list[str]) -> None:
    flag = each.flag
    reason = flag.refused.get(each.value)
    if reason is not None:
        raise ConfigError(f"{each.where}: expected another value, got {each.value}: {reason}")
    if each.value:  # an empty variable says nothing
        _lay(made.options, flag.text, _of_kind(each), each.where)


def _variable(each: _Given, made: FromDynamo, environ: Mapping[str, str], notes: list[str]) -> None:
    assert each.flag.env is not None, "the table gives each its variable"
    made.variables[each.flag.env] = each.value


def _events(each: _Given, made: FromDynamo, environ: Mapping[str, str], notes: list[str]) -> None:
    if not _switch(each):
        notes.append(f"{each.where}: the events of every window are published all the same, on NATS")
    elif environ.get(ROUTER_ENV):
        notes.append(f"{each.where}: without effect beside {ROUTER_ENV}={environ[ROUTER_ENV]}")
    else:
        made.variables[ROUTER_ENV] = "stock"
        notes.append(f"{each.where}: blocks are shown to Dynamo's own KV router, as {ROUTER_ENV}=stock")


def _nothing(each: _Given, made: FromDynamo, environ: Mapping[str, str], notes: list[str]) -> None:
    notes.append(f"{each.where}: accepted, without effect: {each.flag.text}")


def _refuse(each: _Given, made: FromDynamo, environ: Mapping[str, str], notes: list[str]) -> None:
    flag = each.flag
    value = str(_switch(each)).lower() if flag.takes is Takes.SWITCH else each.value
    if value.lower().replace(" ", "") not in flag.harmless:
        expected = " or ".join(repr(each) for each in flag.harmless if each) or "none"
        raise ConfigError(f"{each.where}: expected {expected}, got {shown(value)}: {flag.text}")


_READ: Mapping[Fate, Callable[[_Given, FromDynamo, Mapping[str, str], list[str]], None]] = {
    Fate.OPTION: _option,
    Fate.VARIABLE: _variable,
    Fate.EVENTS: _events,
    Fate.NOTHING: _nothing,
    Fate.REFUSED: _refuse,
}


def _switch(each: _Given) -> bool:
    value = each.value.strip().lower()
    if value not in (*_ON, *_OFF):
        raise ConfigError(f"{each.where}: expected true or false, got {shown(each.value)}")
    return value in _ON


def _of_kind(each: _Given) -> object:
    kind = each.flag.kind
    if kind is bool:
        return _switch(each)
    if kind is dict:
        return json_options(each.value, each.where, '{"name": 1}')
    try:
        return kind(each.value)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{each.where}: expected {number}, got {shown(each.value)}") from None


def _lay(options: dict[str, Any], path: str, value: object, where: str) -> None:
    """Set the option at ``path``; raises ConfigError where a part of it is no section."""
    *sections, name = path.split(".")
    place = options
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{shown(where)}: expected a section at {section!r}, got {shown(place)} there")
    if not all((*sections, name)):
        raise ConfigError(f"{shown(where)}: expected names with a dot between them, got an empty one")
    place[name] = value


def _plain(text: str) -> object:
    """As Dynamo reads it: none, a number, true or false, else the text."""
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text) if len(text) <= 40 else text
        except ValueError:
            continue
    return text
