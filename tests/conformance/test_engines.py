"""The engines of this project, each in the suite for engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine

from tests import gemma3_engine_helpers as gemma3
from tests import tensorrt_llm_helpers as tensorrt_llm
from tests.gemma3_engine_helpers import small as small
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import LLM
from vswa_plugin.engine.contract import Engine
from vswa_plugin.testing.conformance import EngineConformance
from vswa_plugin.testing.engine import StandinEngine, standin_settings


def by_manager_v1(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "kv_cache_config": {**options["kv_cache_config"], "use_kv_cache_manager_v2": False}}


class TestStandinEngine(EngineConformance):
    @pytest.fixture
    def engine(self) -> Engine:
        return StandinEngine(standin_settings(cache=True))


class TestGemma3Cpu(EngineConformance):
    options: dict[str, Any] = gemma3.OPTIONS
    ranks = 1
    long_answer = 400  # the model is quick

    @pytest.fixture
    def engine(self, small: Path) -> Engine:
        return Gemma3CpuEngine(gemma3.settings_for(small, self.options, ranks=self.ranks))


class TestGemma3CpuOfTwoRanks(TestGemma3Cpu):
    ranks = 2


class TestGemma3CpuByManagerV1(TestGemma3Cpu):
    options = by_manager_v1(gemma3.OPTIONS)


class TestTensorRtLlm(EngineConformance):
    kind = "v2"
    blocks = LLM.blocks
    options: dict[str, Any] = tensorrt_llm.OPTIONS

    @pytest.fixture
    def engine(self, standin: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
        monkeypatch.setattr(LLM, "kind", self.kind)
        monkeypatch.setattr(LLM, "blocks", self.blocks)
        return TensorRtLlmEngine(tensorrt_llm.settings_for(model, self.options))


class TestTensorRtLlmByManagerV1(TestTensorRtLlm):
    kind = "v1"
    #: It takes all blocks of a prompt when it is admitted, in each window.
    blocks = (80, 120)
    options = by_manager_v1(tensorrt_llm.OPTIONS)
