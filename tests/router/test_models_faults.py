"""What fails for one model, endpoint or worker of the registry costs that one: the others are followed on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.test_models import ODD, entry
from vswa_plugin.dynamo.client import ModelCard, namespaced_sequence_hashes
from vswa_plugin.dynamo.names import EndpointName
from vswa_plugin.index import WindowIndex
from vswa_plugin.registry import Entry
from vswa_plugin.router import models as module
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.faults import Faults
from vswa_plugin.router.forward import Forwarder
from vswa_plugin.router.models import Models
from vswa_plugin.router.promises import Promises
from vswa_plugin.selection import LoadBook, Weights
from vswa_plugin.wire.events import Rank


class Dynamo:
    """Stands for Dynamo. ``failing``: what fails, until it is taken out; ``hanging``: never answers."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.hanging: set[str] = set()
        self.shown: list[str] = []
        self.cards: list[ModelCard] = []
        self.tries: list[str] = []

    async def call(self, what: str) -> None:
        self.tries.append(what)
        if what in self.hanging:
            await asyncio.Event().wait()
        if what in self.failing:
            raise Exception(f"no {what} today")


class Client:
    def busy(self, worker_id: int) -> bool:
        return False


class Followed:
    """Models over ``Dynamo``; what has failed is tried again at once, and nothing is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
        dynamo = self.dynamo = Dynamo()

        async def opened(runtime: Any, name: EndpointName) -> Client:
            await dynamo.call(f"client of {name}")
            return Client()

        class Endpoint:
            instance_id = 99

            def __init__(self, runtime: Any, name: EndpointName) -> None:
                self.name, self.model = name, ""

            def serve(self, front: Any) -> asyncio.Task[bool]:
                return asyncio.ensure_future(asyncio.Event().wait())

            async def show(self, card: ModelCard) -> None:
                self.model = card.name
                await dynamo.call(f"showing of {card.name}")
                dynamo.shown.append(card.name)
                dynamo.cards.append(card)

            async def hide(self) -> None:
                dynamo.shown.remove(self.model)
                await dynamo.call(f"hiding of {self.model}")

        monkeypatch.setattr(module.WorkerClient, "open", opened)
        monkeypatch.setattr(module, "FrontEndpoint", Endpoint)
        monkeypatch.setattr(module, "RETRY_S", 0.0)
        monkeypatch.setattr(module, "CLIENT_TIMEOUT_S", 0.01)
        self.entries = {each.key: each for each in entries}
        decider = Decider(WindowIndex(), Weights(), namespaced_sequence_hashes)
        self.forwarder = Forwarder(decider, Promises(), lambda rank: True)
        self.models = Models(
            None, self.entries, EndpointName.parse("dyn://n.c.e"), self.forwarder, book=self.book
        )

    def book(self, model: str, block_size: int) -> LoadBook:
        if f"book of {model}" in self.dynamo.failing:
            raise RuntimeError(f"no book of {model}")
        return LoadBook(block_size)

    def workers(self) -> dict[str, list[Rank]]:
        return {name: list(model.pool.ranks) for name, model in sorted(self.forwarder.models.items())}


def of(model: str, worker_id: int, **changes: Any) -> Entry:
    """A worker whose model lies on this machine; each model has a component of its own."""
    given = {"served_model_name": model, "component": f"of-{model}", "model_path": "/", "visible": False}
    return entry(worker_id, **{**given, **changes})


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("how", ["failing", "hanging"])
def test_an_endpoint_that_cannot_be_called_costs_its_own_workers_until_it_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async def body() -> None:
        others = of("a", 2, component="elsewhere"), of("b", 3)
        followed = Followed(monkeypatch, of("a", 1), *others)
        at_fault: set[str] = getattr(followed.dynamo, how)
        at_fault.add("client of n.of-a.generate")
        for _ in range(3):
            await followed.models.update()
        assert followed.workers() == {"a": [Rank(2)], "b": [Rank(3)]}
        assert sorted(followed.dynamo.shown) == ["a", "b"]
        (error,) = errors(caplog)
        assert error.startswith("workers at n.of-a.generate cannot be called: ")
        at_fault.clear()
        await followed.models.update()
        assert followed.workers() == {"a": [Rank(1), Rank(2)], "b": [Rank(3)]}

    asyncio.run(body())


def test_an_endpoint_that_failed_is_tried_once_for_all_its_workers_and_not_before_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        followed = Followed(monkeypatch, of("a", 1), of("a", 2))
        monkeypatch.setattr(module, "RETRY_S", 3_600.0)
        followed.dynamo.failing.add("client of n.of-a.generate")
        await followed.models.update()
        late = of("b", 3)
        followed.entries[late.key] = late
        await followed.models.update()
        assert followed.dynamo.tries.count("client of n.of-a.generate") == 1
        assert followed.workers() == {"b": [Rank(3)]}

    asyncio.run(body())


@pytest.mark.parametrize("path", ["/", "/not/here", "x" * 1_000], ids=["dynamo", "missing", "unreadable"])
def test_a_model_that_cannot_be_shown_costs_no_other_and_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    async def body() -> None:
        followed = Followed(monkeypatch, of("a", 1, model_path=path), of("b", 2))
        if path == "/":
            followed.dynamo.failing.add("showing of a")
        for _ in range(3):
            await followed.models.update()
        assert followed.dynamo.shown == ["b"]
        (error,) = errors(caplog)
        assert error.startswith("model 'a' cannot be shown: ")
        if path == "/":
            followed.dynamo.failing.clear()
            await followed.models.update()
            assert followed.dynamo.shown == ["b", "a"]

    asyncio.run(body())


def test_a_fault_that_comes_again_is_named_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        worker = of("a", 1, model_path="/not/here")
        followed = Followed(monkeypatch, worker)
        for _ in range(2):
            followed.entries[worker.key] = worker
            await followed.models.update()
            del followed.entries[worker.key]
            await followed.models.update()
        assert 2 == len(errors(caplog))

    asyncio.run(body())


def test_a_fault_is_named_when_it_comes_or_changes(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    for reason in ("one", "one", "other"):
        faults.report("it fails", reason)
    assert ["it fails: one", "it fails: other"] == errors(caplog)
    faults.over("it fails")
    faults.report("it fails", "other")
    faults.report_all({"all fails": "one"})
    faults.report_all({"all fails": "one"})
    faults.report_all({})
    faults.report_all({"it fails": "other"})
    assert ["it fails: other", "all fails: one", "it fails: other"] == errors(caplog)[2:]


def test_a_model_that_cannot_be_hidden_ends_neither_the_following_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        first, second = of("a", 1), of("b", 2)
        followed = Followed(monkeypatch, first, second)
        monkeypatch.setattr(module, "UNSERVED_S", 0.0)
        await followed.models.update()
        followed.dynamo.failing |= {"hiding of a", "hiding of b"}
        del followed.entries[first.key]
        third = of("c", 3)
        followed.entries[third.key] = third
        await followed.models.update()
        assert followed.workers() == {"a": [], "b": [Rank(2)], "c": [Rank(3)]}
        assert followed.dynamo.shown == ["b", "c"]
        await followed.models.hide()
        assert followed.dynamo.shown == []

    asyncio.run(body())


def test_whatever_fails_as_a_models_workers_are_taken_in_costs_that_model_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        followed = Followed(monkeypatch, of("a", 1), of("b", 2))
        followed.dynamo.failing.add("book of a")
        for _ in range(3):
            await followed.models.update()
        assert followed.workers() == {"b": [Rank(2)]}
        (error,) = errors(caplog)
        assert error.startswith("workers of model 'a' cannot be taken in: no book of a")
        followed.dynamo.failing.clear()
        await followed.models.update()
        assert followed.workers() == {"a": [Rank(1)], "b": [Rank(2)]}

    asyncio.run(body())


@pytest.mark.parametrize(("changes", "reason"), ODD, ids=[next(iter(changes)) for changes, _ in ODD])
def test_an_odd_entry_costs_itself_alone_and_is_named_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    reason: str,
) -> None:
    async def body() -> None:
        odd = of("a", **{"worker_id": 15, "epochs": {0: 1}, **changes})
        followed = Followed(monkeypatch, odd, of("a", 2))
        await followed.models.update()
        late = of("b", 3)
        followed.entries[late.key] = late
        await followed.models.update()
        assert followed.workers() == {"a": [Rank(2)], "b": [Rank(3)]}
        (error,) = errors(caplog)
        assert f"worker {odd.worker_id} is not used: {reason}" in error

    asyncio.run(body())
