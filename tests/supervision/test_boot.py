"""What an earlier daemon had begun, under the next one. Found by the simulator (make simulate) where a seed is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World


class Journal:
    """Has one operation that an earlier daemon did not bring to its end."""

    last_id = 0

    def __init__(self, operation: Operation) -> None:
        self._body = {**operation.to_dict(), "goal": operation.goal}

    def open(self, tell: object) -> None: ...
    def recall_events(self) -> list[Event]:
        return []

    def recall_operations(self) -> list[dict[str, Any]]:
        return [self._body]

    def put_event(self, event: Event) -> None: ...
    def drop_events(self, up_to_id: int) -> None: ...
    def put_operation(self, operation_id: str, body: Mapping[str, Any] | None) -> None: ...
    async def kept(self) -> None: ...
    def recall_crashes(self) -> list[dict[str, Any]]:
        return []

    def put_crash(self, crash_id: str, body: Mapping[str, Any] | None) -> None: ...


async def next_daemon(operation: Operation) -> World:
    """It has read the journal, and no engine was left."""
    world = World(pool={"preload": True})
    world.fakes.events.journal = Journal(operation)
    world.pools = Pools(world.config, world.services, world.store, world.store, world.new_id)
    world.pools.operations.restore()
    await boot(world.pools, world.services, {})
    await settle()
    return world


async def test_an_eviction_whose_engine_is_gone_has_ended_although_another_launch_runs() -> None:
    """Seed 2445: it waited for the end of the launch that the next daemon had begun, as an eviction is not durable."""
    world = await next_daemon(Operation("before-1", "evict", "p", 0, "down"))
    assert world.p.instance.phase == "ready"
    assert world.pools.operations.get("before-1").status == "succeeded"
    await world.pools.close()


async def test_a_preload_ends_with_the_launch_that_the_next_daemon_begins() -> None:
    world = await next_daemon(Operation("before-1", "preload", "p", 0, "up"))
    assert world.pools.operations.get("before-1").status == "succeeded" and world.p.instance.phase == "ready"
    await world.pools.close()
