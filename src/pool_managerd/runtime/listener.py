"""Who holds a listening TCP port: the proof that a health answer came from our own engine."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"
_TCP_LISTEN = 10
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSG = struct.Struct("=IHHII")


def owns_port(pid: int, port: int) -> bool | None:
    """True when ``pid``, its session or a descendant holds the listening ``port``; False when another process does.

    None when it cannot be seen (no such listener in this network namespace, or its holder's descriptors are not
    readable). The look costs one pass over /proc and is made once per launch.
    """
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    if _holds(pid, inodes):
        return True
    family = _family(pid)
    if any(_holds(member, inodes) for member in family):
        return True
    others = (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in family)
    return False if any(_holds(other, inodes) for other in others) else None


def _listening_inodes(port: int) -> set[str]:
    try:
        inodes = {inode for family in (socket.AF_INET, socket.AF_INET6) for inode in _ask_kernel(family, port)}
    except OSError:
        return _read_tables(port)  # a sandbox without netlink
    return {f"socket:[{inode}]" for inode in inodes}


def _ask_kernel(family: int, port: int) -> Iterator[int]:
    """Inodes of the sockets that listen on ``port``, from sock_diag(7), which lists listeners alone.

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
                    yield struct.unpack_from("=I", data, message + 68)[0]
                at += (max(length, _NLMSG.size) + 3) & ~3


def _read_tables(port: int) -> set[str]:
    suffix = f":{port:04X}"
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            parts = line.split()
            if len(parts) > 9 and parts[1].endswith(suffix) and parts[3] == _LISTEN:
                found.add(f"socket:[{parts[9]}]")
    return found


def _family(pid: int) -> set[int]:
    """The engine, everything in its session, and every descendant."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(name)], sessions[int(name)] = int(fields[1]), int(fields[3])
    family = {member for member, session in sessions.items() if session == pid} | {pid}
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        family |= more
        grown = bool(more)
    return family


def _holds(pid: int, inodes: set[str]) -> bool:
    try:
        return any(_link(f"/proc/{pid}/fd/{fd}") in inodes for fd in os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return False


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
