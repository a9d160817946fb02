"""How long a request waits for a daemon that is away, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.gateway.leasing import LeaseTimes, Leasing
from pool_managerd.gateway.link import UnansweredError
from pool_managerd.testing.virtual_loop import VirtualLoop

GIVEN = HeldLease("lease-1", "chat", "http://127.0.0.1:1", 1)
TIMES = LeaseTimes(wait_s=100.0, away_s=15.0, again_s=0.1)
Answer = tuple[float, HeldLease | PoolError]


def away() -> NodeError:
    return NodeError("cannot reach the daemon")


class ScriptedLink:
    """``answers``: how long each question for a slot takes, and what it comes to; the last one is what all others come to."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.waits_ms: list[int | None] = []
        self.names: list[str] = []
        self.held: dict[str, HeldLease] = {}
        self.returned: list[str] = []

    async def __aenter__(self) -> ScriptedLink:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def acquire(self, model: str, holder: str, ttl_ms: int, wait_ms: int | None = None) -> HeldLease:
        self.waits_ms.append(wait_ms)
        self.names.append(holder)
        took_s, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(took_s)
        if isinstance(answer, PoolError):
            raise answer
        return answer

    async def routes(self) -> AsyncIterator[dict[str, Any]]:
        row = {"pool_id": "chat", "state": "ready", "ready": True, "epoch": 1}
        yield {"pools": [row], "gone": [], "waiting": False}
        await asyncio.Event().wait()

    async def give_back(self, lease: HeldLease) -> None:
        self.returned.append(lease.lease_id)

    async def renew(self, lease: HeldLease, ttl_ms: int) -> bool:
        return True

    async def held_by(self, holds: Callable[[str], bool]) -> list[HeldLease]:
        return [lease for name, lease in self.held.items() if holds(name)]

    async def evict(self, pool_id: str) -> None:
        return None

    async def queue(self) -> list[dict[str, Any]]:
        return []

    async def log(self, pool_id: str, lines: int) -> AsyncIterator[bytes]:
        yield b""


def taken(link: ScriptedLink) -> tuple[HeldLease, float]:
    """The lease that a request gets, and after how many seconds."""
    now = [1_000.0]
    loop = VirtualLoop(lambda: now[0], Random(0))  # type: ignore[abstract]  # it has nothing of what reads and writes
    leasing = Leasing(link, TIMES, clock=loop.time)
    loop.create_task(leasing.run())
    task = loop.create_task(leasing.take("chat", "request-1"))
    while not task.done():
        now[0] = max(now[0], loop.next_at() or now[0])
        loop.turn()
    took_s = now[0] - 1_000.0
    loop.end()
    return task.result(), took_s


def test_a_request_that_has_waited_for_long_outlives_a_daemon_that_is_soon_back() -> None:
    """It was refused at once: its patience with a daemon that is away began when it came."""
    link = ScriptedLink((60.0, away()), (0.01, away()), (0.01, away()), (1.0, GIVEN))
    lease, took_s = taken(link)
    assert lease == GIVEN and took_s < 62.0


def test_a_request_that_is_asked_again_waits_for_what_is_left_of_its_time() -> None:
    link = ScriptedLink((60.0, away()), (1.0, GIVEN))
    taken(link)
    first, second = link.waits_ms
    assert first == 100_000 and second is not None and 39_000 < second < 40_000


def test_a_daemon_that_stays_away_is_not_waited_for_any_longer() -> None:
    link = ScriptedLink((60.0, away()), (0.01, away()))
    with pytest.raises(NodeError):
        taken(link)
    assert 100 < len(link.waits_ms) < 150, "for 15 s, ten times a second"


def test_a_daemon_that_stands_still_is_not_asked_again_for_ever() -> None:
    link = ScriptedLink((110.0, away()))
    with pytest.raises(NodeError):
        taken(link)
    assert len(link.waits_ms) == 1


def test_what_the_daemon_refuses_is_told_at_once() -> None:
    link = ScriptedLink((0.01, RequestError("no slot", code="QUEUE_TIMEOUT", status=503)), (0.01, GIVEN))
    with pytest.raises(RequestError):
        taken(link)
    assert len(link.waits_ms) == 1


class Forgetful(ScriptedLink):
    """It gives a lease to the first question, and dies before it says so; ``seen``: the next daemon is asked what there is."""

    async def acquire(self, model: str, holder: str, ttl_ms: int, wait_ms: int | None = None) -> HeldLease:
        try:
            given = await super().acquire(model, holder, ttl_ms, wait_ms)
        except UnansweredError:
            self.held[holder] = HeldLease("unheard-of", "chat", "", 1)
            raise
        self.held[holder] = given
        return given


def test_a_slot_that_was_given_as_the_daemon_died_goes_back_at_once_and_not_when_its_lease_runs_out() -> None:
    """It kept an engine with one slot from everybody for as long as that."""
    link = Forgetful((0.01, UnansweredError("connection reset")), (1.0, GIVEN))
    lease, _took_s = taken(link)
    assert lease == GIVEN and link.returned == ["unheard-of"]


def test_a_slot_in_use_stays_with_its_request_though_another_of_the_same_id_had_no_answer() -> None:
    """Whoever calls names requests as it likes."""
    link = Forgetful((0.0, GIVEN), (0.01, UnansweredError("connection reset")), (1.0, replace(GIVEN, lease_id="lease-2")))
    now = [1_000.0]
    loop = VirtualLoop(lambda: now[0], Random(0))  # type: ignore[abstract]
    leasing = Leasing(link, TIMES, clock=loop.time)
    loop.create_task(leasing.run())
    tasks = [loop.create_task(leasing.take("chat", "request-1")) for _ in range(2)]
    while not all(task.done() for task in tasks):
        now[0] = max(now[0], loop.next_at() or now[0])
        loop.turn()
    loop.end()
    assert {task.result().lease_id for task in tasks} == {"lease-1", "lease-2"} and link.returned == ["unheard-of"]
