"""Who holds the socket that an engine's address leads to: the proof that a health answer came from our own engine."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.core.listeners import NOBODY, OURS, UNKNOWN, Listener
from pool_managerd.runtime import procfs, sock_diag
from pool_managerd.runtime.identity import is_shim
from pool_managerd.runtime.isolation import user_name
from pool_managerd.runtime.waiting import in_own_thread

_MAX_KNOWN, _MAX_SHOWN = 4096, 4
_LISTEN = "0A"
_TABLES = {socket.AF_INET: "/proc/net/tcp", socket.AF_INET6: "/proc/net/tcp6"}


class Listeners:
    """Asked at every probe. While the sockets stay the same it costs one question to the kernel."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    async def __call__(self, pid: int, host: str, port: int) -> Listener:
        """Whether the engine ``pid`` or what descends from it holds what listens on ``host`` and ``port``."""
        known = self._at_once(pid, host, port)
        return await in_own_thread(self.find, pid, host, port) if known is None else known

    async def elsewhere(self, pid: int) -> list[str]:
        """The addresses that the engine ``pid`` and what descends from it listen on, as ``host:port``; at most a few."""
        return await in_own_thread(_addresses_of, pid)

    def _at_once(self, pid: int, host: str, port: int) -> Listener | None:
        """By one quick question: nobody listens there, or those do that are known; None when that does not settle it."""
        known = self._known.get((pid, procfs.start_ticks(pid) or 0))
        try:
            sockets = [found for family in _TABLES for found in _ask_kernel(family, port)]
        except OSError:
            return None
        reached = frozenset(found.inode for address in _addresses(host) for found in _reached(address, sockets))
        return NOBODY if not reached else OURS if reached == known else None

    def find(self, pid: int, host: str, port: int) -> Listener:
        """As calling it. Blocks for up to a second."""
        found = self._look(pid, host, port)
        # Between two looks at /proc a process may have handed its socket to a child: what is held against it is seen twice.
        return self._look(pid, host, port) if found.owner == "other" else found

    def _look(self, pid: int, host: str, port: int) -> Listener:
        sockets = listening_sockets(port)
        if sockets is None:
            return UNKNOWN
        reached = [found for address in _addresses(host) for found in _reached(address, sockets)]
        if not reached:
            return NOBODY
        inodes = frozenset(listening.inode for listening in reached)
        key = (pid, procfs.start_ticks(pid) or 0)
        if self._known.get(key) == inodes:
            return OURS
        found = _owner(pid, reached)
        if found is OURS:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = inodes
        return found


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    if host == "localhost":
        return [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    address = ipaddress.ip_address(host)
    if not address.is_unspecified:
        return [address]
    return [ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")]


def _reached(address: ipaddress.IPv4Address | ipaddress.IPv6Address, sockets: Iterable[ListeningSocket]) -> list[ListeningSocket]:
    """The sockets of the most specific address that takes the connection; several when they share the port."""
    any4, any6 = ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::")  # noqa: S104 - nothing is bound here
    for wanted in (address, any4, any6) if address.version == 4 else (address, any6):
        if found := [listening for listening in sockets if listening.address == wanted]:
            return found
    return []


def _owner(pid: int, reached: Iterable[ListeningSocket]) -> Listener:
    uids = procfs.uids(pid)
    wanted = {f"socket:[{listening.inode}]": listening for listening in reached}
    for link, listening in wanted.items():
        if uids and listening.uid not in uids:  # an engine cannot have made it
            return Listener("other", _who(_holder(link, ()), listening))
    missing, unreadable = set(wanted), False
    family = (pid, *_family(pid))
    for member in family:
        held = _descriptors(member)
        unreadable = unreadable or held is None
        missing -= held or set()
        if not missing:
            return OURS
    link = min(missing)
    holder = _holder(link, family)
    if holder is None and unreadable:  # in the moment of an exec or an end, too
        return UNKNOWN
    return Listener("other", _who(holder, wanted[link]))


def _holder(link: str, family: Collection[int]) -> int | None:
    """The pid of a process that holds it, as far as that can be seen."""
    return next((pid for pid in procfs.pids() if pid not in family and link in (_descriptors(pid) or ())), None)


def _who(holder: int | None, listening: ListeningSocket) -> str:
    if holder is None:
        return f"a process of user {user_name(listening.uid)}"
    return f"pid {holder} ({procfs.name(holder) or 'gone'})"


def _family(pid: int) -> list[int]:
    """What descends from the engine; below its shim, so that what left its parent and its session counts, too."""
    seen = procfs.stat(pid)
    if seen is None:
        return []
    return list(procfs.descendants(seen.parent_pid if is_shim(seen.parent_pid) else pid))


def _descriptors(pid: int) -> set[str] | None:
    """What its descriptors are; None when that is not shown, empty when it is gone."""
    try:
        return {_link(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except PermissionError:
        seen = procfs.stat(pid)
        return set() if seen is None or seen.state in "ZX" else None
    except OSError:
        return set()


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


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
    """Raises OSError."""
    for message in sock_diag.sockets(family, port, sock_diag.LISTEN):
        size = 4 if message[0] == socket.AF_INET else 16
        uid, inode = struct.unpack_from("=II", message, 64)
        yield ListeningSocket(_address(message[8 : 8 + size]), uid, inode)


def _read_tables(port: int) -> list[ListeningSocket] | None:
    lines = _table_lines()
    return None if lines is None else [found for at, found in lines if at == port]


def _table_lines() -> list[tuple[int, ListeningSocket]] | None:
    """All listening sockets and their ports, as the kernel lists them for people; None when it does not."""
    found: list[tuple[int, ListeningSocket]] | None = None
    for table in _TABLES.values():
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        found = found or []
        for line in lines:
            parts = line.split()
            if len(parts) > 9 and parts[3] == _LISTEN:
                host, _, port = parts[1].partition(":")
                words = bytes.fromhex(host)
                raw = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append((int(port, 16), ListeningSocket(_address(raw), int(parts[7]), int(parts[9]))))
    return found


def _addresses_of(pid: int) -> list[str]:
    held = {link for member in (pid, *_family(pid)) for link in _descriptors(member) or ()}
    ours = [(port, found) for port, found in _table_lines() or () if f"socket:[{found.inode}]" in held]
    shown = [f"[{found.address}]:{port}" if found.address.version == 6 else f"{found.address}:{port}" for port, found in ours]
    return sorted(set(shown))[:_MAX_SHOWN]


def _address(raw: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
