"""The engine's process from its fork to its exec: forked before there is an order, so that no restart waits for it.

A fork costs milliseconds, and what is touched after it costs more: each page is copied first. Until the order comes, the child
has done what every engine needs done (``confine.execute``) and waits. Stdlib only: both sides run in a shim.
"""

from __future__ import annotations

import os
import select
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pool_managerd.runtime import confine, procfs, wire

_NAME = "pm-engine"
_GO = b"1"


class Child:
    """The shim's side. ``pid`` is not collected here, but by ``end``: until then it is the child's alone.

    ``output`` is what the engine will write to, as the shim reads it.
    """

    def __init__(self, pid: int, order: socket.socket, output: int, status: int) -> None:
        self.pid, self.output = pid, output
        self.pidfd = os.pidfd_open(pid)
        self.start_ticks = procfs.start_ticks(pid) or 0
        self._order, self._status = order, status

    @classmethod
    def fork(cls) -> Child:
        """Raises OSError."""
        order, order_of_child = socket.socketpair()
        output, output_of_child = os.pipe2(os.O_CLOEXEC)
        status, status_of_child = os.pipe2(os.O_CLOEXEC)
        shim_pid, pid = os.getpid(), os.fork()
        if pid == 0:
            confine.set_name(_NAME)
            confine.execute(_Orders(order_of_child), output=output_of_child, status=status_of_child, shim_pid=shim_pid)
        order_of_child.close()
        os.close(output_of_child)
        os.close(status_of_child)
        os.set_blocking(output, False)
        return cls(pid, order, output, status)

    def has_ended(self) -> bool:
        """Whether somebody killed it while it waited."""
        return os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def prepare(self, frame: bytes) -> None:
        """Let it take up the order ``frame``, beside what the shim has to do before there may be an engine."""
        with suppress(OSError):  # it was killed: its status tells
            self._order.sendall(frame)

    def go(self) -> None:
        """Let it execute as soon as it can."""
        with suppress(OSError):
            self._order.send(_GO)

    def failed_at(self, seconds: float) -> str | None:
        """``step:errno`` of what kept it from executing, empty once it did; None when neither is known in time."""
        readable = select.select([self._status], [], [], seconds)[0]
        report = os.read(self._status, 256).decode("ascii", "replace") if readable else None
        os.close(self._status)
        self._order.close()
        return report

    def end(self) -> None:
        """Kill and collect it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


class _Orders:
    """The child's side. It ends when the shim gave it up, or is gone."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.descriptors: Sequence[int] = (channel.fileno(),)

    def take(self) -> dict[str, Any]:
        frame = wire.receive(self._channel, None)
        if frame is None:
            os._exit(0)
        return wire.decode(frame)

    def await_leave(self) -> None:
        if self._channel.recv(1) != _GO:
            os._exit(0)
