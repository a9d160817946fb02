"""What the kernel tells of the TCP sockets of a port: sock_diag(7), over netlink."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

ESTABLISHED, LISTEN = 1, 10
TCP_INFO = 2
"""The attribute that holds a connection's struct tcp_info."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSG = struct.Struct("=IHHII")
_LEAST = 72
_LIMIT_S = 1
_MOST_KEPT = 2


class _Channel:
    """To the kernel. To make one for every question costs more than the answer, so that a few are kept."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _LIMIT_S, 0))
        self.socket.connect((0, 0))

    def __del__(self) -> None:
        with suppress(AttributeError):
            self.socket.close()


_kept: list[_Channel] = []
"""Those that nobody asks over now; whoever asks takes one out."""


def sockets(family: int, port: int, state: int, attribute: int = 0) -> list[bytes]:
    """The messages (struct inet_diag_msg and the ``attribute`` asked for) of all sockets on local ``port`` in ``state``.

    /proc/net/tcp has every connection that lingers, too: thousands on a busy machine, milliseconds per look.
    Raises OSError.
    """
    asked = 1 << (attribute - 1) if attribute else 0
    wanted = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, asked, 1 << state) + struct.pack("!H46x", port)
    head = struct.pack("=IHHII", _NLMSG.size + len(wanted), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    try:
        channel = _kept.pop()
    except IndexError:
        channel = _Channel()
    channel.socket.send(head + wanted)
    found = list(_messages(channel.socket))
    if len(_kept) < _MOST_KEPT:  # only now: the rest of an answer that was broken off would be taken for the next one
        _kept.append(channel)
    return [message for message in found if len(message) >= _LEAST and struct.unpack_from("!H", message, 4)[0] == port]


def _messages(channel: socket.socket) -> Iterator[bytes]:
    while True:
        data = channel.recv(65536)
        at = 0
        while at + _NLMSG.size <= len(data):
            length, kind = _NLMSG.unpack_from(data, at)[:2]
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                raise OSError(-struct.unpack_from("=i", data, at + _NLMSG.size)[0], "sock_diag refused")
            yield data[at + _NLMSG.size : at + max(length, _NLMSG.size)]
            at += (max(length, _NLMSG.size) + 3) & ~3
