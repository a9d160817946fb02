"""Telling systemd how the daemon is: the sd_notify protocol over its datagram socket, without a library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping


class Notifier:
    """Sends states to ``NOTIFY_SOCKET``; does nothing where there is none. ``watchdog_s`` is how often systemd wants a sign."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._address = env.get("NOTIFY_SOCKET", "")
        self.watchdog_s = _watchdog_seconds(env) if self._address else None

    def send(self, *lines: str) -> None:
        """Never raises and never blocks: a service manager that does not listen must not stop the daemon."""
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)

    async def keep_alive(self) -> None:
        """Send the watchdog's sign at half its interval, from the loop, so that it tells whether the loop still turns."""
        while self.watchdog_s is not None:
            self.send("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 2)


def _watchdog_seconds(env: Mapping[str, str]) -> float | None:
    interval, pid = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", "")
    if not (interval.isascii() and interval.isdigit()) or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 1_000_000
