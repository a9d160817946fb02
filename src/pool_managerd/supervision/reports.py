"""How the work on a pool reports to the pool's actor, the only one that writes its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pool_managerd.core.lifecycle import events as ev
from pool_managerd.supervision.protocols import Emit


class Learn(Protocol):
    """Write down what is known of launch ``epoch`` now: fields of Launch. False when it is not the present one any more."""

    def __call__(self, epoch: int, **known: Any) -> bool: ...


@dataclass(frozen=True, slots=True)
class Reports:
    """How the work reports to the pool's actor."""

    post: Callable[[ev.Event], None]
    learn: Learn
    emit: Emit
