"""What must go so that another model fits: of those that may, what is idle longest for what it costs to bring back.

Nothing in flight is ever cut off. Where idle pools alone do not make room, those in use are named, whose end is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

Fits = Callable[[Collection[str]], bool]
"""Whether the wanted pool fits when these pools are gone."""


@dataclass(frozen=True, slots=True)
class Resident:
    """One pool that holds something. ``kept`` says why it must not go, if so; ``in_hand`` are requests in flight on it.

    ``idle_s``: since when it has none; ``back_s``: how long it takes to come back, ``weight``: times how much that counts.
    """

    pool_id: str
    in_hand: int = 0
    idle_s: float = 0.0
    back_s: float = 1.0
    weight: float = 1.0
    kept: str = ""

    @property
    def score(self) -> float:
        """The higher the sooner it goes."""
        return self.idle_s / (max(self.back_s, 0.001) * self.weight)


@dataclass(frozen=True, slots=True)
class RoomPlan:
    """``evict`` go at once, unless some are in use that must go, too: then all wait for those, ``waits_for``."""

    evict: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()


def plan_room(residents: Iterable[Resident], fits: Fits) -> RoomPlan | None:
    """The fewest that have to go, by their score; None when it does not fit even without all that may go."""
    if fits(()):
        return RoomPlan()
    may_go = [one for one in residents if not one.kept]
    idle = sorted((one for one in may_go if not one.in_hand), key=_soonest_first)
    used = sorted((one for one in may_go if one.in_hand), key=lambda one: (one.in_hand, *_soonest_first(one)))
    names = [one.pool_id for one in (*idle, *used)]
    enough = next((number for number in range(1, len(names) + 1) if fits(names[:number])), None)
    if enough is None:
        return None
    gone = _needed(names[:enough], fits)
    in_use = {one.pool_id for one in used}
    return RoomPlan(tuple(name for name in gone if name not in in_use), tuple(name for name in gone if name in in_use))


def _soonest_first(one: Resident) -> tuple[float, str]:
    return -one.score, one.pool_id


def _needed(names: Sequence[str], fits: Fits) -> list[str]:
    """Without those that need not go after all, tried from the one that was to go last."""
    gone = list(names)
    for name in reversed(names):
        rest = [other for other in gone if other != name]
        if fits(rest):
            gone = rest
    return gone
