"""While a pool drains: how often it is told of, and whose requests it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.core.event import Event
from pool_managerd.core.health import Counters
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.status import status_of
from tests.supervision.test_pools import World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(pool={"slots": 8})
    await made.up()
    yield made
    await made.pools.close()


def listened(world: World) -> list[Event]:
    told: list[Event] = []
    world.fakes.events.listen(lambda event: told.append(event) if event.type == "drain_progress" else None)
    return told


async def drain(world: World, deadline_ms: int = 600_000) -> Operation:
    return await world.pools.change(world.p, "drain", ev.Drain(deadline_ms, 0), "drained", desired="drained")


async def test_what_is_left_is_told_soon_where_it_changes_and_else_now_and_then(world: World) -> None:
    told, clock, registry = listened(world), world.fakes.clock, world.fakes.registry
    leases = [registry.grant("p") for _ in range(4)]
    await drain(world)
    await clock.advance(4)
    assert told == [], "it was told that it began"
    for lease in leases[:2]:
        registry.release("p", lease.lease_id)
        world.pools.leases_changed("p")
    await clock.advance(1)
    assert [(event.fields["left"], event.fields["remaining_ms"]) for event in told] == [(2, 595_000)]
    assert told[0].human == "Pool 'p' is draining; 2 requests left, 9.92 min to the deadline"
    assert status_of(world.p, registry, "home", clock.monotonic(), 0)["drain"] == {
        "left": 2, "requests": 0, "remaining_ms": 595_000,
    }  # fmt: skip
    await clock.advance(500)
    assert 20 < len(told) < 60, "more and more rarely"


async def test_requests_without_a_lease_are_waited_for_also_while_the_engine_is_too_busy_to_say(world: World) -> None:
    prober, clock = world.fakes.prober, world.fakes.clock
    prober.told = Counters(requests=2)
    operation = await drain(world)
    await clock.advance(2)
    counters = prober.counters

    async def late(*_: Any) -> Counters | None:
        raise TimeoutError

    prober.counters = late  # type: ignore[method-assign,assignment]
    await clock.advance(30)
    assert operation.status == "running" and world.p.launch.requests == 2
    prober.counters, prober.told = counters, Counters(requests=0)  # type: ignore[method-assign]
    await clock.advance(1)
    assert operation.status == "succeeded" and operation.outcome is not None and not operation.outcome["force_stopped"]


async def test_a_drain_that_is_taken_back_is_told_of_no_more_and_leaves_no_requests_behind(world: World) -> None:
    told, clock = listened(world), world.fakes.clock
    world.fakes.prober.told = Counters(requests=2)
    await drain(world)
    await clock.advance(6)
    assert len(told) == 1 and told[0].fields["left"] == 2
    await world.pools.change(world.p, "undrain", ev.Undrain(), "now", desired="up")
    await clock.advance(60)
    assert len(told) == 1 and view(world.p.state).ready and world.p.launch.requests == 0
    await world.pools.change(world.p, "evict", ev.Evict(), "down")


async def test_a_drain_is_acknowledged_when_the_next_daemon_would_go_on_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fakes.registry.grant("p")
    written, kept = asyncio.Event(), world.fakes.records.known
    monkeypatch.setattr(world.fakes.records, "noted", written.wait)
    asked = asyncio.create_task(drain(world, 6_000))
    await world.fakes.clock.advance(1)
    assert view(world.p.state).draining and kept["drain"]["p"]["deadline"] is not None
    assert not asked.done(), "its deadline is not on the disk"
    written.set()
    assert (await asked).status == "running"
