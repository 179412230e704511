"""What clients and other routers can make a router do: refuse, never fail, and never hold without bound."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from vswa_plugin.blocks.layout import CacheGroup, CacheLayout, Naming
from vswa_plugin.dynamo.client import namespaced_sequence_hashes
from vswa_plugin.errors import RequestError
from vswa_plugin.index import WindowIndex
from vswa_plugin.router.decide import Decider
from vswa_plugin.router.pools import Pool
from vswa_plugin.selection import LoadBook, Weights
from vswa_plugin.wire.events import Rank, Stored

BLOCK = 32
RANKS = (Rank(7), Rank(8))
TAINTS = {7: frozenset({"gold", "old"}), 8: frozenset({"gold"})}
CACHED = [2] * 3 * BLOCK
PROMPT = [*CACHED, *[5] * 999]
INFINITE = math.inf

DECIDED = "decided"


def decider() -> tuple[Decider, Pool]:
    """Two ranks, of which the first holds the first three blocks of the prompt."""
    index = WindowIndex()
    for rank in RANKS:
        index.join(rank, CacheLayout((CacheGroup(0, None, BLOCK),), "trtllm_v2", "m"))
    index.apply(RANKS[0], Stored(0, 0, None, tuple(namespaced_sequence_hashes(CACHED, BLOCK))))
    pool = Pool("m", Naming(BLOCK, BLOCK), LoadBook(BLOCK), RANKS, TAINTS)
    return Decider(index, Weights(), namespaced_sequence_hashes), pool


def outcomes(request: dict[str, Any]) -> tuple[list[str], int]:
    """What three equal requests in a row come to, and how many of them are booked afterwards."""
    by, pool = decider()
    found = []
    for _ in range(3):
        try:
            cost = by.decide(pool, {"token_ids": PROMPT, **request}).cost
            found.append(DECIDED if math.isfinite(cost) else f"a cost of {cost}")
        except RequestError as error:
            found.append(f"refused: {error}")
        except Exception as error:
            found.append(f"failed: {type(error).__name__}: {error}")
    return found, sum(pool.book.load(rank).requests for rank in RANKS)


def override(**fields: float) -> dict[str, Any]:
    return {"router_config_override": fields}


def preferred(**taints: float) -> dict[str, Any]:
    return {"routing": {"routing_constraints": {"preferred_taints": taints}}}


@pytest.mark.parametrize(
    ("request_fields", "named"),
    [
        pytest.param(override(router_temperature=1e-320), "router_temperature"),
        pytest.param(override(router_temperature=5e-324), "router_temperature"),
        pytest.param(override(router_temperature=1e308), "router_temperature"),
        pytest.param(override(prefill_load_scale=1e300, router_temperature=1e-5), "prefill_load_scale"),
        pytest.param(override(prefill_load_scale=1e308), "prefill_load_scale"),
        pytest.param(override(overlap_score_weight=1e308), "overlap_score_weight"),
        pytest.param(override(prefill_load_scale=1e308, router_temperature=1.0), "prefill_load_scale"),
        pytest.param(override(overlap_score_credit=1.7e308), "overlap_score_credit"),
        pytest.param(override(overlap_score_credit=1e308, router_temperature=1.0), "overlap_score_credit"),
        pytest.param(preferred(gold=1e308, old=1e308), "preferred_taints"),
        pytest.param(preferred(gold=-1e308, old=1e308), "preferred_taints"),
        pytest.param(preferred(gold=INFINITE, old=-INFINITE), "preferred_taints"),
        pytest.param(preferred(gold=math.nan), "preferred_taints"),
    ],
    ids=str,
)
def test_what_a_client_says_of_routing_is_obeyed_or_refused_by_name(
    request_fields: dict[str, Any], named: str
) -> None:
    found, booked = outcomes(request_fields)

    assert [] == [each for each in found if each != DECIDED and not each.startswith("refused: ")]
    assert [] == [each for each in found if each.startswith("refused: ") and named not in each]
    assert found.count(DECIDED) == booked


@pytest.mark.parametrize(
    "request_fields",
    [
        override(router_temperature=-1.0),
        override(prefill_load_scale=INFINITE),
        override(overlap_score_credit=math.nan),
        {"router_config_override": "fast"},
        {"routing": {"dp_rank": -1}},
        {"routing": {"backend_instance_id": 2**70}},
    ],
    ids=str,
)
def test_what_can_never_be_obeyed_is_refused_and_booked_nowhere(request_fields: dict[str, Any]) -> None:
    found, booked = outcomes(request_fields)

    assert [] == [each for each in found if not each.startswith("refused: ")]
    assert 0 == booked


#: Messages of one stranger, each of a long prompt of its own; ends early once the bound is passed.
FLOOD = """
import resource
import sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from vswa_plugin.router.replicas.messages import Put, State, encode
from vswa_plugin.router.replicas.load import SharedLoad

def mebibytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

load = SharedLoad(1)
book = load.book("m", 32)
before = mebibytes()
for key in range(60):
    hashes = tuple(range(key << 20, (key << 20) + 32_768))
    put = Put(State(key, 7, 0, 1_000_000), "m", hashes, 32_768 * 32, 0, True)
    for payload in encode(0xBAD, [put]):
        load.receive(payload, 1.0)
    if mebibytes() - before > int(sys.argv[1]):
        break
print(mebibytes() - before)
"""
LIMIT_MIB = 128


def test_what_other_routers_say_of_their_load_takes_bounded_memory() -> None:
    command = [sys.executable, "-c", FLOOD, str(LIMIT_MIB)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    assert (0, "") == (child.returncode, child.stderr)
    assert LIMIT_MIB >= int(child.stdout)
