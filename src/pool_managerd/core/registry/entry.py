"""One pool's row: plain data with the few rules that keep it true."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pool_managerd.core.registry.snapshot import PoolSnapshot
from pool_managerd.core.registry.types import Lease


@dataclass(slots=True)
class LaunchLeases:
    """The leases of one launch, with which they end: ``counted`` by the seeds' counter calls, ``by_id`` by all others."""

    counted: int = 0
    by_id: dict[str, Lease] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counted + len(self.by_id)


@dataclass(slots=True)
class PoolEntry:
    """What was set of a pool (``known``; there ``slots_free`` is what its engine reported), and its leases.

    ``epoch`` is the launch that new leases are given on; ``leases`` are those of every launch that has any. Their ids are
    ``lease_prefix`` and a number, which ``leases_given`` has reached.
    """

    known: PoolSnapshot
    lease_prefix: str
    epoch: int = 0
    leases: dict[int, LaunchLeases] = field(default_factory=dict)
    leases_given: int = 0

    @property
    def active_leases(self) -> int:
        """On all launches: while an engine is replaced, its last leases are still in flight beside the new one's."""
        return sum(launch.total for launch in self.leases.values())

    def leases_on(self, epoch: int) -> int:
        """In flight on launch ``epoch``."""
        found = self.leases.get(epoch)
        return 0 if found is None else found.total

    def find(self, lease_id: str) -> tuple[int, LaunchLeases] | None:
        """The launch that the lease is on, with its epoch; None when it is over, or never was."""
        return next((found for found in self.leases.items() if lease_id in found[1].by_id), None)

    @property
    def slots_free(self) -> int | None:
        """What the engine reported free, never more than the leases leave over."""
        total, reported = self.known.slots_total, self.known.slots_free
        if total is None:
            return reported
        return max(0, min(total - self.leases_on(self.epoch), total if reported is None else reported))

    def snapshot(self) -> PoolSnapshot:
        """The row as placement reads it."""
        models = () if self.known.model_id is None else (self.known.model_id,)  # an engine serves one model
        return replace(self.known, active_leases=self.active_leases, slots_free=self.slots_free, models_available=models)
