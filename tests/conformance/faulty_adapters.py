"""A small adapter that passes the suite, and changes with one fault each, with the test that sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout
from vswa_plugin.engine.contract import BlocksRemoved, BlocksStored, EngineBlock, EngineEvent, EventAdapter
from vswa_plugin.errors import ProtocolError
from vswa_plugin.testing.conformance import EventAdapterConformance

LAYOUT = CacheLayout((CacheGroup(0, 8, 4), CacheGroup(1, None, 4)), "trtllm_v2", "m")
Tokens = Annotated[
    list[Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]], msgspec.Meta(min_length=4, max_length=4)
]
Group = Annotated[int, msgspec.Meta(ge=0, le=1)]


class Stored(msgspec.Struct, tag="stored", forbid_unknown_fields=True):
    group: Group
    parent: str | None
    name: str
    tokens: Tokens


class Removed(msgspec.Struct, tag="removed"):
    group: Group
    name: str


def stored(group: int, parent: str | None, name: str, first: int) -> dict[str, Any]:
    tokens = list(range(first, first + 4))
    return {"type": "stored", "group": group, "parent": parent, "name": name, "tokens": tokens}


SAMPLES = [
    stored(0, None, "a", 100),
    stored(1, None, "a", 100),
    stored(0, "a", "b", 200),
    {"type": "removed", "group": 0, "name": "a"},
    stored(1, "a", "b", 200),
    {"type": "removed", "group": 1, "name": "b"},
]


class Plain:
    #: The test that must fail, without ``test_``, and a part of what it says.
    caught_by: ClassVar[tuple[str, str]]

    def feed(self, raw: Mapping[str, Any]) -> list[EngineEvent]:
        try:
            event = msgspec.convert(raw, Stored | Removed)
        except msgspec.ValidationError as error:
            raise ProtocolError(str(error)) from None
        return self.meant(event)

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        if isinstance(event, Removed):
            return [BlocksRemoved(event.group, (event.name,))]
        return [BlocksStored(event.group, event.parent, (EngineBlock(event.name, tuple(event.tokens)),))]


class MeansNothing(Plain):
    caught_by = ("the_samples_are_read_and_blocks_are_held", "expected an event that stores blocks")

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        return []


class RefusesGoodOnes(Plain):
    caught_by = ("the_samples_are_read_and_blocks_are_held", "well-formed events were refused")

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        raise ProtocolError("not today")


class MeansAnotherGroup(Plain):
    caught_by = ("the_samples_are_read_and_blocks_are_held", "unknown cache group 7")

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        return [msgspec.structs.replace(each, group_id=7) for each in super().meant(event)]


class GivesBlocksThatAreTooLarge(Plain):
    caught_by = ("the_samples_are_read_and_blocks_are_held", "at most 4 tokens, got one of 8")

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        if isinstance(event, Stored):
            event.tokens += event.tokens
        return super().meant(event)


class GivesNoEvents(Plain):
    caught_by = ("the_samples_are_read_and_blocks_are_held", "expected engine events, got dict")

    def meant(self, event: Stored | Removed) -> Any:
        return [msgspec.to_builtins(event)]


class ChangesItsArgument(Plain):
    caught_by = ("events_are_not_changed", "feed() changed its argument")

    def feed(self, raw: Any) -> list[EngineEvent]:
        events = super().feed(raw)
        raw["read"] = True
        return events


class TakesFieldsForGranted(Plain):
    caught_by = (
        "a_mutated_event_is_read_or_refused_as_a_fault_of_the_protocol",
        "expected ProtocolError, got",
    )

    def feed(self, raw: Any) -> list[EngineEvent]:
        if isinstance(raw, dict) and raw["group"] not in (0, 1):
            return []
        return super().feed(raw)


class TakesBlocksThatAreTooLarge(Plain):
    caught_by = (
        "a_list_with_one_element_more_is_read_or_refused_as_a_fault_of_the_protocol",
        "at most 4 tokens, got one of 5",
    )

    def feed(self, raw: Any) -> list[EngineEvent]:
        if not isinstance(raw, dict) or not isinstance(tokens := raw.get("tokens"), list):
            return super().feed(raw)
        events = super().feed({**raw, "tokens": tokens[:4]})
        block = EngineBlock(raw["name"], tuple(tokens))
        return [BlocksStored(raw["group"], raw["parent"], (block,))] if len(tokens) > 4 else events


class TakesAnythingForAMapping(Plain):
    caught_by = ("any_json_is_read_or_refused_as_a_fault_of_the_protocol", "expected ProtocolError, got")

    def feed(self, raw: Any) -> list[EngineEvent]:
        return super().feed({key: raw[key] for key in raw})


class Hangs(Plain):
    caught_by = ("a_mutated_event_is_read_or_refused_as_a_fault_of_the_protocol", "it hangs")

    def feed(self, raw: Any) -> list[EngineEvent]:
        while isinstance(raw, dict) and not raw.get("name"):
            continue
        return super().feed(raw)


class KeepsWhatItRefused(Plain):
    caught_by = ("a_refused_event_leaves_nothing_behind", "after a refused event, its blocks were announced")

    def __init__(self) -> None:
        self._kept: list[EngineEvent] = []

    def feed(self, raw: Any) -> list[EngineEvent]:
        if isinstance(raw, dict) and raw.get("name") == "b" and raw.get("group") == 0:
            tokens = (1, 2, 3, 4)
            self._kept = [BlocksStored(0, None, (EngineBlock("kept", tokens),))]
        events = super().feed(raw)
        kept, self._kept = self._kept if isinstance(raw, dict) and raw.get("name") != "b" else [], []
        return events + kept


class WalksUpToTheRoot(Plain):
    caught_by = ("any_sequence_of_events_ends_and_is_read_or_refused", "it hangs")

    def __init__(self) -> None:
        self._parents: dict[str, str | None] = {}

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        if isinstance(event, Stored):
            self._parents[event.name] = event.parent
            above = event.parent
            while above is not None:
                above = self._parents.get(above)
        return super().meant(event)


class NamesACopyAnew(Plain):
    caught_by = (
        "an_event_that_comes_twice_makes_no_blocks_that_were_not_stored",
        "twice announced other blocks",
    )

    def __init__(self) -> None:
        self._seen: set[tuple[int, str]] = set()

    def meant(self, event: Stored | Removed) -> list[EngineEvent]:
        if isinstance(event, Stored):
            if (event.group, event.name) in self._seen:
                event.name += "'"
            self._seen.add((event.group, event.name))
        return super().meant(event)


def all_faulty() -> list[type[Plain]]:
    return Plain.__subclasses__()


class TestPlain(EventAdapterConformance):
    """Without a fault it passes, or the faults would prove nothing: test_faults.py runs it."""

    layout = LAYOUT
    samples = SAMPLES
    adapter: ClassVar[type[Plain]] = Plain

    def new_adapter(self) -> EventAdapter:
        return self.adapter()


#: For files of tests: the class by the name of the fault.
SUITES = {
    each.__name__: type(f"Test{each.__name__}", (TestPlain,), {"adapter": each}) for each in all_faulty()
}
