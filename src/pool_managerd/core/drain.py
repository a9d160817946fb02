"""Draining: refuse new leases, wait for those in flight, stop at the latest at the deadline (OC-CTRL-2002, ORCH-3505)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pool_managerd.errors import SpecError

MAX_DEADLINE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """Drain ``pool_id``; at ``deadline_ms`` from now the engine is stopped whatever is still in flight.

    Raises SpecError when the deadline is negative or longer than 24 hours.
    """

    pool_id: str
    deadline_ms: int

    def __post_init__(self) -> None:
        if isinstance(self.deadline_ms, bool) or not 0 <= self.deadline_ms <= MAX_DEADLINE_MS:
            raise SpecError(
                f"cannot drain with deadline_ms {self.deadline_ms}: it must be from 0 to {MAX_DEADLINE_MS} (24 h)",
                pool_id=self.pool_id,
            )


@dataclass(frozen=True, slots=True)
class DrainOutcome:
    """How a drain ended. When ``force_stopped``, ``final_lease_count`` leases or requests without one were cut off."""

    pool_id: str
    force_stopped: bool
    duration_ms: int
    final_lease_count: int

    def to_dict(self) -> dict[str, object]:
        """As JSON-able data."""
        return asdict(self)
