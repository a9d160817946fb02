"""Work in a thread of its own."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from pool_managerd.runtime.waiting import in_own_thread
from tests.runtime.support import eventually


async def test_blocking_work_of_others_holds_nothing_up() -> None:
    stuck = threading.Event()
    hashing = [asyncio.get_running_loop().run_in_executor(None, stuck.wait) for _ in range(100)]
    try:
        async with asyncio.timeout(5):
            assert await in_own_thread(lambda word: word.upper(), "done") == "DONE"
    finally:
        stuck.set()
        await asyncio.gather(*hashing)


async def test_what_goes_wrong_in_it_is_raised_where_it_is_waited_for() -> None:
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await in_own_thread(broken)


async def test_an_error_holds_on_to_nothing_once_it_was_told() -> None:
    class Order:
        """Something large."""

    def broken(order: Order) -> None:
        raise ValueError("no")

    order = Order()
    seen = weakref.ref(order)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            await in_own_thread(broken, order)
        del order
        await eventually(lambda: seen() is None)
    finally:
        gc.enable()


async def test_threads_are_used_again_and_few_are_kept() -> None:
    before = set(threading.enumerate())
    go = threading.Event()
    many = [asyncio.create_task(in_own_thread(go.wait)) for _ in range(20)]
    await eventually(lambda: len(set(threading.enumerate()) - before) >= 20 - 4)
    go.set()
    await asyncio.gather(*many)
    await eventually(lambda: len(set(threading.enumerate()) - before) <= 4)
    kept = set(threading.enumerate())
    assert await in_own_thread(threading.current_thread) in kept


async def test_nobody_hears_of_work_that_was_given_up() -> None:
    go = threading.Event()
    waiting = asyncio.create_task(in_own_thread(go.wait))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
