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
    ``reloaded``: another engine is to take the place of its.

    ``idle_s``: since when it has none; ``back_s``: how long it takes to come back, ``weight``: times how much that counts.
    """

    pool_id: str
    in_hand: int = 0
    idle_s: float = 0.0
    back_s: float = 1.0
    weight: float = 1.0
    kept: str = ""
    reloaded: bool = False

    @property
    def score(self) -> float:
        """The higher the sooner it goes."""
        return self.idle_s / (max(self.back_s, 0.001) * self.weight)


@dataclass(frozen=True, slots=True)
class RoomPlan:
    """``evict`` go at once, unless some are in use that must go, too: then all wait for those, ``waits_for``."""

    evict: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()


def plan_room(residents: Collection[Resident], fits: Fits, ways: Iterable[Collection[str]] = ((),)) -> RoomPlan | None:
    """The fewest that have to go, by their score; None when it does not fit even without all that may go.

    ``ways``: what has to go by rules, all of one of these; the way whose pools weigh least is the first that is tried.
    """
    if fits(()):
        return RoomPlan()
    weights = {one.pool_id: one.weight for one in residents}
    for way in sorted(ways, key=lambda way: sum(weights.get(name, 0.0) for name in way)):
        if (plan := _plan(residents, fits, way)) is not None:
            return plan
    return None


def _plan(residents: Iterable[Resident], fits: Fits, way: Collection[str]) -> RoomPlan | None:
    may_go = sorted((one for one in residents if not one.kept), key=lambda one: (one.in_hand, -one.score, one.pool_id))
    names = [one.pool_id for one in sorted(may_go, key=lambda one: (one.pool_id not in way, bool(one.in_hand)))]
    if not set(way) <= {*names}:
        return None
    enough = next((number for number in range(max(1, len(way)), len(names) + 1) if fits(names[:number])), None)
    if enough is None:
        return None
    gone, in_use = _needed(names[:enough], fits), {one.pool_id for one in may_go if one.in_hand}
    return RoomPlan(tuple(name for name in gone if name not in in_use), tuple(name for name in gone if name in in_use))


def _needed(names: Sequence[str], fits: Fits) -> list[str]:
    """Without those that need not go after all, tried from the one that was to go last."""
    gone = list(names)
    for name in reversed(names):
        rest = [other for other in gone if other != name]
        if fits(rest):
            gone = rest
    return gone
