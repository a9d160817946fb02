"""Rules on what is loaded together, in force: for whoever asks for a model, and for starts by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import NodeError
from tests.supervision.test_demand import DemandWorld


@pytest.fixture
async def roomy() -> AsyncIterator[Callable[..., DemandWorld]]:
    """Makes worlds in which memory has room for all."""
    made: list[DemandWorld] = []

    def make(gib: float = 1, **together: Any) -> DemandWorld:
        world = DemandWorld(gib=gib, together=together)
        world.fakes.admission.together = world.config.together.rules
        made.append(world)
        return world

    yield make
    for world in made:
        await world.end()


async def test_one_pool_of_a_group_is_loaded_at_a_time(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a", "b"]}])
    for model in ("a", "c", "b"):
        world.release(await world.have(model))
    assert world.ready() == ["b", "c"]
    world.release(await world.have("a"))
    assert world.ready() == ["a", "c"]


async def test_what_is_loaded_is_part_of_a_set(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(sets=[["a", "b"], ["a", "c"]])
    for model, loaded in (("a", ["a"]), ("b", ["a", "b"]), ("c", ["a", "c"]), ("b", ["a", "b"])):
        world.release(await world.have(model))
        assert world.ready() == loaded


async def test_a_rule_waits_for_what_is_in_flight_and_says_so(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a", "b"]}])
    first, waiter = await world.have("a"), world.ask("b")
    await world.fakes.clock.advance(20)
    (row,) = world.demand.rows()
    assert not waiter.done() and world.ready() == ["a"] and row["waits_for"] == "a must end what it has in hand first"
    world.release(first)
    await world.pass_until(waiter.done)
    assert world.ready() == ["b"]


async def test_a_start_by_hand_keeps_to_the_rules_and_goes_on_when_the_way_is_free(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a", "b"]}])
    await world.begin("a")
    await world.begin("b")
    b = world.pools.get("b").state
    assert b.lacks_room and b.reason == "not_together" and world.ready() == ["a"]
    assert b.last_error is not None and "one pool of group 'g' is loaded at a time" in b.last_error
    assert "`pool-managerd evict a`" in b.last_error
    await world.pools.change(world.pools.get("a"), "stop", ev.Stop(), "down", desired="stopped")
    await world.pass_until(lambda: world.ready() == ["b"], seconds=120)


async def test_two_that_are_started_at_the_same_moment_are_not_both_refused(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a", "b"]}])
    for name in ("a", "b"):
        await world.pools.change(world.pools.get(name), "start", ev.Start(), "up", desired="up")
    await world.pass_until(world.ready)
    assert len(world.ready()) == 1


async def test_a_pinned_pool_that_a_rule_keeps_apart_is_named(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a", "b"]}])
    pinned = world.config.pools[0].model_copy(update={"pinned": True})
    world.pools.post("a", ev.Tick(), replace(world.pools.get("a").definition, config=pinned))
    world.release(await world.have("a"))
    with pytest.raises(NodeError, match="pool 'a' does not go for it, as it is pinned") as refused:
        await world.demand.acquire(AcquireRequest("b"))
    assert refused.value.code == "NOT_TOGETHER"


async def test_a_plan_shows_what_a_rule_would_end(roomy: Callable[..., DemandWorld]) -> None:
    world = roomy(groups=[{"id": "g", "pools": ["a"], "exclusive": True}])
    for model in ("b", "c"):
        world.release(await world.have(model))
    plan = await world.demand.plan("a")
    assert [(one["pool_id"], one["action"]) for one in plan["stops"]] == [("b", "stop"), ("c", "stop")]
