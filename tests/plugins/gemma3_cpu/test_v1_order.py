"""The order in which the engine's table of child blocks is gone through.

The expected orders follow from how libstdc++ links the entries of a ``std::unordered_map``. The traces show
that they are right, see ``test_v1_traces.py``.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from vswa_plugins.gemma3_cpu.cache.hashing import block_key
from vswa_plugins.gemma3_cpu.cache.v1.order import TableOrder

Key = tuple[int, ...]


def keys_in_bucket(bucket: int, count: int, buckets: int = 13) -> list[Key]:
    found = ((n,) for n in range(10_000) if block_key((n,), None) % buckets == bucket)
    return [next(found) for _ in range(count)]


def order_of(keys: list[Key]) -> list[Key]:
    order = TableOrder()
    for key in keys:
        order.add(key)
    return list(order)


def test_a_bucket_that_was_empty_comes_first_and_a_key_comes_first_in_its_bucket() -> None:
    [a, b], [c] = keys_in_bucket(3, 2), keys_in_bucket(7, 1)

    assert [c, b, a] == order_of([a, c, b])
    assert [b, a, c] == order_of([c, a, b])


def test_a_bucket_that_became_empty_comes_first_when_it_is_used_again() -> None:
    [a], [b] = keys_in_bucket(3, 1), keys_in_bucket(7, 1)
    order = TableOrder()
    for key in (a, b):
        order.add(key)
    order.remove(a)
    assert [b] == list(order)
    order.add(a)

    assert [a, b] == list(order)


def test_a_table_that_is_full_is_turned_over() -> None:
    apart = [keys_in_bucket(bucket, 1, buckets=29)[0] for bucket in range(14)]
    small = apart[:13]

    before = order_of(small)
    assert [apart[13], *reversed(before)] == order_of(apart)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=150))
def test_what_is_in_it_is_what_was_put_in_and_not_taken_out(steps: list[tuple[bool, int]]) -> None:
    order, held = TableOrder(), set[Key]()
    for add, number in steps:
        key = (number,)
        if add and key not in held:
            order.add(key)
            held.add(key)
        elif not add and key in held:
            order.remove(key)
            held.remove(key)
        assert held == set(order)
        assert len(held) == len(list(order))
