"""Requests that come to a simulated gateway: each takes its slot as the front door does, and is served by a simulated engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Protocol

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.testing.scene import Scene
from pool_managerd.testing.simulated_machine import SimulatedEngine

TRIES = 2
SESSIONS = 4
_LENGTHS_S = (0.05, 1.0, 10.0, 100.0)
_LOOK_S = 0.5


class BrokenAnswerError(Exception):
    """The engine has ended, or what it answers is no answer: then it is ``odd``."""

    def __init__(self, *, odd: bool) -> None:
        super().__init__()
        self.odd = odd


@dataclass(eq=False)
class SimulatedRequest:
    """``length_s``: how long its answer takes; ``begins``: its client has had a part of the answer when an engine breaks.

    ``lease`` is the one that it has, ``waits_since`` when it began to wait for it; ``on_engine``: that answers it now.
    """

    name: str
    model: str
    session: bytes | None
    length_s: float
    odd: bool
    begins: bool
    waits_since: float
    lease: HeldLease | None = None
    on_engine: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    @classmethod
    def drawn(cls, name: str, models: list[str], chance: Random, now: float) -> SimulatedRequest:
        length_s = chance.expovariate(1 / chance.choice(_LENGTHS_S))
        session = bytes([1 + chance.randrange(SESSIONS)] * 16) if chance.random() < 0.3 else None
        return cls(name, chance.choice(models), session, length_s, chance.random() < 0.05, chance.random() < 0.5, now)


class Watcher(Protocol):
    """Who hears of a lease that a request is given, of an engine that begins to answer it, and of its end."""

    def given(self, lease: HeldLease) -> None: ...
    def served(self, request: SimulatedRequest, engine: SimulatedEngine) -> None: ...
    def done(self, lease: HeldLease, *, broken: bool) -> None: ...


class Service:
    """How a request is served: its slot comes from ``leasing``, its answer from an engine of ``scene``'s machine. ``watcher``
    sees it.
    """

    def __init__(self, scene: Scene, leasing: Leasing, watcher: Watcher) -> None:
        self._scene, self._leasing, self._watcher = scene, leasing, watcher

    async def run(self, request: SimulatedRequest) -> None:
        """Raises PoolError when it is refused, BrokenAnswerError when its engine breaks and no other one answers."""
        for attempt in range(1, TRIES + 1):
            broken, request.waits_since = False, self._scene.timeline.now
            lease = request.lease = await self._lease(request)
            self._watcher.given(lease)
            try:
                await self._answered(request, lease)
                return
            except BrokenAnswerError as problem:
                broken = True
                if request.begins or attempt == TRIES:
                    raise
                if not await self._leasing.moves_on(request.model, lease, gone=not problem.odd):
                    raise
            finally:
                request.lease, request.on_engine = None, False
                self._watcher.done(lease, broken=broken)
                self._leasing.done(lease, broken=broken)

    async def _lease(self, request: SimulatedRequest) -> HeldLease:
        leasing, lease = self._leasing, None
        session = request.session if leasing.directory.shared(request.model) else None
        if session is not None:
            lease = await leasing.again(request.model, session, request.name)
        if (lease := lease or leasing.kept(request.model)) is None:
            lease = await leasing.take(request.model, request.name)
        if session is not None:
            leasing.served(session, lease)
        return lease

    async def _answered(self, request: SimulatedRequest, lease: HeldLease) -> None:
        engine = self._scene.machine.listening(int(lease.url.rpartition(":")[2]))
        if engine is None or engine.asleep:
            raise BrokenAnswerError(odd=engine is not None)
        self._watcher.served(request, engine)
        request.on_engine = True
        dead = asyncio.get_running_loop().create_future()
        told = partial(_settle, dead)
        engine.on_dead.append(told)
        try:
            left_s = request.length_s
            while not dead.done() and (left_s > 0 or engine.hung):
                await asyncio.wait({dead}, timeout=left_s if left_s > 0 else _LOOK_S)
                left_s = 0.0
            if dead.done() or request.odd:
                raise BrokenAnswerError(odd=not dead.done())
        finally:
            if told in engine.on_dead:
                engine.on_dead.remove(told)


def _settle(dead: asyncio.Future[None]) -> None:
    if not dead.done():
        dead.set_result(None)
