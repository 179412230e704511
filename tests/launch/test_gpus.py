"""Which worker gets which GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vswa_plugin.engine.gpus import visible_gpus
from vswa_plugin.errors import ConfigError
from vswa_plugin.launch.__main__ import settings_from
from vswa_plugin.launch.gpus import gpus_needed

PREFILL, DECODE, VISIBLE = (f"{kind}CUDA_VISIBLE_DEVICES" for kind in ("PREFILL_", "DECODE_", ""))


def sets(model_dir: Path, *argv: str, said: list[str] | None = None, **environ: str) -> list[tuple[str, ...]]:
    """The GPUs of each worker, by group."""
    line = [argv[0], "--model-path", str(model_dir), *argv[1:]]
    settings, _ = settings_from(line, {VISIBLE: "", **environ}, say=(said if said is not None else []).append)
    return [group.gpus for group in settings.groups]


@pytest.mark.parametrize(
    ("argv", "environ", "expected"),
    [
        (["disagg"], {PREFILL: "0", DECODE: "1"}, [("0",), ("1",)]),
        (["disagg_router", "--prefill-workers", "2"], {PREFILL: "2,3", DECODE: "5"}, [("2", "3"), ("5",)]),
        (
            ["disagg", "--decode-workers", "2"],
            {PREFILL: "GPU-a", DECODE: " 1 , 2,3"},
            [("GPU-a",), ("1", "2")],
        ),
        (["disagg"], {PREFILL: "0", DECODE: "0"}, [("0",), ("0",)]),
        (["disagg"], {VISIBLE: "4,5,6"}, [("4",), ("5",)]),
        (["disagg"], {VISIBLE: "4,5,6", DECODE: "4"}, [("5",), ("4",)]),
        (["agg", "--workers", "3"], {VISIBLE: "0,1,2,3"}, [("0", "1", "2")]),
        (["agg", "--workers", "3"], {}, [()]),
        (["agg", "--workers", "3"], {VISIBLE: "-1"}, [()]),
        (["disagg"], {}, [(), ()]),
    ],
)
def test_each_worker_has_gpus_of_its_own(
    model_dir: Path, argv: list[str], environ: dict[str, str], expected: list[tuple[str, ...]]
) -> None:
    assert expected == sets(model_dir, *argv, **environ)


def test_a_worker_gets_as_many_as_its_parallel_sizes_need(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefill.yaml"
    file.write_text("tensor_parallel_size: 2\npipeline_parallel_size: 2\n")
    environ = {"PREFILL_ENGINE_ARGS": str(file), PREFILL: "0,1,2,3,4,5,6,7", DECODE: "8,9"}
    split = sets(model_dir, "disagg", "--prefill-workers", "2", **environ)

    assert [("0,1,2,3", "4,5,6,7"), ("8",)] == split
    both = sets(
        model_dir, "agg", "--workers", "2", "--", "--tensor-parallel-size", "2", **{VISIBLE: "0,1,2,3"}
    )
    assert [("0,1", "2,3")] == both
    assert 1 == gpus_needed({"tensor_parallel_size": "two"})
    assert 6 == gpus_needed({"tensor_parallel_size": 2, "data_parallel_size": 3}), (
        "vLLM's ranks have GPUs each"
    )


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (
            ["disagg", "--prefill-workers", "3"],
            {PREFILL: "0,1", DECODE: "2"},
            rf"^{PREFILL}: expected 3 GPUs, 1 for each of 3 prefill workers .*, got 2: 0,1; name more,",
        ),
        (
            ["agg", "--workers", "2", "--", "--tensor-parallel-size", "4"],
            {VISIBLE: "0,1"},
            rf"^{VISIBLE}: expected 8 GPUs, 4 for each of 2 agg workers .* got 2.* unset it",
        ),
        (["disagg"], {PREFILL: "0", DECODE: "1,1"}, rf"^{DECODE}: expected different GPUs, got 1, 1"),
        (["disagg"], {PREFILL: "0", DECODE: "1,2,1"}, rf"^{DECODE}: expected different GPUs, got 1, 2, 1"),
        (["disagg"], {VISIBLE: "0,0,1"}, rf"^{VISIBLE}: expected different GPUs, got 0, 0, 1"),
        (["disagg"], {PREFILL: ",", DECODE: "1"}, rf"^{PREFILL}: expected numbers or UUIDs .*, got ','"),
        (["disagg"], {PREFILL: "0-3", DECODE: "4"}, rf"^{PREFILL}: .* got '0-3'; unset it for an engine on"),
        (["disagg"], {PREFILL: "-1", DECODE: "4"}, rf"^{PREFILL}: expected numbers or UUIDs .* got '-1'"),
        (["disagg"], {VISIBLE: "0", DECODE: "0"}, None),
    ],
)
def test_too_few_are_refused_with_the_numbers(
    model_dir: Path, argv: list[str], environ: dict[str, str], message: str | None
) -> None:
    if message is None:
        assert [(), ("0",)] == sets(model_dir, *argv, **environ)
        return
    with pytest.raises(ConfigError, match=message):
        sets(model_dir, *argv, **environ)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        ("GPU-1b2c-1234-1-1,GPU-2", ("GPU-1b2c-1234-1-1", "GPU-2")),
        ("MIG-12345678-1234-1234-1234-123456789012", ("MIG-12345678-1234-1234-1234-123456789012",)),
        ("MIG-GPU-1-1/1/0,0", ("MIG-GPU-1-1/1/0", "0")),
        ("0,,1", ("0",)),
        (" 3 , 2", ("3", "2")),
        ("-1,0", ()),
        ("2,-1,0", ("2",)),
        ("none", ()),
        ("NoDevFiles", ()),
        ("0-3", ()),
    ],
)
def test_gpus_are_seen_as_cuda_sees_them(named: str, seen: tuple[str, ...]) -> None:
    assert seen == visible_gpus({VISIBLE: named})


def test_the_machines_gpus_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    devices = tmp_path / "dev"
    devices.mkdir()
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (devices / name).write_text("")
    in_container = visible_gpus({}, tmp_path)
    for bus in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)

    assert (("0", "1"), ("0", "1", "2")) == (in_container, visible_gpus({}, tmp_path))
    assert () == visible_gpus({}, tmp_path / "none")
    assert (("5", "6"), (), ("1",)) == tuple(
        visible_gpus({VISIBLE: named}, tmp_path) for named in ("5, 6", "", "1,-1,2")
    )


def test_a_machine_with_too_few_shares_them_and_says_so(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("vswa_plugin.launch.gpus.visible_gpus", lambda environ: ("0",))
    settings, _ = settings_from(
        ["agg", "--workers", "2", "--model-path", str(model_dir)], {}, say=said.append
    )

    assert () == settings.groups[0].gpus
    assert "expected 2 GPUs, 1 for each of 2 agg workers" in said[-1] and "got 1 on this machine" in said[-1]
