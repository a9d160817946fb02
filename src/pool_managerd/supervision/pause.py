"""Waiting by the clock that decides, which a test moves by hand."""

from __future__ import annotations

import asyncio

from pool_managerd.supervision.protocols import Clock


async def pause(clock: Clock, seconds: float, over: asyncio.Event | None = None) -> None:
    """For ``seconds``, or until ``over`` is set."""
    over = over or asyncio.Event()
    timer = clock.call_at(clock.monotonic() + seconds, over.set)
    try:
        await over.wait()
    finally:
        timer.cancel()
