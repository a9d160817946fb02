"""Who listens where an engine should: the difference between its answer and another program's (invariant 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Listener:
    """Whose listening socket a connection to the engine's address reaches.

    ``unknown``: it cannot be seen from here, as in a container without the permission to look at others' descriptors.
    ``who`` names the other process, as far as it can be seen.
    """

    owner: Literal["engine", "other", "nobody", "unknown"]
    who: str = ""


OURS, NOBODY, UNKNOWN = Listener("engine"), Listener("nobody"), Listener("unknown")
