"""A pool as the lifecycle knows it: what is wanted of it, what it has been through, and its instance.

What outlives a launch is here; what is true of one launch alone is in the instance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import effects as do
from pool_managerd.core.lifecycle.history import NOTHING_FAILED, FailureHistory
from pool_managerd.core.lifecycle.instance import Instance
from pool_managerd.core.lifecycle.phase import Phase


class Desired(StrEnum):
    """What is wanted of a pool. Whoever wanted it last has said so; nothing else changes it."""

    WANTED = "wanted"
    """Up, and up again when it fails."""
    ON_DEMAND = "on_demand"
    """Nobody has asked for it yet; whoever needs it may start it."""
    EVICTED = "evicted"
    """It was stopped to make room; whoever needs it may start it again."""
    STOPPED = "stopped"
    """A person stopped it: demand does not start it."""
    DRAINED = "drained"
    """A person drained it: demand does not start it."""

    @property
    def stays_down(self) -> bool:
        """Only a person's start, preload or restart brings it up again."""
        return self in (Desired.STOPPED, Desired.DRAINED)


_ROOM = frozenset({"insufficient_vram", "insufficient_ram", "not_together"})


@dataclass(frozen=True, slots=True)
class PoolState:
    """One pool. Frozen, and changed by ``step`` alone, or where one instance takes another's place (replacing.py).

    ``held``: a person wants nothing to start by itself. ``quarantined``: one of its GPUs is out of use. Both stand
    beside ``desired`` and beside the phase; ``pending_start`` remembers that a start was due when one of them stood in
    its way. ``retry`` false: the first start of a submitted engine, whose failure is final. ``history`` is what it has
    failed at. ``has_run``: a process of it ran once, so that a further start by itself is a restart. ``proven``: what it
    is to run was ready once. ``last_epoch``: no launch has had a higher one, but for the present one perhaps. ``reason``
    and ``last_error`` say why it is not ready, in a word and in a sentence.
    """

    active: Instance
    desired: Desired = Desired.ON_DEMAND
    held: bool = False
    quarantined: bool = False
    pending_start: bool = False
    retry: bool = True
    history: FailureHistory = NOTHING_FAILED
    crash_count: int = 0
    restart_count: int = 0
    has_run: bool = False
    last_epoch: int = 0
    proven: bool = False
    port_conflicts: int = 0
    reason: str | None = None
    last_error: str | None = None

    @classmethod
    def new(cls, pool_id: str, epoch: int = 0) -> PoolState:
        """A pool that was never started; its first launch is number ``epoch`` + 1."""
        return cls(Instance(InstanceId(pool_id), epoch))

    @property
    def lacks_room(self) -> bool:
        """It waits to be started again, for nothing but room: whoever makes room may start it at once."""
        return self.active.phase is Phase.BACKOFF and self.reason in _ROOM

    @property
    def pool_id(self) -> str:
        return self.active.id.pool_id


Step = tuple[PoolState, tuple[do.Effect, ...]]


def on(pool: PoolState, **changes: object) -> PoolState:
    """``pool`` with these changes to its instance."""
    return replace(pool, active=replace(pool.active, **changes))  # type: ignore[arg-type]


def to(pool: PoolState, phase: Phase, now: float, *, deadline: float | None = None, **changes: object) -> PoolState:
    """``pool`` with its instance in ``phase`` since ``now``; the timers of the old phase are gone."""
    fresh: dict[str, object] = {"phase": phase, "since": now, "deadline": deadline, "next_probe_at": None, "probe_sent_at": None}
    return on(pool, **{**fresh, **changes})


def then(first: tuple[do.Effect, ...], step: Step) -> Step:
    """``step`` with these effects before its own."""
    return step[0], (*first, *step[1])


def refuse(pool: PoolState, code: str, message: str, *, retry_after_s: float | None = None) -> Step:
    """Nothing changes; whoever asked is told why."""
    return pool, (do.Refuse(code, message, retry_after_s),)
