"""Both registries pass the conformance suites of registries, over a real etcd and a real directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.registry_fixtures import etcd as etcd
from tests.registry_fixtures import etcd_place as etcd_place
from tests.registry_helpers import EtcdBackend, FileBackend
from vswa_plugin.testing.registries import RegistryConformance
from vswa_plugin.testing.registry_backends import InterruptibleBackend, RegistryBackend
from vswa_plugin.testing.registry_outages import RegistryOutageConformance


class TestFileRegistry(RegistryConformance, RegistryOutageConformance):
    @pytest.fixture
    def backend(self, run: Run[Any], tmp_path: Path) -> RegistryBackend:
        return FileBackend(tmp_path, run)


class TestEtcdRegistry(RegistryConformance, RegistryOutageConformance):
    @pytest.fixture
    def backend(self, etcd: EtcdBackend) -> InterruptibleBackend:
        return etcd
