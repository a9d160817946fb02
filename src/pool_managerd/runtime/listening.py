"""The sockets that listen on a port, as the kernel lists them."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_TCP_LISTEN = 10
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSG = struct.Struct("=IHHII")
_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """One socket in this network namespace; ``uid`` is whose process made it."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    uid: int
    inode: int


def listening_sockets(port: int) -> list[ListeningSocket] | None:
    """All that listen on ``port``; None when the kernel does not tell."""
    try:
        return [found for family in _TABLES for found in _ask_kernel(family, port)]
    except OSError:
        return _read_tables(port)  # a sandbox without netlink


def _ask_kernel(family: int, port: int) -> Iterator[ListeningSocket]:
    """From sock_diag(7), which lists listeners alone.

    /proc/net/tcp has every connection that lingers, too: thousands on a busy machine, milliseconds per look.
    Raises OSError.
    """
    wanted = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN)
    head = struct.pack("=IHHII", _NLMSG.size + len(wanted), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as channel:
        channel.settimeout(1.0)
        channel.sendto(head + wanted, (0, 0))
        while True:
            data = channel.recv(65536)
            at = 0
            while at + _NLMSG.size <= len(data):
                length, kind = _NLMSG.unpack_from(data, at)[:2]
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", data, at + _NLMSG.size)[0], "sock_diag refused")
                message = at + _NLMSG.size
                if struct.unpack_from("!H", data, message + 4)[0] == port:
                    size = 4 if data[message] == socket.AF_INET else 16
                    uid, inode = struct.unpack_from("=II", data, message + 64)
                    yield ListeningSocket(_address(data[message + 8 : message + 8 + size]), uid, inode)
                at += (max(length, _NLMSG.size) + 3) & ~3


def _read_tables(port: int) -> list[ListeningSocket] | None:
    suffix = f":{port:04X}"
    found: list[ListeningSocket] | None = None
    for table in _TABLES.values():
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        found = found or []
        for line in lines:
            parts = line.split()
            if len(parts) > 9 and parts[1].endswith(suffix) and parts[3] == _LISTEN:
                words = bytes.fromhex(parts[1].partition(":")[0])
                raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append(ListeningSocket(_address(raw), int(parts[7]), int(parts[9])))
    return found


def _address(raw: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
