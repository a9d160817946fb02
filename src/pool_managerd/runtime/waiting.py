"""Waiting inside the event loop: for a descriptor or a pidfd without threads, for blocking work in a thread of its own."""

from __future__ import annotations

import asyncio
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")


async def until_readable(fd: int) -> None:
    """Return once ``fd`` can be read; for a pidfd: once its process has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def until_writable(fd: int) -> None:
    """Return once ``fd`` can be written."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)


def send(pidfd: int, number: signal.Signals) -> None:
    """Signal the process behind ``pidfd``, unless it was collected already."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def has_ended(pidfd: int) -> bool:
    """True when the process behind ``pidfd`` has ended; never waits."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def ended_within(pidfd: int, seconds: float) -> bool:
    """True when the process behind ``pidfd`` ended in time."""
    try:
        async with asyncio.timeout(seconds):
            await until_readable(pidfd)
    except TimeoutError:
        return has_ended(pidfd)
    return True


_IDLE = 4
_counting = threading.Lock()
_idle: list[SimpleQueue[Callable[[], None]]] = []
"""Of each thread that has nothing to do, where its next work is put. To begin a thread costs the loop a wait for it."""


async def in_own_thread(work: Callable[..., _T], *given: Any) -> _T:
    """What ``work`` gives. The loop's own few threads may all be hashing models; this waits for none of them.

    Cancelled, the work goes on unheard. It does not keep the program from ending.
    """
    return await asyncio.wrap_future(_begin(work, given))


def _begin(work: Callable[..., _T], given: tuple[Any, ...]) -> Future[_T]:
    outcome: Future[_T] = Future()
    outcome.set_running_or_notify_cancel()  # who waits may be cancelled, the work cannot
    task = partial(_answer, outcome, work, given)
    try:
        _idle.pop().put(task)
    except IndexError:
        threading.Thread(target=_serve, args=(task,), daemon=True, name="own-thread").start()
    return outcome


def _serve(task: Callable[[], None]) -> None:
    """One work after the other, unless enough others wait for the next one."""
    tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
    while True:
        task()
        del task  # an outcome is not kept until the next work comes
        with _counting:
            if len(_idle) == _IDLE:
                return
            _idle.append(tasks)
        task = tasks.get()


def _answer(outcome: Future[_T], work: Callable[..., _T], given: tuple[Any, ...]) -> None:
    try:
        outcome.set_result(work(*given))
    except BaseException as error:  # noqa: BLE001 - the boundary of this work: whoever waits is told
        outcome.set_exception(error)
        del outcome  # an error that holds on to itself stays until the next collection, with all that its frames know
