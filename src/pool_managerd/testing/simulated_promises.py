"""What a simulated node has promised its clients, and what they are asking for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pool_managerd.config import Config
from pool_managerd.testing.scenario import Action


@dataclass
class Promise:
    """One thing that is durable: the values that it may have now. ``asking`` counts requests under way, ``asked`` all of them.
    ``told_at``: when it was acknowledged last.
    """

    possible: set[Any]
    asking: int = 0
    asked: int = 0
    cloudy_until: float = 0.0
    told_at: float = 0.0

    @property
    def stays_down(self) -> bool:
        """A person has stopped or drained the pool, and nobody asks for anything else."""
        return self.possible <= {"down", "drained"} and not self.asking


@dataclass
class GivenLease:
    """A lease that was acknowledged. ``until`` is when it may be over by itself; ``maybe``: it may have been given back."""

    pool_id: str
    epoch: int
    until: float | None
    maybe: bool = False


@dataclass(frozen=True)
class Touched:
    """What a request does to a promise: its ``value``; the values ``before``; its ``number`` among those that asked for it, or
    None where others were under way.
    """

    promise: Promise
    value: Any
    before: set[Any]
    number: int | None

    @property
    def alone(self) -> bool:
        """No other was under way at any time."""
        return self.promise.asking == 0 and self.number == self.promise.asked


@dataclass
class Question:
    """A request under way, and the promises that it touches."""

    action: Action
    pool_id: str
    touched: list[Touched] = field(default_factory=list)
    lease_id: str | None = None
    until: float | None = None
    asked_at: float = 0.0
    waits_s: float = float("inf")
    new_slots: int | None = None
    """What a reload asks for, where the pool cannot have been configured so before."""
    file: Config | None = None
    """What an apply was asked with."""
