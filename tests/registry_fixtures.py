"""Registries under test as fixtures. A test module imports those that it needs under their own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import pytest

from tests.conftest import Run
from tests.registry_helpers import Backend, EtcdBackend, FileBackend

B = TypeVar("B", bound=Backend)


def _while_it_runs(made: B, run: Run[Any]) -> Iterator[B]:
    if isinstance(made, EtcdBackend):
        run(made.come_back())
    yield made
    run(made.stop())


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture(scope="module")
def etcd_place(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdBackend]:
    yield from _while_it_runs(EtcdBackend(tmp_path_factory.mktemp("etcd")), run)


@pytest.fixture
def etcd(etcd_place: EtcdBackend, run: Run[Any]) -> EtcdBackend:
    """An etcd of the module's own, empty."""
    run(etcd_place.clear())
    return etcd_place


@pytest.fixture(scope="module", params=["etcd", "file"])
def place(
    request: pytest.FixtureRequest, run: Run[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("registry")
    yield from _while_it_runs(EtcdBackend(folder) if request.param == "etcd" else FileBackend(folder), run)


@pytest.fixture
def backend(place: Backend, run: Run[Any]) -> Backend:
    """The place, empty. Workers that entries name as on this host are taken for dead in files."""
    run(place.clear())
    return place
