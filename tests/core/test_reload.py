from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baseline, Baselines
from pool_managerd.core.reload import UNNOTICED_MS, Forecast, ReloadRequest, Strategy, slower, steps, unexpected
from pool_managerd.errors import SpecError

BEFORE = Baseline(100.0, 50.0)
ENGINE = PreparedEngine("p", "/engine")


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "asks for nothing"),
        ({"drain_deadline_ms": 5}, "asks for nothing"),
        ({"engine": ENGINE, "changes": {}}, "runs as it is"),
        ({"engine": ENGINE, "new_model_ref": "file:m"}, "runs as it is"),
        ({"changes": {}, "drain_deadline_ms": -1}, "drain_deadline_ms is -1"),
        ({"changes": {}, "drain_deadline_ms": 86_400_001}, "drain_deadline_ms is 86400001"),
        ({"changes": {}, "strategy": "sleep"}, "no strategy 'sleep'"),
    ],
)
def test_what_asks_for_nothing_or_for_what_cannot_be_is_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError, match=why) as refused:
        ReloadRequest("p", **asked)
    assert refused.value.hint and refused.value.pool_id == "p"


def test_a_new_model_is_one_of_the_changes() -> None:
    asked = ReloadRequest("p", "file:n.gguf", {"ctx": 1, "model": "file:o.gguf"})
    assert asked.all_changes() == {"ctx": 1, "model": "file:n.gguf"}


@pytest.mark.parametrize(
    ("first_ms", "rate", "wrong"),
    [
        (100.0, 50.0, None),
        (100.0, 35.0, None),
        (100.0, 34.9, "it makes 34.9 tokens/s where 50.0 were measured before"),
        ((100 + UNNOTICED_MS) / 0.7, 50.0, None),
        ((100 + UNNOTICED_MS) / 0.7 + 1, 50.0, "its first token takes 215 ms where 100 were measured before"),
    ],
)
def test_a_new_engine_may_be_slower_by_a_share(first_ms: float, rate: float, wrong: str | None) -> None:
    assert slower(BEFORE, first_ms, rate, 0.7) == wrong
    assert slower(None, first_ms, rate, 0.7) is None and slower(BEFORE, first_ms, rate, 0.0) is None


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1))
def test_as_fast_as_before_is_never_too_slow(first_ms: float, rate: float, share: float) -> None:
    assert slower(Baseline(first_ms, rate), first_ms, rate, share) is None


def test_an_answer_must_be_there_and_have_what_is_expected_of_it() -> None:
    assert unexpected("The capital is PARIS.", "paris") is None and unexpected("anything", None) is None
    assert unexpected(" \n", None) == "its answer to the smoke prompt is empty"
    assert unexpected(" a\x1b[31m b ", "4") == r"its answer to the smoke prompt lacks '4': 'a\x1b[31m b'"


def test_a_forecast_is_what_was_measured_and_how_much_that_varied() -> None:
    assert Forecast.of([10, 20, 60], [1000]) == Forecast(1020, 25)
    assert Forecast.of([10], []) == Forecast(None, None) == Forecast.of([])


def test_a_pool_that_does_not_serve_is_not_drained() -> None:
    def of(*, serves: bool) -> tuple[str, ...]:
        return steps("p", Strategy.STOP_START, "file:m", 30_000, 5_000, serves=serves)

    assert len(of(serves=True)) == len(of(serves=False)) + 2


def test_where_both_run_the_old_engine_drains_last() -> None:
    told = steps("p", Strategy.BLUE_GREEN, "file:m", 30_000, 5_000, serves=True)
    assert "beside the old one" in told[1] and "wait up to 30 s" in told[-1]


def test_a_copy_of_the_baselines_stays_as_it_was() -> None:
    measured = Baselines()
    measured.observe(("1", "m", ""), 10, 20)
    copy = measured.copy()
    measured.observe(("1", "m", ""), 90, 90)
    measured.observe(("2", "m", ""), 1, 1)
    assert copy.get(("1", "m", "")) == Baseline(10, 20) and copy.get(("2", "m", "")) is None
