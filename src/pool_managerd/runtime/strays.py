"""Processes that an engine left behind and that nothing else knows: found by the instance nonce they inherited."""

from __future__ import annotations

import asyncio
import os
import signal

from pool_managerd.runtime import procfs

_PIDS_PER_TURN = 64


async def kill_strays(nonce: str) -> list[int]:
    """Kill every process with this nonce in its environment; returns their pids. Never blocks the loop for long.

    A process that wiped its environment is not found this way; the shim finds it as a descendant.
    """
    killed: list[int] = []
    for index, pid in enumerate(procfs.pids()):
        if index % _PIDS_PER_TURN == _PIDS_PER_TURN - 1:
            await asyncio.sleep(0)
        if pid > 1 and pid != os.getpid() and procfs.nonce(pid) == nonce and _kill_if_it_has(pid, nonce):
            killed.append(pid)
    return killed


def _kill_if_it_has(pid: int, nonce: str) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        # Looked at again now that the pidfd holds on to this very process.
        if procfs.nonce(pid) != nonce:
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True
