"""A loop that stands is told with its stack, once; a machine that was suspended is not a loop that stands."""

from __future__ import annotations

import asyncio
import threading
import time

from pool_managerd.daemon import loop_watch
from pool_managerd.daemon.loop_watch import LoopWatch


async def test_a_loop_that_stands_is_told_once_with_the_place_where_it_stands() -> None:
    told: list[tuple[float, str]] = []
    heard, go_on = threading.Event(), threading.Event()

    def tell(seconds: float, stack: str) -> None:
        told.append((seconds, stack))
        heard.set()

    def where_it_stands() -> None:
        assert heard.wait(10), "the watch said nothing"
        go_on.wait(0.3)  # long enough to be told twice, if it were

    watch = LoopWatch(tell, beat_s=0.02, standstill_s=0.2)
    watch.start()
    where_it_stands()
    await asyncio.sleep(0.05)
    watch.stop()
    ((seconds, stack),) = told
    assert seconds >= 0.2 and "where_it_stands" in stack
    assert watch.lag_seconds() >= 0.2


async def test_a_loop_that_turns_says_how_late_it_was_and_nothing_else() -> None:
    told: list[float] = []
    watch = LoopWatch(lambda seconds, stack: told.append(seconds), beat_s=0.01, standstill_s=5)
    watch.start()
    async with asyncio.timeout(10):
        while len(watch._lags) < 5:
            await asyncio.sleep(0.01)
    watch.stop()
    assert 0 <= watch.lag_seconds() < 5 and not told


def test_the_stack_is_bounded() -> None:
    assert loop_watch.MAX_STACK_CHARS <= 16_000 and time.monotonic() > 0
