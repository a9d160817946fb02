"""What somebody asks for who wants a slot of a model."""

from __future__ import annotations

from dataclasses import dataclass

from pool_managerd.core.demand.queue import MAX_PRIORITY
from pool_managerd.errors import SpecError

MAX_WAIT_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class AcquireRequest:
    """A slot of ``model``: a pool's id, served name or alias. ``wait_ms``: for how long at most, ``queue.wait_ms`` where that is
    not said; ``ttl_ms``: how long the lease lasts that is not renewed. A higher ``priority`` goes first. Without ``slot`` it is
    only to be ready. Raises SpecError.
    """

    model: str
    wait_ms: int | None = None
    ttl_ms: int | None = None
    priority: int = 0
    holder: str | None = None
    slot: bool = True

    def __post_init__(self) -> None:
        for name in ("model", "holder"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("holder", None):
                raise SpecError(f"cannot ask with {name} {value!r:.80}", hint=f"{name} must be text")
        for name in ("wait_ms", "ttl_ms", "priority"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int)) and (value is not None or name == "priority"):
                raise SpecError(f"cannot ask with {name} {value!r:.80}", hint=f"{name} must be a whole number")
        if self.wait_ms is not None and not 0 <= self.wait_ms <= MAX_WAIT_MS:
            raise SpecError(f"cannot wait for {self.wait_ms} ms", hint=f"wait_ms must be from 0 to {MAX_WAIT_MS} (24 h)")
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise SpecError(f"cannot use priority {self.priority}", hint=f"it must be from -{MAX_PRIORITY} to {MAX_PRIORITY}")
