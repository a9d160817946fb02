"""Measurements of launches: remembered, bounded, and the same after a round through a store."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pool_managerd.core.memory.measurements import Measurement, MeasurementKey, Measurements

KEY = MeasurementKey("b10068", "sha256:aa", 8192, 4)


def test_load_peak_and_spread_are_kept_per_gpu() -> None:
    seen = Measurements()
    assert seen.get(KEY) is None
    assert seen.observe(KEY, [100, 50], loaded=True) == Measurement((100, 50), (100, 50))
    assert seen.observe(KEY, [130, 40], loaded=False) == Measurement((100, 50), (130, 50))
    assert seen.observe(KEY, [90, 55], loaded=True) == Measurement((90, 55), (115, 55), 2, (10, 5))
    assert seen.get(KEY) == Measurement((90, 55), (115, 55), 2, (10, 5))


def test_launches_that_differ_in_anything_are_not_alike() -> None:
    seen = Measurements()
    seen.observe(KEY, [1], loaded=True)
    others = (replace(KEY, engine_version="b2"), replace(KEY, model_digest="x"), replace(KEY, ctx=1), replace(KEY, parallel=1))
    assert [seen.get(key) for key in others] == [None] * 4


def test_another_number_of_gpus_starts_anew() -> None:
    seen = Measurements()
    seen.observe(KEY, [100, 50], loaded=True)
    assert seen.observe(KEY, [120], loaded=False) == Measurement((120,), (120,))


def test_splits_that_differ_in_their_last_digits_are_the_same() -> None:
    seen = Measurements()
    seen.observe(MeasurementKey("v", "d", 1, 1, (1 / 3, 2 / 3)), [1, 2], loaded=True)
    assert seen.get(MeasurementKey("v", "d", 1, 1, (0.33333, 0.66667))) is not None
    assert seen.get(MeasurementKey("v", "d", 1, 1, (0.4, 0.6))) is None


def test_what_was_not_observed_for_longest_is_forgotten_first() -> None:
    seen = Measurements(limit=3)
    keys = [MeasurementKey("v", str(number), 1, 1) for number in range(4)]
    for key in keys[:3]:
        seen.observe(key, [1], loaded=True)
    seen.observe(keys[0], [1], loaded=False)
    seen.observe(keys[3], [1], loaded=True)
    assert [seen.get(key) is not None for key in keys] == [True, False, True, True]


@pytest.mark.parametrize("sizes", [[], [-1], [1] * 65])
def test_impossible_sizes_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot take note"):
        Measurements().observe(KEY, sizes, loaded=True)


def test_rows_survive_a_store_and_broken_ones_are_left_out() -> None:
    seen = Measurements()
    seen.observe(KEY, [100], loaded=True)
    seen.observe(KEY, [90], loaded=True)
    seen.observe(MeasurementKey("v", "d", 0, 1, (0.25, 0.75)), [7, 8], loaded=True)
    rows = json.loads(json.dumps(seen.to_rows()))
    again = Measurements.from_rows(rows)
    assert again.to_rows() == seen.to_rows()
    assert again.get(KEY) == seen.get(KEY)
    broken = [(), ("v",), [*rows[0][:5], "1,x", "1", "", 1], [*rows[0][:5], "1,2", "1", "", 1], [*rows[0][:5], "-1", "1", "", 1]]
    broken.append([*rows[0][:4], "nan", "1", "1", "", 1])
    assert len(Measurements.from_rows(broken)) == 0
    assert len(Measurements.from_rows(rows, limit=1)) == 1


def test_what_was_far_apart_once_fades_by_half_with_each_load() -> None:
    seen = Measurements()
    for size in (100, 200, 200, 200):
        seen.observe(KEY, [size], loaded=True)
    assert seen.get(KEY) == Measurement((200,), (200,), 4, (25,))


def test_a_gpu_that_holds_nothing_can_be_measured() -> None:
    assert Measurements().observe(KEY, [0] * 64, loaded=True).load_bytes == (0,) * 64


def test_of_stored_measurements_the_newest_are_kept() -> None:
    seen = Measurements()
    for number in range(3):
        seen.observe(MeasurementKey("v", str(number), 1, 1), [1], loaded=True)
    read = Measurements.from_rows(seen.to_rows(), limit=2)
    assert (len(read), read.limit) == (2, 2) and read.get(MeasurementKey("v", "0", 1, 1)) is None
