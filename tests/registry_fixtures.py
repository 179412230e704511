"""An etcd under test as fixtures. A test module imports those that it needs under their own names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Run
from tests.registry_helpers import EtcdBackend


# Imported as `x as x`: pytest finds a fixture by its name in the module, ruff sees that it is meant.
@pytest.fixture(scope="module")
def etcd_place(run: Run[Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdBackend]:
    place = EtcdBackend(tmp_path_factory.mktemp("etcd"), run)
    run(place.come_back())
    yield place
    run(place.stop())


@pytest.fixture
def etcd(etcd_place: EtcdBackend, run: Run[Any]) -> EtcdBackend:
    """An etcd of the module's own, empty."""
    run(etcd_place.clear())
    return etcd_place
