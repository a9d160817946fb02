"""Smoothed measurements, bounded, and as they go on under the next daemon."""

from __future__ import annotations

import json

import pytest

from pool_managerd.core.baselines import ALPHA, Baseline, Baselines

KEY = ("llamacpp-1", "m", "0")


def test_the_first_counts_in_full_and_the_others_are_folded_in() -> None:
    known = Baselines()
    assert known.observe(KEY, 100.0, 10.0) == Baseline(100.0, 10.0, 1)
    second = known.observe(KEY, 200.0, 20.0)
    assert second == Baseline(100 + ALPHA * 100, 10 + ALPHA * 10, 2)


def test_the_one_longest_unused_goes_first() -> None:
    known = Baselines(limit=2)
    for name in "aba":
        known.observe((name, "", ""), 1.0, 1.0)
    known.observe(("c", "", ""), 1.0, 1.0)
    assert known.get(("b", "", "")) is None and known.get(("a", "", "")) is not None


def test_they_go_on_under_the_next_daemon_as_they_were() -> None:
    known = Baselines()
    known.observe(KEY, 100.0, 10.0)
    known.observe(("other", "", ""), 5.0, 6.0)
    again = Baselines()
    again.restore(json.loads(json.dumps(known.to_rows())))
    assert again.to_rows() == known.to_rows() and again.get(KEY) == known.get(KEY)


@pytest.mark.parametrize(
    "row", [None, [], [*KEY], [*KEY, 1, 2], [*KEY, "1", 2, 3], [*KEY, -1, 2, 3], [1, 2, 3, 4, 5, 6], {"a": 1}]
)
def test_a_row_that_is_none_is_left_out(row: object) -> None:
    known = Baselines()
    known.restore([row])
    assert known.to_rows() == []
