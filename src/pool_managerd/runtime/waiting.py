"""Waiting for a descriptor inside the event loop, without threads or polling."""

from __future__ import annotations

import asyncio
import select


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
