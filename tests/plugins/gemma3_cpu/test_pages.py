"""Pages of one rank: what is moved, read and written, and how a token's attention finds them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vswa_plugins.gemma3_cpu.cache.api import DEVICE, HOST, Slot
from vswa_plugins.gemma3_cpu.model.attention import attend, plan_chunk
from vswa_plugins.gemma3_cpu.model.config import Gemma3Config
from vswa_plugins.gemma3_cpu.model.model import Chunk
from vswa_plugins.gemma3_cpu.model.paged import PagedKV
from vswa_plugins.gemma3_cpu.serving.managers import shared_pools
from vswa_plugins.gemma3_cpu.serving.options import parse_options
from vswa_plugins.gemma3_cpu.serving.pages import PageStore
from vswa_plugins.gemma3_cpu.serving.pools import model_shape, plan_cache

SLIDING, FULL = "sliding_attention", "full_attention"
BLOCK = 4
#: Two layers of each kind share a pool, three and one do not.
EVEN = (SLIDING, FULL, SLIDING, FULL)
UNEVEN = (SLIDING, SLIDING, SLIDING, FULL)
OPTIONS: dict[str, Any] = {
    "max_seq_len": 64,
    "kv_cache_config": {"tokens_per_block": BLOCK},
    "gemma3_cpu": {"kv_blocks": {8: 6, "global": 16}, "host_blocks": {8: 2, "global": 3}},
}


def new_store(layers: tuple[str, ...], rule: str = "trtllm_v2", **kv: Any) -> PageStore:
    config = Gemma3Config(layer_types=layers, num_key_value_heads=2, head_dim=3, sliding_window=8)
    options = {**OPTIONS, "kv_cache_config": {**OPTIONS["kv_cache_config"], **kv}}
    if kv:
        options["gemma3_cpu"] = {"kv_blocks": {"global": 16}, "host_blocks": {"global": 3}}
    plan = plan_cache(parse_options(options), model_shape(config))
    return PageStore(config, plan, shared_pools(plan, rule))


def page_of_numbers(store: PageStore, group: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(store.page_shape(group)).astype(np.float32)


def test_a_page_is_what_the_model_sees_of_it() -> None:
    store = new_store(UNEVEN)
    content = page_of_numbers(store, 0, 1)

    store.write_page(0, 5, content)

    assert (2, 3, 2, BLOCK, 3) == store.page_shape(0) == store.read_page(0, 5).shape
    np.testing.assert_array_equal(content[0], store.k[0][:, :, 5 * BLOCK : 6 * BLOCK])
    np.testing.assert_array_equal(content[1], store.v[0][:, :, 5 * BLOCK : 6 * BLOCK])
    assert not store.k[0][:, :, : 5 * BLOCK].any() and not store.k[1].any()


def test_what_was_read_does_not_change_with_the_page() -> None:
    store = new_store(UNEVEN)
    read = store.read_page(1, 0)

    store.write_page(1, 0, page_of_numbers(store, 1, 1))

    assert not read.any()


def test_a_page_goes_to_the_host_and_comes_back_elsewhere() -> None:
    store = new_store(UNEVEN)
    content = page_of_numbers(store, 0, 1)
    store.write_page(0, 1, content)

    store.move(0, Slot(DEVICE, 1), Slot(HOST, 1))
    store.write_page(0, 1, np.zeros_like(content))
    store.move(0, Slot(HOST, 1), Slot(DEVICE, 4))
    store.move(0, Slot(DEVICE, 4), Slot(DEVICE, 2))

    np.testing.assert_array_equal(content, store.read_page(0, 2))
    np.testing.assert_array_equal(content, store.read_page(0, 4))
    assert not store.read_page(0, 1).any()


@pytest.mark.parametrize(
    ("layers", "rule", "slots"),
    [(EVEN, "trtllm_v2", [22, 22]), (EVEN, "trtllm_v1", [6, 16]), (UNEVEN, "trtllm_v2", [6, 16])],
)
def test_groups_with_pages_of_one_size_share_them_under_manager_v2(
    layers: tuple[str, ...], rule: str, slots: list[int]
) -> None:
    store = new_store(layers, rule)

    assert slots == [k.shape[2] // BLOCK for k in store.k]
    assert (layers == EVEN and rule == "trtllm_v2") == np.shares_memory(store.k[0], store.k[1])


def test_a_cache_group_of_two_windows_has_the_layers_of_both_in_a_page() -> None:
    store = new_store(UNEVEN, max_attention_window=[64])
    content = page_of_numbers(store, 0, 1)

    store.write_page(0, 7, content)

    assert (2, 4, 2, BLOCK, 3) == store.page_shape(0)
    np.testing.assert_array_equal(content[0, :3], store.k[0][:, :, 7 * BLOCK : 8 * BLOCK])
    np.testing.assert_array_equal(content[1, 3:], store.v[1][:, :, 7 * BLOCK : 8 * BLOCK])


@pytest.mark.parametrize(("dim", "copies"), [(4, True), (256, False)])
def test_a_token_over_scattered_pages_copies_its_context_only_where_heads_are_narrow(
    dim: int, copies: bool
) -> None:
    config = Gemma3Config(layer_types=(FULL,), num_key_value_heads=2, num_attention_heads=4, head_dim=dim)
    kv, random = PagedKV(config, [[0]], [40], 32), np.random.default_rng(1)
    kv.k[0][:] = random.standard_normal(kv.k[0].shape)
    kv.v[0][:] = random.standard_normal(kv.v[0].shape)
    table = random.permutation(40).tolist()
    plan = plan_chunk(Chunk(np.zeros(1, int), 1270, [table]), 0, 0, None, kv)
    slots = np.concatenate([np.arange(32 * page, 32 * page + 32) for page in table])
    queries = random.standard_normal((1, 4, dim)).astype(np.float32) / dim
    one, other = np.empty_like(queries), np.empty_like(queries)

    attend(queries, plan, kv.k[0][0], kv.v[0][0], one, bounded=True)
    gathered = plan._replace(gather=slots[:1271])
    attend(queries, gathered, kv.k[0][0], kv.v[0][0], other, bounded=True)

    assert copies == (plan.gather is not None)
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
