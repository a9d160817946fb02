"""Which instance: the key of everything that belongs to a launch (DESIGN §3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class InstanceId:
    """One replica of a pool. With the launch's ``epoch``, which never goes back, it names one launch and no other.

    A pool has one active instance and, while it is being replaced beside its old one, a second; their replica ids
    alternate between ``r0`` and ``r1``.
    """

    pool_id: str
    replica_id: str = "r0"

    def __str__(self) -> str:
        """``chat/r0``."""
        return f"{self.pool_id}/{self.replica_id}"
