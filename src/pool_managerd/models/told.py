"""What happens to models, told to whoever counts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A download has ended. ``reason`` is the code of its error in lower case, or none; ``received`` counts the bytes that came
    over the network for it.
    """

    ref: str
    outcome: Literal["success", "cancelled", "error"]
    reason: str
    received: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Verified:
    """A model was hashed to compare it, in a start (``reason`` start) or because somebody asked (verify)."""

    ref: str
    result: Literal["pass", "fail"]
    reason: Literal["start", "verify"]
    duration_s: float


Tell = Callable[[Downloaded | Verified], None]
"""Called in the event loop."""


def nobody(_what: Downloaded | Verified) -> None:
    """Nobody counts."""
