"""Rates from differences of counters: over resets, pools that come and go, and gateways that are away."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.cli.top_rates import Counters, Rate, Window, in_flight, read
from pool_managerd.telemetry.gateway_metrics import GatewayMetrics


def test_the_gateways_own_page_is_read() -> None:
    metrics = GatewayMetrics({"node_id": 'a "b}\\ c'})
    counted = metrics.of_pool("llamacpp", "chat")
    counted.started.inc()
    counted.started.inc()
    counted.first.observe(120.5)
    counted.tokens_out.inc(34)
    metrics.answered("chat", "/v1/chat/completions", 200)
    metrics.answered("none", "/v1/chat/completions", 404)
    found = read(metrics.render().decode())
    assert found == {"chat": Counters(2, 1, 34, 120.5, 1), "none": Counters(answered=1)}
    assert in_flight(found) == 1, "who got no pool has not begun"


def test_engines_paths_and_statuses_of_a_pool_are_put_together() -> None:
    page = "\n".join(
        f'gateway_requests_total{{pool_id="a",path="{path}",status="{status}"}} 2.0' for path in "xy" for status in (200, 503)
    )
    assert read(page) == {"a": Counters(answered=8)}


@pytest.mark.parametrize(
    "line",
    ["", "# HELP x", "tokens_out_total", 'tokens_out_total{pool_id="a"} x', 'tokens_out_total{pool_id="a"} NaN',
     'tokens_out_total{pool_id="a"} -1', 'tokens_out_total{engine="a"} 1', 'other_total{pool_id="a"} 1', "<html>{} 1"],
)  # fmt: skip
def test_what_is_not_understood_is_left_out(line: str) -> None:
    assert read(line) == {}


@given(st.text())
def test_no_page_is_an_error(text: str) -> None:
    read(text)


def test_there_is_no_rate_before_the_second_sample() -> None:
    window = Window()
    assert window.rates() == {}
    window.add(5, {"a": Counters(1, 1, 100, 10, 1)})
    assert window.rates() == {}
    window.add(5, {"a": Counters(1, 1, 100, 10, 1)})
    assert window.rates() == {}, "no time has passed"
    window.add(7, {"a": Counters(3, 3, 200, 70, 3)})
    assert window.rates() == {"a": Rate(1, 50, 30)}


def test_a_pool_that_appears_began_at_nothing_and_one_that_vanished_has_no_rate() -> None:
    window = Window()
    window.add(0, {"old": Counters(answered=5)})
    window.add(2, {"new": Counters(answered=4)})
    assert window.rates() == {"new": Rate(2, 0, None)}


def test_a_gateway_that_began_again_counts_from_nothing() -> None:
    window = Window()
    window.add(0, {"a": Counters(100, 100, 5000, 900, 100)})
    window.add(1, {"a": Counters(101, 101, 5010, 910, 101)})
    window.add(2, {"a": Counters(1, 1, 30, 1000, 1)})
    assert window.rates() == {"a": Rate(1, 20, 505)}, "its sum of times grew, and began again all the same"


def test_only_the_last_seconds_count_whatever_the_interval() -> None:
    often, seldom = Window(10), Window(10)
    for second in range(100):
        often.add(second, {"a": Counters(answered=second * second)})
    assert often.rates()["a"].requests_per_s == (99**2 - 89**2) / 10
    for minute in range(3):
        seldom.add(60 * minute, {"a": Counters(answered=60 * minute * minute)})
    assert seldom.rates()["a"].requests_per_s == 3, "longer than the window: over the last two"


@given(st.lists(st.tuples(st.floats(0.2, 30), st.integers(0, 50), st.booleans()), min_size=1, max_size=30))
def test_no_rate_is_negative_or_more_than_what_came(steps: list[tuple[float, int, bool]]) -> None:
    window, at, total, most = Window(), 0.0, 0, 0.0
    window.add(at, {"a": Counters()})
    for wait_s, came, again in steps:
        at, total, most = at + wait_s, came if again else total + came, max(most, came / wait_s)
        window.add(at, {"a": Counters(answered=total)})
        assert 0 <= window.rates()["a"].requests_per_s <= most + 1e-9


def test_a_request_that_moved_to_another_pool_is_in_flight_once() -> None:
    assert in_flight({"a": Counters(started=3, answered=1), "b": Counters(started=0, answered=1)}) == 1
    assert in_flight({"b": Counters(started=0, answered=1)}) == 0, "of a pool whose series were dropped meanwhile"
