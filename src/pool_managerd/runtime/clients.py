"""Who is connected to an engine, as the kernel knows it: the engine itself may have forgotten."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from pool_managerd.runtime import sock_diag

_ATTRIBUTES = 72
_ATTRIBUTE = struct.Struct("=HH")
_LAST_DATA_RECV = 52


def silent_clients(port: int) -> tuple[float, ...]:
    """For how many seconds each open connection to ``port`` has brought nothing new; empty where the kernel does not tell.

    One whose client waits for an answer is among them. Blocks for a moment.
    """
    try:
        return tuple(
            seconds
            for family in (socket.AF_INET, socket.AF_INET6)
            for message in sock_diag.sockets(family, port, sock_diag.ESTABLISHED, sock_diag.TCP_INFO)
            for seconds in _since_received(message)
        )
    except OSError:
        return ()


def _since_received(message: bytes) -> Iterator[float]:
    at = _ATTRIBUTES
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        place = at + _ATTRIBUTE.size + _LAST_DATA_RECV
        if kind == sock_diag.TCP_INFO and place + 4 <= len(message):
            yield struct.unpack_from("=I", message, place)[0] / 1000
            return
        at += (max(length, _ATTRIBUTE.size) + 3) & ~3
