"""Flags of Dynamo's vLLM worker, on the worker's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vswa_plugins.vllm.options import parse_options

from vswa_plugin.errors import ConfigError
from vswa_plugin.worker.args import parse
from vswa_plugin.worker.dynamo_flags import FLAGS, Takes, names_of
from vswa_plugin.worker.vllm_flags import VLLM_FLAGS

SAMPLES: dict[type, tuple[str, Any]] = {
    int: ("2", 2),
    float: ("0.5", 0.5),
    str: ("some", "some"),
    dict: ('{"a": 1}', {"a": 1}),
}


def options(model_dir: Path, *argv: str) -> dict[str, Any]:
    return parse(["--model-path", str(model_dir), "--engine", "vllm", *argv], {}).settings.options


@pytest.mark.parametrize("flag", VLLM_FLAGS, ids=lambda flag: flag.name)
def test_each_flag_sets_the_option_of_its_name(flag: Any, model_dir: Path) -> None:
    if flag.takes is Takes.SWITCH:
        given = [([flag.name], True), ([f"--no-{flag.name[2:]}"], False)]
    else:
        text, value = SAMPLES[flag.kind]
        given = [([flag.name, text], value)]

    for argv, value in given:
        assert {flag.name[2:].replace("-", "_"): value} == options(model_dir, *argv)


def test_no_flag_means_two_things() -> None:
    ours = [name for flag in VLLM_FLAGS for name in names_of(flag)]

    assert len(ours) == len(set(ours))
    assert set() == set(ours) & {name for flag in FLAGS for name in names_of(flag)}


def test_a_deployment_of_dynamos_vllm_worker_starts_with_its_flags(model_dir: Path) -> None:
    made = options(
        model_dir, "--tensor-parallel-size", "2", "--max-model-len", "4096", "--enforce-eager",
        "--gpu-memory-utilization", "0.8", "--block-size", "32", "--kv-events-config", '{"endpoint": "tcp://*:5557"}',
    )  # fmt: skip
    parsed = parse_options(made, "the command line", ())

    assert (32, 4096, "tcp://*:5557") == (parsed.block_size, parsed.max_model_len, parsed.events["endpoint"])
    assert 2 == parsed.engine_args["tensor_parallel_size"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--block-size", "x"], "--block-size: expected a whole number, got 'x'"),
        (["--kv-transfer-config", "NixlConnector"], "--kv-transfer-config: expected a JSON object"),
    ],
)
def test_another_value_is_refused_with_the_flag(argv: list[str], message: str, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        options(model_dir, *argv)
