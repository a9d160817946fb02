"""Telling systemd how the daemon is: the sd_notify protocol over its datagram socket, without a library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping

_STATUS_S = 5.0
EXTEND_S = 10.0
"""A service that is slow has at least this long before systemd gives up on it, and asks for three times as much each time."""


class Notifier:
    """Sends states to ``NOTIFY_SOCKET``; does nothing where there is none. ``watchdog_s`` is how often systemd wants a sign."""

    def __init__(self, env: Mapping[str, str], extend_s: float = EXTEND_S) -> None:
        self._extend_s = extend_s
        self._status = ""
        address = env.get("NOTIFY_SOCKET", "")
        self._address = address if address.startswith(("/", "@")) else ""
        self.watchdog_s = _watchdog_seconds(env) if self._address else None

    def send(self, *lines: str) -> None:
        """Never raises and never blocks: a service manager that does not listen must not stop the daemon."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), address)

    def ready(self, status: str) -> None:
        """It serves."""
        self._status = status
        self.send("READY=1", f"STATUS={status}")

    async def keep_alive(self, status: Callable[[], str]) -> None:
        """Send the watchdog's sign at half its interval, from the loop, so that it tells whether the loop still turns.

        With it, and every few seconds without, the ``status`` that `systemctl status` shows, when it has changed.
        """
        while self._address:
            signs = [] if self.watchdog_s is None else ["WATCHDOG=1"]
            if (now := status()) != self._status:
                signs.append(f"STATUS={now}")
                self._status = now
            if signs:
                self.send(*signs)
            await asyncio.sleep(min(_STATUS_S, self.watchdog_s / 2) if self.watchdog_s is not None else _STATUS_S)

    async def extend_timeout(self) -> None:
        """Ask for more time to start or to stop, as long as the loop turns: how long engines take is theirs to say."""
        while self._address:
            await asyncio.sleep(self._extend_s)
            self.send(f"EXTEND_TIMEOUT_USEC={round(self._extend_s * 3 * 1_000_000)}")


def _watchdog_seconds(env: Mapping[str, str]) -> float | None:
    interval, pid = env.get("WATCHDOG_USEC", ""), env.get("WATCHDOG_PID", "")
    if not (interval.isascii() and interval.isdigit()) or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 1_000_000
