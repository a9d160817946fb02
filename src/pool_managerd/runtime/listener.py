"""Who holds the socket that an engine's address leads to: the proof that a health answer came from our own engine."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Collection, Iterable

from pool_managerd.core.listeners import NOBODY, OURS, UNKNOWN, Listener
from pool_managerd.runtime import procfs, wire
from pool_managerd.runtime.isolation import user_name
from pool_managerd.runtime.listening import ListeningSocket, listening_sockets
from pool_managerd.runtime.waiting import in_own_thread

_MAX_KNOWN = 4096


class Listeners:
    """Asked at every probe. While the sockets stay the same it costs one question to the kernel."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], frozenset[int]] = {}

    async def __call__(self, pid: int, host: str, port: int) -> Listener:
        """Whether the engine ``pid`` or what descends from it holds what listens on ``host`` and ``port``."""
        return await in_own_thread(self.find, pid, host, port)

    def find(self, pid: int, host: str, port: int) -> Listener:
        """As calling it. Blocks for up to a second."""
        found = self._look(pid, host, port)
        # Between two looks at /proc a process may have handed its socket to a child: what is held against it is seen twice.
        return self._look(pid, host, port) if found.owner == "other" else found

    def _look(self, pid: int, host: str, port: int) -> Listener:
        sockets = listening_sockets(port)
        if sockets is None:
            return UNKNOWN
        reached = [socket for address in _addresses(host) for socket in _reached(address, sockets)]
        if not reached:
            return NOBODY
        inodes = frozenset(socket.inode for socket in reached)
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
        if found := [socket for socket in sockets if socket.address == wanted]:
            return found
    return []


def _owner(pid: int, reached: Iterable[ListeningSocket]) -> Listener:
    uids = procfs.uids(pid)
    wanted = {f"socket:[{socket.inode}]": socket for socket in reached}
    for link, socket in wanted.items():
        if uids and socket.uid not in uids:  # an engine cannot have made it
            return Listener("other", _who(_holder(link, ()), socket))
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


def _who(holder: int | None, socket: ListeningSocket) -> str:
    if holder is None:
        return f"a process of user {user_name(socket.uid)}"
    return f"pid {holder} ({procfs.name(holder) or 'gone'})"


def _family(pid: int) -> list[int]:
    """What descends from the engine; below its shim, so that what left its parent and its session counts, too."""
    seen = procfs.stat(pid)
    if seen is None:
        return []
    has_shim = procfs.name(seen.parent_pid) == wire.SHIM_NAME and procfs.uids(seen.parent_pid) == {os.geteuid()}
    return list(procfs.descendants(seen.parent_pid if has_shim else pid))


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
