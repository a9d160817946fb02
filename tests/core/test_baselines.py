"""Smoothed measurements, bounded, and as they go on under the next daemon."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pool_managerd.core.baselines import ALPHA, Baseline, Baselines

KEY = ("llamacpp-1", "m", "0")
WITH = "warm-up of 16 tokens"
BENCH = Baseline(90.0, 60.0, 3, "bench of 128 tokens, 3 runs", 2, {"slots": 4})


def test_the_first_counts_in_full_and_the_others_are_folded_in() -> None:
    known = Baselines()
    assert known.observe(KEY, 100.0, 10.0, WITH, 1) == Baseline(100.0, 10.0, 1, WITH, 1)
    second = known.observe(KEY, 200.0, 20.0, WITH, 2)
    assert second == Baseline(100 + ALPHA * 100, 10 + ALPHA * 10, 2, WITH, 2)


def test_what_was_measured_with_something_else_is_not_folded_in() -> None:
    known = Baselines()
    known.observe(KEY, 100.0, 10.0, WITH, 1)
    assert known.observe(KEY, 200.0, 20.0, "warm-up of 64 tokens", 2) == Baseline(200.0, 20.0, 1, "warm-up of 64 tokens", 2)


def test_a_bench_stands_beside_warm_ups_whichever_comes_first() -> None:
    known = Baselines()
    known.observe(KEY, 100.0, 10.0, WITH, 1)
    known.note_bench(KEY, BENCH)
    warm = known.observe(KEY, 100.0, 10.0, WITH, 3)
    known.relax(KEY, 900.0, 1.0)
    assert known.all_of(KEY) == (BENCH, replace(warm, first_token_ms=900.0, tokens_per_s=1.0))
    assert known.get(KEY) == known.all_of(KEY)[1] and [found.kind for found in known.all_of(KEY)] == ["bench", "warm-up"]
    known.note_bench(KEY, newer := replace(BENCH, tokens_per_s=70.0))
    assert known.all_of(KEY)[0] == newer, "the newest one counts"


@pytest.mark.parametrize(
    ("tokens", "prompt", "replaces"),
    [
        (128, 512, True),
        (126, 470, True),
        (2048, 4096, True),
        (2, 512, False),
        (128, 16, False),
        (2, 4096, False),
        (128, None, False),
    ],
)
def test_a_bench_with_shorter_requests_does_not_take_the_place_of_a_longer_one(
    tokens: int, prompt: int | None, replaces: bool
) -> None:
    known = Baselines()
    long = replace(BENCH, figures={"tokens": 128, "prompt_tokens": 512})
    new = replace(BENCH, tokens_per_s=999.0, samples=1, figures={"tokens": tokens, "prompt_tokens": prompt})
    assert known.note_bench(KEY, long) == long
    assert known.note_bench(KEY, new) == known.all_of(KEY)[0] == (new if replaces else long)


def test_the_one_longest_unused_goes_first() -> None:
    known = Baselines(limit=2)
    for name in "aba":
        known.observe((name, "", ""), 1.0, 1.0)
    known.observe(("c", "", ""), 1.0, 1.0)
    assert known.get(("b", "", "")) is None and known.get(("a", "", "")) is not None


def test_they_go_on_under_the_next_daemon_as_they_were() -> None:
    known = Baselines()
    known.observe(KEY, 100.0, 10.0)
    known.observe(("other", "", ""), 5.0, 6.0, WITH, 3)
    known.note_bench(KEY, BENCH)
    again = Baselines()
    again.restore(json.loads(json.dumps(known.to_rows())))
    assert again.to_rows() == known.to_rows() and again.all_of(KEY) == known.all_of(KEY)


def test_what_a_version_kept_that_did_not_say_with_what_it_measured_is_warm_ups() -> None:
    known = Baselines()
    known.restore([[*KEY, 100.0, 10, 3]])
    assert known.all_of(KEY) == (Baseline(100.0, 10.0, 3, "warm-up", None),)
    assert known.observe(KEY, 200.0, 10.0, WITH, 5) == Baseline(130.0, 10.0, 4, WITH, 5), "they go on"


@pytest.mark.parametrize(
    "row",
    [
        None,
        [],
        [*KEY],
        [*KEY, 1, 2],
        [*KEY, "1", 2, 3],
        [*KEY, -1, 2, 3],
        [1, 2, 3, 4, 5, 6],
        {"a": 1},
        [*KEY, 1, 2, 3, 4, 5],
        [*KEY, 1, 2, 3, WITH, "5"],
        [*KEY, 1, 2, 3, WITH, 5, None],
        [*KEY, 1, 2, 3, WITH, 5, 6],
    ],
)
def test_a_row_that_is_none_is_left_out(row: object) -> None:
    known = Baselines()
    known.restore([row])
    assert known.to_rows() == []
