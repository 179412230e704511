"""Through Dynamo's own publisher, its event plane and its KV router: what is scored is the definition."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vswa_plugin.dynamo.names import LOOPBACK_ENV

ALL = "abcdefgh"


def blocks(first: int, last: int) -> list[str]:
    """Blocks of :data:`ALL`, counted from 1, deepest first."""
    return [ALL[:n] for n in range(last, first - 1, -1)]


def store(path: str, first: int = 1, groups: tuple[int, ...] = (0, 1)) -> list[Any]:
    return ["store", list(groups), path, first - 1]


def random_steps(seed: int, length: int = 40) -> list[list[Any]]:
    dice = random.Random(seed)
    steps: list[list[Any]] = []
    for _ in range(length):
        path = "".join(dice.choice("ab") for _ in range(dice.randint(1, 7)))
        kind = dice.random()
        if kind < 0.55:
            steps.append(store(path, dice.randint(1, len(path)), dice.choice([(0,), (1,), (0, 1), (1, 0)])))
        elif kind < 0.97:
            steps.append(["remove", dice.randint(0, 1), path, path[:-1], path[:-2]])
        else:
            steps.append(["epoch"])
    return steps


def script(steps: list[list[Any]], mode: str = "boundary") -> dict[str, Any]:
    return {"mode": mode, "steps": steps}


#: Group 0 has a window of two blocks, group 1 is global.
SCRIPTS = {
    "a block in the middle goes and comes back alone": script(
        [store(ALL), ["remove", 1, ALL[:3]], store(ALL[:3], 3)]
    ),
    "the head goes and comes back, the tail stayed": script(
        [store(ALL), ["remove", 1, *blocks(1, 4)], store(ALL[:4])]
    ),
    "announced again while resident": script(
        [
            store(ALL),
            ["remove", 1, ALL[:4]],
            store(ALL, 4),
            ["remove", 1, *blocks(4, 8)],
            store(ALL, 4),
            ["remove", 1, ALL],
        ]
    ),
    "the window slides out of the head": script(
        [store(ALL), ["remove", 0, *blocks(1, 6)], ["remove", 0, ALL], store(ALL, 7, (0,))]
    ),
    "branches below one root": script(
        [store("abc" + letters) for letters in ("xy", "uv", "st")]
        + [["remove", 0, "abc"], ["remove", 1, "abcx", "abcu"], ["epoch"], store("abcuv")]
    ),
    "the same, by the global group": script(
        [store(ALL, 1, (1,)), ["remove", 1, ALL[:3]], store(ALL[:3], 3, (1,)), ["remove", 1, ALL[:1]]],
        "global",
    ),
    **{f"random {seed}": script(random_steps(seed)) for seed in range(2)},
    "random, global": script(random_steps(9), "global"),
}


@pytest.fixture(scope="module")
def found(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process with a worker's publisher and a router found, by name of the script."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "NATS_", "ETCD_"))
    }
    # Without a broker: the loopback settings name NATS as the event plane.
    env |= LOOPBACK_ENV | {"DYN_EVENT_PLANE": "zmq", "DYN_LOG": "error"}
    env["DYN_FILE_KV"] = str(tmp_path_factory.mktemp("discovery"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.dynamo_events_router", str(model_dir)],
        input=json.dumps(SCRIPTS),
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env=env,
        cwd=Path(__file__).parents[3],
    )
    assert 0 == done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_dynamos_router_scores_every_prompt_as_the_definition_after_each_step(found: Any, name: str) -> None:
    assert [0] * (len(SCRIPTS[name]["steps"]) + 1) == found[name]


def test_dynamos_router_scores_a_worker_whose_groups_have_blocks_of_several_sizes(found: Any) -> None:
    *wrong, published = found["several sizes"]

    assert [0] * 10 == wrong
    assert 0 < published


def test_dynamos_publisher_counts_stores_so_that_a_doubled_one_would_lie(found: Any) -> None:
    assert 8 == found["doubled store"], "the engine holds 7"


def test_a_router_that_starts_later_learns_what_is_published(found: Any) -> None:
    assert 3 == found["a later router"]
