"""Which of the processes that a GPU lists belong to which instance's engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pool_managerd.core.gpu.devices import DeviceProcess
from pool_managerd.core.instance_id import InstanceId


class EngineMark(NamedTuple):
    """How the engine of launch ``epoch`` of an instance, and what descends from it, are recognised.

    What loses its parent becomes a child of the shim, whatever title and session it gave itself; 0 when there is none.
    """

    instance_id: InstanceId
    epoch: int
    pid: int
    nonce: str
    shim_pid: int = 0


@dataclass(frozen=True, slots=True)
class Owner:
    """The launch that a listed pid belongs to. ``start_ticks`` tells it from a later process with the same pid."""

    instance_id: InstanceId
    epoch: int
    start_ticks: int | None


def owners(processes: Iterable[DeviceProcess], marks: Iterable[EngineMark], known: Mapping[int, Owner]) -> dict[int, Owner]:
    """The owner of every listed pid that belongs to a launch.

    ``known`` are those of the last scan: a process that has ended can no longer be asked whose it was.
    """
    by_nonce, by_pid = {}, {}
    for mark in marks:
        by_nonce[mark.nonce] = by_pid[mark.pid] = mark
        if mark.shim_pid > 1:
            by_pid[mark.shim_pid] = mark
    launches = {(mark.instance_id, mark.epoch) for mark in by_pid.values()}
    found: dict[int, Owner] = {}
    for process in processes:
        if not process.certain:
            continue
        before = known.get(process.pid)
        ours = before is not None and (before.instance_id, before.epoch) in launches
        if before is not None and ours and process.start_ticks in (None, before.start_ticks):
            found[process.pid] = before
        elif owner := by_nonce.get(process.nonce or "") or _by_descent(process, by_pid):
            found[process.pid] = Owner(owner.instance_id, owner.epoch, process.start_ticks)
    return found


def _by_descent(process: DeviceProcess, by_pid: Mapping[int, EngineMark]) -> EngineMark | None:
    return next((by_pid[pid] for pid in (process.pid, *process.ancestors) if pid in by_pid), None)
