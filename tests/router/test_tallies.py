from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from vswa_plugin.router.tallies import OTHER, Buckets, Names


@examples(200)
@given(st.lists(st.floats(-10, 10)))
def test_a_histogram_counts_each_value_up_to_each_bound(values: list[float]) -> None:
    bounds = (-1, 0, 2.5)
    buckets = Buckets(bounds)
    for value in values:
        buckets.observe(value)

    expected = [(str(bound), sum(value <= bound for value in values)) for bound in bounds]
    assert [*expected, ("+Inf", len(values))] == buckets.cumulative()
    assert (len(values), sum(values)) == (buckets.count, buckets.sum)


def test_the_first_names_keep_their_labels_and_all_later_ones_share_one() -> None:
    names = Names(2)

    assert ["a", "b", OTHER, "a", OTHER, "b"] == [names.label(each) for each in "abcadb"]
