"""Requests that end early: cancelled, or by a step that fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.model.model import Gemma3Model
from vswa_plugins.gemma3_cpu.serving.scheduler import MAX_FAILED_STEPS

from tests.gemma3_engine_helpers import OPTIONS, Bench, Cold, Reader, prompt_of, request_for
from tests.gemma3_engine_helpers import bench as bench
from tests.gemma3_engine_helpers import cold as cold
from tests.gemma3_engine_helpers import model as model
from tests.gemma3_engine_helpers import small as small
from vswa_plugin.errors import InvariantError, RequestError


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_cancelling_frees_the_blocks_at_the_next_step(bench: Bench, steps: int) -> None:
    reader = bench.add(request_for(prompt_of(100), 50))
    for _ in range(steps):
        bench.step()
    assert reader.generation is not None
    reader.generation.cancelled = True
    heard = len(reader.outputs)

    bench.step()

    assert {"blocks_used_32": 0.0, "blocks_used_global": 0.0} == bench.used()
    assert not bench.scheduler.has_work
    assert heard == len(reader.outputs)


class Boom(RuntimeError):
    """A bug that only a test has."""


def fail_when(bench: Bench, failing: list[bool]) -> None:
    def before(chunks: Any) -> None:
        if failing.pop(0) if failing else False:
            raise Boom("bang")

    bench.before_forward = before


def error_of(reader: Reader) -> str:
    assert isinstance(reader.outputs[-1], RequestError)
    return str(reader.outputs[-1])


def test_a_failing_step_ends_its_requests_and_no_others(model: Gemma3Model, cold: Cold) -> None:
    bench = Bench(model, {**OPTIONS, "max_batch_size": 2})
    readers = [bench.add(request_for(prompt_of(30, seed), 4)) for seed in range(3)]
    fail_when(bench, [False, True])

    while bench.scheduler.has_work:
        bench.step()

    assert "the engine failed while it ran this request: Boom: bang" == error_of(readers[0])
    assert error_of(readers[0]) == error_of(readers[1])
    assert readers[0].outputs[-1] is not readers[1].outputs[-1]
    assert cold.greedy(prompt_of(30, 2), 4) == readers[2].tokens
    assert 1 == bench.scheduler.counters.failed_steps
    assert {0.0} == set(bench.used().values())


def test_a_failure_that_repeats_stops_the_engine(bench: Bench) -> None:
    fail_when(bench, [True] * MAX_FAILED_STEPS)
    readers = []
    for _ in range(MAX_FAILED_STEPS - 1):
        readers.append(bench.add(request_for(prompt_of(30))))
        bench.step()
    readers.append(bench.add(request_for(prompt_of(30))))

    with pytest.raises(Boom):
        bench.step()

    assert all("Boom: bang" in error_of(reader) for reader in readers)


def test_failures_in_between_good_steps_do_not_stop_the_engine(bench: Bench) -> None:
    fail_when(bench, [True, False] * (MAX_FAILED_STEPS + 1))

    for seed in range(2 * (MAX_FAILED_STEPS + 1)):
        bench.run(request_for(prompt_of(10, seed), 1))

    assert MAX_FAILED_STEPS + 1 == bench.scheduler.counters.failed_steps


def test_a_broken_cache_stops_the_engine_at_once_and_all_requests_hear_of_it(bench: Bench) -> None:
    first, waiting = (bench.add(request_for(prompt_of(300, seed))) for seed in range(2))
    bench.step()
    pool = bench.manager._store.device[0]  # type: ignore[attr-defined]

    def before(chunks: Any) -> None:
        pool.free.pop()
        raise Boom("bang")

    bench.before_forward = before
    with pytest.raises(InvariantError) as stopped:
        bench.scheduler.step()
    bench.scheduler.end_all(stopped.value)

    assert "Boom" in error_of(first)
    assert waiting.finished and isinstance(waiting.outputs[-1], RequestError)
    assert not bench.scheduler.has_work


def test_logits_that_are_not_finite_end_only_their_request(bench: Bench, cold: Cold) -> None:
    good, bad = bench.add(request_for(prompt_of(8), 3)), bench.add(request_for(prompt_of(9), 3))
    forward = bench._forward

    def poisoned(chunks: Any, /) -> Any:
        logits = forward(chunks)
        if len(logits) == 2:
            logits[1, 5] = np.nan
        return logits

    bench._forward = poisoned  # type: ignore[assignment]
    while bench.scheduler.has_work:
        bench.step()

    assert cold.greedy(prompt_of(8), 3) == good.tokens
    assert "FloatingPointError: expected finite logits" in error_of(bad)


def test_ending_all_tells_running_and_waiting_requests(model: Gemma3Model) -> None:
    bench = Bench(model, {**OPTIONS, "max_batch_size": 1})
    running, waiting = (bench.add(request_for(prompt_of(30, seed), 9)) for seed in range(2))
    bench.step()
    bench.step()

    bench.scheduler.end_all()

    bench.manager.check()
    assert ["cancelled", "cancelled"] == [r.last["finish_reason"] for r in (running, waiting)]
    assert len(running.tokens) == running.last["completion_usage"]["completion_tokens"] > 0
    assert {0.0} == set(bench.used().values())
