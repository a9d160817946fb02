"""Who an engine process is: enough to find it again after the daemon died, and never to mistake another for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from pool_managerd.runtime import procfs, wire


@dataclass(frozen=True, slots=True)
class Identity:
    """One engine process and its shim. Pids count only together with the start ticks and the boot id.

    ``nonce`` is in the environment of the engine and of what it forks, unless one wiped it. ``uid`` is the engine's
    when nobody else runs as it, else 0.
    """

    nonce: str
    pid: int
    start_ticks: int
    boot_id: str
    shim_pid: int
    shim_start_ticks: int
    pool_id: str
    replica_id: str
    epoch: int
    record_path: str
    uid: int = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """From its fields; unknown keys are ignored. Raises ValueError for a missing or mistyped one."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = data.get(field.name, None if field.default is MISSING else field.default)
            expected = int if field.type == "int" else str
            if not isinstance(value, expected) or isinstance(value, bool):
                raise ValueError(f"cannot use an instance record: {field.name} is {value!r}")
            values[field.name] = value
        return cls(**values)

    def is_this_boot(self) -> bool:
        """False when the machine was started anew since: then nothing of this instance can exist."""
        return self.boot_id == procfs.boot_id()

    def engine_runs(self) -> bool:
        """True when the engine process itself is alive: pid, start time and boot agree, and something proves that it is ours.

        The nonce does. An engine may wipe its environment (a changed process title does): then only its living shim as
        its parent, or the uid that nobody else has, is proof.
        """
        if self.pid <= 1 or not self.is_this_boot() or not procfs.is_running(self.pid, self.start_ticks):
            return False
        found = procfs.nonce(self.pid)
        return found == self.nonce if found is not None else self._is_proved()

    def _is_proved(self) -> bool:
        if self.uid > 0 and procfs.uids(self.pid) == {self.uid}:
            return True
        seen = procfs.stat(self.pid)
        return seen is not None and seen.parent_pid == self.shim_pid and self.shim_runs()

    def shim_runs(self) -> bool:
        """True when the engine's shim is alive."""
        return (
            self.shim_pid > 1
            and self.is_this_boot()
            and procfs.is_running(self.shim_pid, self.shim_start_ticks)
            and is_shim(self.shim_pid)
        )


def open_proved(pid: int, is_ours: Callable[[], bool]) -> int | None:
    """A pidfd of a process that was proved ours after it was opened, so that no signal can reach another; None for any other.

    The caller closes it.
    """
    try:
        pidfd = os.pidfd_open(pid) if pid > 1 else None
    except OSError:
        return None
    if pidfd is not None and not is_ours():
        os.close(pidfd)
        return None
    return pidfd


def is_shim(pid: int) -> bool:
    """True when ``pid`` is a shim of this user's."""
    return procfs.name(pid) == wire.SHIM_NAME and procfs.uids(pid) == {os.geteuid()}
