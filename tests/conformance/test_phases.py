"""The engines of this project that have both phases, each pair in the suite for phases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.gemma3_cpu.serving.engine import Gemma3CpuEngine
from vswa_plugins.tensorrt_llm.engine import TensorRtLlmEngine

from tests import gemma3_engine_helpers as gemma3
from tests import tensorrt_llm_helpers as tensorrt_llm
from tests.conformance.faulty_phases import StandinPhases
from tests.conformance.test_engines import by_manager_v1
from tests.gemma3_engine_helpers import small as small
from tests.tensorrt_llm_helpers import install_standin as install_standin
from tests.tensorrt_llm_helpers import model as model
from tests.tensorrt_llm_helpers import standin as standin
from tests.tensorrt_llm_package import LLM
from vswa_plugin.engine.contract import Engine
from vswa_plugin.testing.phases import PhasesConformance


class TestStandin(StandinPhases):
    """Without a fault it passes, or the faults would prove nothing."""


class TestGemma3Cpu(PhasesConformance):
    options: dict[str, Any] = gemma3.OPTIONS
    ranks = 1
    long_answer = 400  # the model is quick
    waiting = ("transfers_held", "blocks_used")
    received = ("transfer_bytes",)

    @pytest.fixture
    def engines(self, small: Path) -> tuple[Engine, Engine]:
        prefill, decode = (
            Gemma3CpuEngine(gemma3.settings_for(small, self.options, mode, self.ranks))
            for mode in ("prefill", "decode")
        )
        return prefill, decode


class TestGemma3CpuOfTwoRanks(TestGemma3Cpu):
    ranks = 2


class TestGemma3CpuByManagerV1(TestGemma3Cpu):
    options = by_manager_v1(gemma3.OPTIONS)


class TestTensorRtLlm(PhasesConformance):
    """Over the stand-in, whose transceiver moves nothing."""

    kind = "v2"

    @pytest.fixture
    def engines(self, standin: None, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Engine]:
        monkeypatch.setattr(LLM, "kind", self.kind)
        options = tensorrt_llm.OPTIONS | tensorrt_llm.NIXL
        prefill, decode = (
            TensorRtLlmEngine(tensorrt_llm.settings_for(model, options, mode))
            for mode in ("prefill", "decode")
        )
        return prefill, decode
