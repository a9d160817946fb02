"""What a request handler works with, and the work that outlives the request that started it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import structlog

from pool_managerd.errors import PoolError
from pool_managerd.node import Operation, PoolManager
from pool_managerd.telemetry.metrics import Metrics

_T = TypeVar("_T")
log = structlog.get_logger("pool_managerd.api")


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds of the endless answers: how many at once, how often a sign of life, how long a write may be stuck."""

    max_streams: int = 512
    heartbeat_s: float = 15.0
    write_timeout_s: float = 30.0
    poll_s: float = 0.25


class OwnConfiguration(Protocol):
    """The daemon's file. Raises PoolError."""

    def history(self) -> list[dict[str, Any]]: ...
    async def plan(self, *, text: str | None = None, number: int | None = None, prune: bool = False) -> dict[str, Any]: ...
    async def apply(
        self, *, text: str | None = None, number: int | None = None, prune: bool = False, expect: str | None = None,
        origin: str = "apply",
    ) -> Operation: ...  # fmt: skip


@dataclass(slots=True)
class ApiContext:
    """One per server. ``closing`` ends the endless answers when the server stops; ``configuration`` is None without a file."""

    node: PoolManager
    metrics: Metrics
    configuration: OwnConfiguration | None = None
    streams: StreamLimits = field(default_factory=StreamLimits)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    open_streams: int = 0
    _kept: set[asyncio.Task[Any]] = field(default_factory=set)

    async def keep(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for ``work``, which goes on to its end even if the waiting client goes away."""
        task = asyncio.ensure_future(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_nobody_waits)
            raise


def _nobody_waits(task: asyncio.Task[Any]) -> None:
    """The end of work whose client has gone: a PoolError is told by the operation, anything else only here."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, PoolError):
        log.error("A request failed unexpectedly after its client had gone", action="request_failed", exc_info=error)
