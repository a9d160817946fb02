"""Which user is at the other end of a loopback connection, as the kernel says.

The kernel is asked for the other socket by its addresses (sock_diag, 10 µs); where that is not allowed, /proc/net/tcp
is read. A socket that was closed is listed with uid 0, and its port may be another program's by now. So an answer is
believed only while both ends are connected: then the addresses name exactly one pair of sockets.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

LOCAL_TOKEN = "control.token"  # noqa: S105 - a file name, in the state directory
_SOCK_DIAG_BY_FAMILY, _SOCK_DIAG, _REQUEST, _ERROR = 20, 4, 1, 2
_HEADER, _QUERY, _COOKIE = struct.Struct("=IHHII"), struct.Struct("=BBBBI"), struct.Struct("=III")
_UID_AT = _HEADER.size + 4 + 48 + 12  # behind state and timers, the addresses, and three figures
_ESTABLISHED = 1
_MAX_TABLE_BYTES = 16 << 20

Address = tuple[str, int]


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """True for ``localhost``, 127.0.0.0/8 and ::1, also in its IPv4-mapped form (SEC-AUTH-2004)."""
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def uid_of_peer(connection: Any) -> int | None:
    """The user who made the other socket of a TCP ``connection`` (or transport's socket) on loopback; None: not known."""
    with suppress(OSError, ValueError, struct.error):
        mine, other = connection.getsockname()[:2], connection.getpeername()[:2]
        found = _uid_of(connection.family, other, mine)
        # Asked after the other end: as ours is connected still, it was connected to that very socket.
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED:
            return found
    return None


def can_tell(connection: Any) -> bool:
    """Whether users can be found out here at all: the kernel at least knows our own end of ``connection``."""
    with suppress(OSError, ValueError, struct.error):
        return _uid_of(connection.family, connection.getsockname()[:2], connection.getpeername()[:2]) is not None
    return False


def _uid_of(family: int, source: Address, target: Address) -> int | None:
    try:
        return _ask(family, source, target)
    except OSError:
        return _read(family, source, target)


def _ask(family: int, source: Address, target: Address) -> int | None:
    """The owner of the connected socket from ``source`` to ``target``. Raises OSError when the kernel may not be asked."""
    addresses = b"".join(socket.inet_pton(family, host.partition("%")[0]).ljust(16, b"\0") for host, _ in (source, target))
    body = _QUERY.pack(family, socket.IPPROTO_TCP, 0, 0, 1 << _ESTABLISHED)
    body += struct.pack("!HH", source[1], target[1]) + addresses + _COOKIE.pack(0, 0xFFFFFFFF, 0xFFFFFFFF)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _SOCK_DIAG) as kernel:
        kernel.settimeout(0.2)
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST, 1, 0) + body)
        answer = kernel.recv(4096)
    if _HEADER.unpack_from(answer)[1] == _ERROR:
        code = -struct.unpack_from("=i", answer, _HEADER.size)[0]
        if code == 2:  # ENOENT: there is no such socket (any more)
            return None
        raise OSError(code, "the kernel does not tell")
    state = answer[_HEADER.size + 1]
    uid, inode = struct.unpack_from("=II", answer, _UID_AT)
    return int(uid) if state == _ESTABLISHED and inode else None


def _read(family: int, source: Address, target: Address) -> int | None:
    """The same from the kernel's table of connections. Raises OSError when there is none."""
    wanted = {(_hex(family, source), _hex(family, target))}
    tables = ["/proc/net/tcp6"]
    if family == socket.AF_INET:  # an IPv6 socket may call an IPv4 one: it is listed with a mapped address
        tables.append("/proc/net/tcp")
        mapped = ("::ffff:" + source[0], source[1]), ("::ffff:" + target[0], target[1])
        wanted.add((_hex(socket.AF_INET6, mapped[0]), _hex(socket.AF_INET6, mapped[1])))
    for fields in _rows(tables):
        if (fields[1], fields[2]) in wanted and int(fields[3], 16) == _ESTABLISHED and fields[9] != "0":
            return int(fields[7])
    return None


def _rows(tables: list[str]) -> Iterator[list[str]]:
    for table in tables:
        with suppress(FileNotFoundError), Path(table).open() as file:
            for line in file.read(_MAX_TABLE_BYTES).splitlines()[1:]:
                fields = line.split(None, 10)
                if len(fields) > 9:
                    yield fields


def _hex(family: int, address: Address) -> str:
    """As the table writes it: each four bytes as a number of this machine."""
    packed = socket.inet_pton(family, address[0].partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{address[1]:04X}"
