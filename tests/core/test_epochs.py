"""Epochs only grow, whatever is reserved, forgotten and lost in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.epochs import BLOCK, EpochLimits


def test_most_launches_need_nothing_new() -> None:
    known = EpochLimits()
    assert (known.first("p"), known.wanted("p", 1)) == (0, BLOCK)
    known = known.reserved("p", BLOCK)
    assert [known.wanted("p", epoch) for epoch in (1, BLOCK, BLOCK + 1)] == [None, None, 2 * BLOCK]
    assert known.reserved("p", 1) == known


def test_a_forgotten_pool_leaves_the_floor_that_it_begins_at_when_it_is_made_again() -> None:
    known = EpochLimits({"p": 300, "q": 100}, 200)
    assert known.forgotten("q") == EpochLimits({"p": 300}, 200)
    assert known.forgotten("p") == EpochLimits({"q": 100}, 300)
    assert known.forgotten("p").first("p") == known.forgotten("p").first("new") == 300


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["launch", "restart", "forget"])), max_size=60))
def test_no_epoch_of_a_pool_is_used_twice(steps: list[tuple[str, str]]) -> None:
    known, records, used = EpochLimits(), dict[str, int](), dict[str, int]()
    for pool, step in steps:
        if step == "restart":
            records.clear()
        elif step == "forget":
            known = known.forgotten(pool)
            records.pop(pool, None)
        else:
            epoch = records.get(pool, known.first(pool)) + 1
            if (limit := known.wanted(pool, epoch)) is not None:
                known = known.reserved(pool, limit)
            assert epoch > used.get(pool, 0)
            records[pool] = used[pool] = epoch
