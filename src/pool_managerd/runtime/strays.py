"""Processes that an engine left behind when its shim was lost, found by what they cannot take off, and killed.

A process is an instance's own when it carries its nonce, when its shim wrote it down as a descendant, when it runs as
the uid that nobody but the pool has, or when it descends from one of these. A program that rewrote its title has no
environment any more, and one that left its session no group: neither is asked for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from pool_managerd.runtime import procfs
from pool_managerd.runtime.identity import Identity, is_shim
from pool_managerd.runtime.removal import TEMPORARY, remove_shared_memory, remove_temporary
from pool_managerd.runtime.waiting import in_own_thread

_LEFTOVER_SECONDS, _TURN_SECONDS = 5.0, 0.02


async def kill_strays(identity: Identity, recorded: Collection[tuple[int, int]] = ()) -> list[int]:
    """Kill every process of the instance that no shim looks after, and remove what they leave on memory disks.

    Returns their pids. Never blocks the loop.

    ``recorded`` are descendants as its shim saw them, by pid and start ticks.
    """
    return await in_own_thread(_kill_all, identity, frozenset(recorded))


def _kill_all(identity: Identity, recorded: frozenset[tuple[int, int]]) -> list[int]:
    if not identity.is_this_boot():
        return []
    killed: dict[int, None] = {}
    until = time.monotonic() + _LEFTOVER_SECONDS
    while found := _find(identity, recorded):  # again: one forks while it is being looked for, one takes a while to end
        killed.update(dict.fromkeys(pid for pid, ticks in found.items() if _kill(pid, ticks)))
        if time.monotonic() >= until:
            break
        time.sleep(_TURN_SECONDS)
    workdir = Path(identity.record_path).parent.parent / "work" / identity.pool_id
    remove_shared_memory(identity.uid)
    remove_temporary(str(workdir), f"{TEMPORARY}{identity.nonce[:8]}")
    return list(killed)


def _find(identity: Identity, recorded: frozenset[tuple[int, int]]) -> dict[int, int]:
    """Pid and start ticks of every process that is to be killed. Each was seen alive."""
    stats = {pid: seen for pid in procfs.pids() if (seen := procfs.stat(pid)) is not None}
    shims = {pid for pid in stats if is_shim(pid)}
    own = {pid for pid, seen in stats.items() if procfs.nonce(pid) == identity.nonce or (pid, seen.start_ticks) in recorded}
    spared = {0, 1, os.getpid(), *shims}

    def is_stray(pid: int) -> bool:
        line = _line(pid, stats)
        if own.intersection(line):
            return True
        # Another launch of the same pool has the uid as well; all of it is below a shim as long as that lives.
        return identity.uid > 0 and procfs.uids(pid) == {identity.uid} and not shims.intersection(line)

    return {
        pid: seen.start_ticks for pid, seen in stats.items() if pid not in spared and seen.state not in "ZX" and is_stray(pid)
    }


def _line(pid: int, stats: Mapping[int, procfs.Stat]) -> list[int]:
    """``pid`` and its ancestors. A pid that was reused while we looked must not make a circle."""
    line: list[int] = []
    while pid in stats and pid not in line:
        line.append(pid)
        pid = stats[pid].parent_pid
    return line


def _kill(pid: int, ticks: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Looked at again now that the pidfd holds on to this very process.
        if not procfs.is_running(pid, ticks):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True
