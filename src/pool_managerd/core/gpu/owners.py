"""Which of the processes that a GPU lists belong to which pool's engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pool_managerd.core.gpu.devices import DeviceProcess


@dataclass(frozen=True, slots=True)
class EngineMark:
    """How a pool's engine and what descends from it are recognised.

    What loses its parent becomes a child of the shim, whatever title and session it gave itself; 0 when there is none.
    """

    pool_id: str
    pid: int
    nonce: str
    shim_pid: int = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """A listed pid that is a pool's. ``start_ticks`` tells it from a later process with the same pid."""

    pool_id: str
    start_ticks: int | None


def owners(processes: Iterable[DeviceProcess], marks: Iterable[EngineMark], known: Mapping[int, Owner]) -> dict[int, Owner]:
    """The owner of every listed pid that is a pool's.

    ``known`` are those of the last look: a process that has ended can no longer be asked whose it was.
    """
    by_nonce, by_pid = {}, {}
    for mark in marks:
        by_nonce[mark.nonce] = by_pid[mark.pid] = mark.pool_id
        if mark.shim_pid > 1:
            by_pid[mark.shim_pid] = mark.pool_id
    pools = set(by_pid.values())
    found: dict[int, Owner] = {}
    for process in processes:
        if not process.certain:
            continue
        before = known.get(process.pid)
        if before is not None and before.pool_id in pools and process.start_ticks in (None, before.start_ticks):
            found[process.pid] = before
            continue
        pool_id = by_nonce.get(process.nonce or "") or _by_descent(process, by_pid)
        if pool_id is not None:
            found[process.pid] = Owner(pool_id, process.start_ticks)
    return found


def _by_descent(process: DeviceProcess, by_pid: Mapping[int, str]) -> str | None:
    return next((by_pid[pid] for pid in (process.pid, *process.ancestors) if pid in by_pid), None)
