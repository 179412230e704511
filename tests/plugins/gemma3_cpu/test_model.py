"""The Gemma 3 model: equal to Hugging Face's, whatever the chunks, the pages and the batch."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.model.attention import attend, plan_chunk
from vswa_plugins.gemma3_cpu.model.config import Gemma3Config, Rope
from vswa_plugins.gemma3_cpu.model.model import Chunk, Gemma3Model
from vswa_plugins.gemma3_cpu.model.paged import PagedKV, clip_runs, find_runs, group_layers, slots_of
from vswa_plugins.gemma3_cpu.model.rope import RopeTable, interleave
from vswa_plugins.gemma3_cpu.weights.checkpoint import make_checkpoint
from vswa_plugins.gemma3_cpu.weights.source import load_model

from tests.make_gemma3_golden import (
    GOLDEN_DIR,
    TINY,
    VARIANTS,
    Variant,
    reference_logits,
    weights_digest,
    write_checkpoint,
)
from tests.properties import examples
from vswa_plugin.errors import InvariantError

TOLERANCE = 1e-4
SPARE_PAGES = 3


def new_store(config: Gemma3Config, blocks: int, block_size: int) -> PagedKV:
    """A store whose pages hold NaN: whoever reads what was not written shows it."""
    layers = group_layers(config)
    kv = PagedKV(config, layers, [blocks + SPARE_PAGES] * len(layers), block_size)
    for array in (*kv.k, *kv.v):
        array.fill(np.nan)
    return kv


def straight_tables(config: Gemma3Config, blocks: int) -> list[list[int]]:
    return [list(range(blocks)) for _ in config.groups]


def shuffled_tables(config: Gemma3Config, blocks: int, seed: int) -> list[list[int]]:
    random = np.random.RandomState(seed)
    return [random.permutation(blocks + SPARE_PAGES)[:blocks].tolist() for _ in config.groups]


def one_shot(model: Gemma3Model, token_ids: Any) -> Any:
    blocks = -(-len(token_ids) // 8)
    chunk = Chunk(np.asarray(token_ids), 0, straight_tables(model.config, blocks))
    return model.forward([chunk], new_store(model.config, blocks, 8))[0]


def without_left_window(
    tables: list[list[int]], config: Gemma3Config, start: int, block_size: int
) -> list[list[int]]:
    """The tables of an engine that gives back the pages that no query from ``start`` on can see."""
    kept = []
    for table, window in zip(tables, config.groups, strict=True):
        gone = 0 if window is None else max(0, start + 1 - window) // block_size
        kept.append([-1] * gone + table[gone:])
    return kept


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Gemma3Model:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_checkpoint(directory, overrides={**TINY, "num_key_value_heads": 2, "num_hidden_layers": 5})
    return load_model(directory)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_logits_equal_those_that_transformers_computed(name: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN_DIR / f"{name}.npz")
    about = json.loads(str(golden["about"]))
    variant = msgspec.convert(about["variant"], Variant)
    write_checkpoint(variant, about["seed"], tmp_path / name)
    assert about["weights_sha256"] == weights_digest(tmp_path / name), (
        "the weights differ: make the golden files again"
    )
    model = load_model(tmp_path / name)

    for position, expected in zip(variant.positions, golden["logits"], strict=True):
        actual = one_shot(model, golden["token_ids"][: position + 1])
        np.testing.assert_allclose(expected, actual, rtol=0, atol=TOLERANCE)


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="live check: pip install torch transformers"
)
@pytest.mark.parametrize("name", ["layer_types", "rope_parameters", "multimodal"])
def test_logits_equal_those_that_transformers_computes_now(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_checkpoint(VARIANTS[name], 77, tmp_path / name)
    token_ids = np.random.RandomState(78).randint(0, 320, 60)
    expected = reference_logits(tmp_path / name, token_ids)
    model = load_model(tmp_path / name)

    for position in (0, 20, 59):
        actual = one_shot(model, token_ids[: position + 1])
        np.testing.assert_allclose(expected[position], actual, rtol=0, atol=TOLERANCE)


@examples(25)
@given(data=st.data())
def test_chunks_on_scattered_pages_equal_one_pass(model: Gemma3Model, data: st.DataObject) -> None:
    """Any split into chunks, any page order, pages returned as soon as the window has passed them."""
    block_size = data.draw(st.sampled_from([1, 2, 4, 16]))
    length = data.draw(st.integers(2, 70))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    token_ids = np.random.RandomState(data.draw(st.integers(0, 99))).randint(0, 320, length)
    blocks = -(-length // block_size)
    tables = shuffled_tables(model.config, blocks, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        tables = straight_tables(model.config, blocks)
    kv = new_store(model.config, blocks, block_size)

    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        visible = without_left_window(tables, model.config, start, block_size)
        actual = model.forward([Chunk(token_ids[start:stop], start, visible)], kv)[0]
        np.testing.assert_allclose(one_shot(model, token_ids[:stop]), actual, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scattered", [False, True])
def test_decode_token_by_token_equals_one_pass(model: Gemma3Model, scattered: bool) -> None:
    token_ids = np.random.RandomState(3).randint(0, 320, 40)
    tables = shuffled_tables(model.config, 10, 1) if scattered else straight_tables(model.config, 10)
    kv = new_store(model.config, 10, 4)

    for position in range(40):
        visible = without_left_window(tables, model.config, position, 4)
        actual = model.forward([Chunk(token_ids[position : position + 1], position, visible)], kv)[0]
        np.testing.assert_allclose(one_shot(model, token_ids[: position + 1]), actual, rtol=0, atol=TOLERANCE)


def test_a_batch_equals_each_sequence_alone(model: Gemma3Model) -> None:
    """Prefill, a second chunk and a decode step in one pass; logits in chunk order, only where wanted."""
    random = np.random.RandomState(5)
    prompts = [random.randint(0, 320, length) for length in (50, 33, 21, 1)]
    kv = new_store(model.config, 40, 4)
    pages = random.permutation(40).tolist()
    tables = [[pages[10 * i : 10 * i + 13] for _ in model.config.groups] for i in range(4)]
    tables[0] = [pages[:13] for _ in model.config.groups]
    tables[1] = [pages[13:22] for _ in model.config.groups]
    tables[2] = [pages[22:28] for _ in model.config.groups]
    tables[3] = [pages[28:29] for _ in model.config.groups]
    first = [Chunk(prompts[0][:49], 0, tables[0], False), Chunk(prompts[1][:20], 0, tables[1], False)]
    assert (0, 320) == model.forward(first, kv).shape

    second = [
        Chunk(prompts[2], 0, tables[2]),
        Chunk(prompts[0][49:], 49, tables[0]),
        Chunk(prompts[1][20:30], 20, tables[1], False),
        Chunk(prompts[3], 0, tables[3]),
    ]
    actual = model.forward(second, kv)
    expected = [one_shot(model, prompts[i]) for i in (2, 0, 3)]
    np.testing.assert_allclose(expected, actual, rtol=0, atol=TOLERANCE)

    last = model.forward([Chunk(prompts[1][30:], 30, tables[1])], kv)[0]
    np.testing.assert_allclose(one_shot(model, prompts[1]), last, rtol=0, atol=TOLERANCE)


@examples(40)
@given(data=st.data())
def test_attention_equals_a_plain_one(data: st.DataObject) -> None:
    """Against softmax over an explicit mask, over several tiles of queries, any window."""
    start, n = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 600))
    window = data.draw(st.one_of(st.none(), st.integers(1, 700)))
    config = Gemma3Config(layer_types=("sliding_attention",), num_key_value_heads=2, head_dim=4)
    random = np.random.RandomState(n)
    blocks = -(-(start + n) // 8)
    kv = PagedKV(config, [[0]], [blocks], 8)
    table = list(range(blocks)) if data.draw(st.booleans()) else random.permutation(blocks).tolist()
    slots = slots_of(find_runs(table, 8, 0, start + n))
    kv.k[0][:] = random.standard_normal(kv.k[0].shape)
    kv.v[0][:] = random.standard_normal(kv.v[0].shape)
    bounded = data.draw(st.booleans())
    # Beyond the bound exp alone would overflow; there errors of the scores count more.
    queries = random.standard_normal((n, 4, 4)).astype(np.float32) * np.float32(1 if bounded else 100)
    out = np.empty_like(queries)

    attend(
        queries,
        plan_chunk(Chunk(np.zeros(n, int), start, [table]), 0, 0, window, kv),
        kv.k[0][0],
        kv.v[0][0],
        out,
        bounded=bounded,
    )
    i, j = np.arange(start, start + n)[:, None], np.arange(start + n)
    seen = (j <= i) & (j > i - (window or len(j)))
    keys, values = kv.k[0][0][:, slots].repeat(2, 0), kv.v[0][0][:, slots].repeat(2, 0)
    scores = np.where(seen, np.einsum("nhd,hmd->hnm", queries, keys), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hnm,hmd->nhd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(expected, out, rtol=0, atol=1e-5 if bounded else 1e-3)


@given(
    table=st.permutations(range(12)),
    block_size=st.integers(1, 5),
    bounds=st.tuples(st.integers(0, 59), st.integers(1, 60)).filter(lambda b: b[0] < b[1]),
    inner=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_runs_name_the_slot_of_every_position(
    table: list[int], block_size: int, bounds: tuple[int, int], inner: tuple[int, int]
) -> None:
    start, stop = (min(bound, 12 * block_size - 1 + at) for at, bound in enumerate(bounds))
    if start >= stop:
        return
    slots = {p: table[p // block_size] * block_size + p % block_size for p in range(start, stop)}

    runs = find_runs(table, block_size, start, stop)
    assert list(slots.values()) == slots_of(runs).tolist()
    assert all(a.slot + a.stop - a.start != b.slot for a, b in pairwise(runs))
    clipped = {
        run.slot + i: run.start + i for run in clip_runs(runs, *inner) for i in range(run.stop - run.start)
    }
    assert {slot: p for p, slot in slots.items() if inner[0] <= p < inner[1]} == clipped


def test_a_missing_page_is_named(model: Gemma3Model) -> None:
    kv = new_store(model.config, 4, 4)

    with pytest.raises(InvariantError, match="need block 1, which has no page"):
        model.forward([Chunk(np.arange(8), 0, [[0, -1], [0, 1]])], kv)
    with pytest.raises(InvariantError, match=r"need block 2, the page table has 2 blocks"):
        model.forward([Chunk(np.arange(9), 0, [[0, 1], [0, 1]])], kv)


def test_one_number_of_blocks_per_group(model: Gemma3Model) -> None:
    with pytest.raises(InvariantError, match="2 cache groups and 1 numbers of blocks"):
        PagedKV(model.config, group_layers(model.config), [4], 4)


def test_rope_rotates_each_dimension_with_its_partner() -> None:
    """The table grows past its first size, and gives Hugging Face's rotation for permuted heads."""
    dim, position, rope = 8, 5000, Rope(10_000.0, 4.0)
    head = np.random.RandomState(0).standard_normal(dim).astype(np.float32)
    angle = position / 4.0 / 10_000.0 ** (np.arange(0, dim, 2) / dim)
    a, b = head[: dim // 2], head[dim // 2 :]
    expected = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    table = RopeTable(rope, dim).upto(position + 1)
    rotated = (interleave(head, dim).view(np.complex64) * table[position]).view(np.float32)
    np.testing.assert_allclose(interleave(expected, dim), rotated, rtol=0, atol=1e-3)
