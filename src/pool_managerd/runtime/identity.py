"""Who an engine process is: enough to find it again after the daemon died, and never to mistake another for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pool_managerd.runtime import procfs, wire


@dataclass(frozen=True, slots=True)
class Identity:
    """One engine process and its shim. Pids count only together with the start ticks and the boot id.

    ``nonce`` is in the environment of the engine and of what it forks. ``cgroup`` is empty: engines have none
    of their own yet.
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
    cgroup: str = ""

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Identity:
        """The inverse of ``to_json``; unknown keys are ignored. Raises ValueError for a missing or mistyped one."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = data.get(field.name, "" if field.name == "cgroup" else None)
            expected = int if field.type == "int" else str
            if not isinstance(value, expected) or isinstance(value, bool):
                raise ValueError(f"cannot use an instance record: {field.name} is {value!r}")
            values[field.name] = value
        return cls(**values)

    def is_this_boot(self) -> bool:
        """False when the machine was started anew since: then nothing of this instance can exist."""
        return self.boot_id == procfs.boot_id()

    def engine_runs(self) -> bool:
        """True when the engine process itself is alive: pid, start time and boot agree, and no other nonce is in it.

        An engine may wipe its environment (a changed process title does), so a missing nonce proves nothing.
        """
        return (
            self.pid > 1
            and self.is_this_boot()
            and procfs.is_running(self.pid, self.start_ticks)
            and procfs.nonce(self.pid) in (self.nonce, None)
        )

    def shim_runs(self) -> bool:
        """True when the engine's shim is alive."""
        return (
            self.shim_pid > 1
            and self.is_this_boot()
            and procfs.is_running(self.shim_pid, self.shim_start_ticks)
            and procfs.name(self.shim_pid) == wire.SHIM_NAME
        )
