"""Fixtures of the tests of the engine plugin vllm: a stand-in of the package, and a model directory."""

from tests.vllm_helpers import install_standin, model, standin

__all__ = ["install_standin", "model", "standin"]
