"""How far a download is, told while a pool is staged."""

from __future__ import annotations

import pytest

from pool_managerd.supervision.fetching import Pace, eta_s, told
from pool_managerd.testing.manual_clock import ManualClock


async def test_a_rate_counts_what_has_come_and_not_what_was_there() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    assert pace.seen(1_000_000) and pace.bytes_per_s == 0
    await clock.advance(0.1)
    assert not pace.seen(1_100_000), "too soon to be told"
    await clock.advance(0.9)
    assert pace.seen(2_000_000) and pace.bytes_per_s == pytest.approx(1_000_000, rel=0.01)
    await clock.advance(1)
    assert pace.seen(2_000_000) and pace.bytes_per_s == pytest.approx(700_000, rel=0.01), (
        "it slows down, and is not forgotten at once"
    )
    await clock.advance(1)
    assert pace.seen(0) and pace.bytes_per_s == pytest.approx(700_000, rel=0.01), "it began anew"


def test_how_far_it_is_in_words() -> None:
    assert told(1 << 30, 4 << 30, 1 << 20) == "1 GiB of 4 GiB, 1 MiB a second, 51.2 min left"
    assert told(1 << 20, 0, 0) == "1 MiB"


def test_a_time_that_cannot_be_told_is_none() -> None:
    assert eta_s(0, 0, 100) is None and eta_s(5, 10, 0) is None and eta_s(10, 10, 5) is None
    assert eta_s(5, 10, 5) == 1
