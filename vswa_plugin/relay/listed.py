"""The workers that are relayed, from the command line or a file: checked, not reached."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.engine import MODES, Section, SourceSettings
from vswa_plugin.engine.options import is_integer
from vswa_plugin.errors import ConfigError, one_line
from vswa_plugin.program.model_path import FoundModel
from vswa_plugin.wire.subjects import check_name

#: Stands in an address for the host of each instance that Dynamo's discovery lists.
HOST = "{host}"
MAX_WORKERS, MAX_RANKS = 4_096, 1_024
_KEYS = frozenset(
    {
        "component", "dp_ranks", "endpoint", "engine", "events", "id", "mode", "model", "model_path",
        "namespace", "options", "replay", "visible",
    }
)  # fmt: skip
_LOCAL = re.compile(r"127\.\d+\.\d+\.\d+|::1|localhost")

Finder = Callable[[str, str], FoundModel]


class Listed(msgspec.Struct, frozen=True):
    """One worker of the list, or with :data:`HOST` in its addresses one for each instance of an endpoint.

    :param name: for messages.
    :param worker_id: Dynamo's instance id; None: the one that its discovery lists.
    :param visible: whether Dynamo's frontends see its model.
    """

    name: str
    endpoint: EndpointName
    worker_id: int | None
    source: SourceSettings
    visible: bool = True

    @property
    def of_every_host(self) -> bool:
        return HOST in self.source.endpoint

    @property
    def host(self) -> str:
        """Where it publishes its events; empty where its address names no other machine."""
        if not self.source.endpoint.startswith("tcp://") or self.of_every_host:
            return ""
        return urlsplit(self.source.endpoint).hostname or ""

    def of_instance(self, worker_id: int, host: str) -> Listed:
        """The worker that one instance of its endpoint is."""
        within = f"[{host}]" if ":" in host else host
        replay = self.source.replay
        source = msgspec.structs.replace(
            self.source,
            endpoint=self.source.endpoint.replace(HOST, within),
            replay=None if replay is None else replay.replace(HOST, within),
        )
        name = f"{self.name} on {host}"
        return msgspec.structs.replace(self, name=name, worker_id=worker_id, source=source)


class Defaults(msgspec.Struct, frozen=True):
    """What holds for each worker that does not say otherwise; from the command line."""

    engine: str
    mode: str
    endpoint: EndpointName
    model_path: str | None
    served_model_name: str | None
    visible: bool
    options: dict[str, Any] = {}


def listed_in(loaded: Mapping[str, Any], where: str, defaults: Defaults, find: Finder) -> tuple[Listed, ...]:
    """The workers of a file.

    :param find: a model by its path or name, and the option that names it.
    :raises ConfigError: names the worker by its place, the key, and what was expected.
    """
    top = Section(loaded, where)
    top.check({"workers"})
    workers = top.data.get("workers")
    if not isinstance(workers, list) or not workers or len(workers) > MAX_WORKERS:
        raise top.error("workers", f"a list of at least one worker, at most {MAX_WORKERS}", workers)
    made = tuple(
        listed(Section(each, where, f"workers[{place}]"), defaults, find)
        for place, each in enumerate(workers)
    )
    _check_apart(made, where)
    return made


def listed(given: Section, defaults: Defaults, find: Finder) -> Listed:
    """One worker; raises ConfigError."""
    given.check(_KEYS)
    events = given.text("events", None)
    if events is None:
        raise given.error("events", "the address of its KV events, such as tcp://10.0.0.5:5557", None)
    replay = given.text("replay", None)
    if replay is not None and (HOST in replay) != (HOST in events):
        raise given.error("replay", f"{HOST} where events has it, and nowhere else", replay)
    path = given.text("model_path", None) or defaults.model_path
    if path is None:
        raise given.error("model_path", "the directory or name of the model that it serves", None)
    model = find(path, given.name("model_path"))
    worker_id = given.integer("id", None, low=0, high=(1 << 64) - 1)
    if worker_id is not None and HOST in events:
        raise given.error("id", f"none, because {HOST} stands for many workers", worker_id)
    source = SourceSettings(
        engine=given.text("engine", defaults.engine),
        mode=given.choice("mode", MODES, defaults.mode),
        model_path=str(model.path),
        served_model_name=given.text("model", defaults.served_model_name or model.name),
        endpoint=events,
        replay=replay,
        dp_ranks=_ranks(given),
        options={**defaults.options, **given.section("options").data},
        where=f"{given.source}, {given.path}" if given.path else given.source,
    )
    name = one_line(f"{given.path} ({events})" if given.path else events)
    return Listed(name, _endpoint(given, defaults.endpoint), worker_id, source, _visible(given, defaults))


def _visible(given: Section, defaults: Defaults) -> bool:
    return given.boolean("visible", defaults.visible)


def _endpoint(given: Section, default: EndpointName) -> EndpointName:
    parts = {key: given.text(key, getattr(default, key)) for key in EndpointName.__struct_fields__}
    for key, part in parts.items():
        check_name(given.name(key), part)
    return EndpointName(**parts)


def _ranks(given: Section) -> tuple[int, ...]:
    value = given.data.get("dp_ranks", 1)
    if is_integer(value) and 0 < value <= MAX_RANKS:
        return tuple(range(value))
    if isinstance(value, list) and value and all(is_integer(each) for each in value):
        ranks = sorted(value)
        if 0 <= ranks[0] and ranks[-1] < MAX_RANKS and len({*ranks}) == len(ranks):
            return tuple(ranks)
    raise given.error("dp_ranks", "a number of data-parallel ranks, or a list of their numbers", value)


def _check_apart(workers: tuple[Listed, ...], where: str) -> None:
    """Refuse workers that could not be told apart, once all of them run."""
    addresses: dict[str, Listed] = {}
    places: dict[tuple[EndpointName, str], Listed] = {}
    ids: dict[int, Listed] = {}
    for each in workers:
        if (other := addresses.setdefault(each.source.endpoint, each)) is not each:
            raise ConfigError(
                f"{each.name}: expected an address of its own, got that of {other.name} (in {where})"
            )
        if each.worker_id is not None:
            if (other := ids.setdefault(each.worker_id, each)) is not each:
                raise ConfigError(
                    f"{each.name}: expected an id of its own, got that of {other.name} (in {where})"
                )
            continue
        host = "" if _LOCAL.fullmatch(each.host) else each.host
        if (other := places.setdefault((each.endpoint, host), each)) is not each:
            raise ConfigError(
                f"{each.name}: expected an id, because discovery cannot tell it from {other.name}, "
                f"on the same host and endpoint ({each.endpoint}), got none; write id, or give each "
                f"of them an endpoint of its own (in {where})"
            )
