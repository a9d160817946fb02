"""What systemd is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from pool_managerd.telemetry.sd_notify import Notifier


async def test_states_and_watchdog_signs_arrive_on_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())})
        notifier.send("READY=1", "STATUS=fine")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            assert await loop.sock_recv(receiver, 1000) == b"READY=1\nSTATUS=fine"
            task = asyncio.create_task(notifier.keep_alive(lambda: ""))
            for _ in range(3):
                assert await loop.sock_recv(receiver, 1000) == b"WATCHDOG=1"
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_the_status_is_sent_when_it_has_changed_and_more_time_is_asked_for(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000"}, extend_s=0.05)
        loop, said = asyncio.get_running_loop(), ["1 of 2 pools ready"]
        tasks = [asyncio.create_task(notifier.keep_alive(lambda: said[0]))]
        async with asyncio.timeout(5):
            assert await loop.sock_recv(receiver, 1000) == b"WATCHDOG=1\nSTATUS=1 of 2 pools ready"
            assert await loop.sock_recv(receiver, 1000) == b"WATCHDOG=1"
            said[0] = "2 of 2 pools ready"
            while (got := await loop.sock_recv(receiver, 1000)) == b"WATCHDOG=1":
                pass
            assert got == b"WATCHDOG=1\nSTATUS=2 of 2 pools ready"
            tasks.append(asyncio.create_task(notifier.extend_timeout()))
            while not (got := await loop.sock_recv(receiver, 1000)).startswith(b"EXTEND"):
                pass
            assert got == b"EXTEND_TIMEOUT_USEC=150000"
        for task in tasks:
            task.cancel()


async def test_without_a_socket_or_for_another_process_nothing_is_sent_and_nothing_waits(tmp_path: Path) -> None:
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).send("READY=1")
    for env in ({}, {"NOTIFY_SOCKET": "relative"}):
        notifier = Notifier(env)
        notifier.send("READY=1")
        async with asyncio.timeout(1):
            await notifier.keep_alive(lambda: "")
            await notifier.extend_timeout()
    assert Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}).watchdog_s is None
    assert Notifier({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "x"}).watchdog_s is None
