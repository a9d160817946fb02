"""Starts on demand on fake parts and a manual clock: who gets a slot when, what goes for it, and who is told what."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.core.demand.turns import Condition
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.demand import Demand
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.pause import pause
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import gpu, process
from tests.supervision.gpu_world import GpuWorld
from tests.supervision.test_blue_green import Keeper
from tests.supervision.test_reload import until

NOT_YET = ProbeResult(ProbeOutcome.ERROR, "answered 503")
Waiter = asyncio.Task[dict[str, Any]]


class DemandWorld(GpuWorld):
    """Pools a, b and c, each of which needs ``gib`` of the one GPU; ``foreign_gib`` of it are somebody else's."""

    def __init__(self, gib: float = 14, pool: dict[str, Any] | None = None, **config: Any) -> None:
        super().__init__(gpu(0, 24), gib=gib, pool={"preload": False, **(pool or {})}, **config)
        self.gib, self.foreign_gib = gib, 0.0
        self._scan, self.fakes.monitor.scan = self.fakes.monitor.scan, self.scan  # type: ignore[method-assign]
        self.leases = Leases(self.pools, self.fakes.registry, self.fakes.clock, Keeper())
        self.demand = Demand(self.pools, self.services, self.leases, self.reloads.times, lambda: self.config, self.new_id)
        for one in self.config.pools:
            self.pools.add(one.id, one)
        self.demand.open = True
        self.task = asyncio.create_task(self.demand.run())

    async def scan(self) -> DeviceScan:
        held = [process(one.pid, self.gib) for one in self.fakes.launcher.processes if not one._record.done()]
        others = [process(900, self.foreign_gib, name="blender")] if self.foreign_gib else []
        self.fakes.monitor.show(gpu(0, 24, processes=(*held, *others)))
        return await self._scan()

    def ask(self, model: str, **asked: Any) -> Waiter:
        return asyncio.create_task(self.demand.acquire(AcquireRequest(model, **asked)))

    async def have(self, model: str, **asked: Any) -> dict[str, Any]:
        """A slot, for which at most some seconds pass."""
        waiter = self.ask(model, **asked)
        await self.pass_until(waiter.done)
        return await waiter

    async def pass_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        for _ in range(round(seconds / 0.25)):
            await settle()
            if condition():
                return
            await self.fakes.clock.advance(0.25)
        raise AssertionError(f"waited in vain; waiting: {self.demand.rows()}")

    def release(self, given: dict[str, Any]) -> None:
        self.leases.release(self.pools.get(given["pool_id"]), given["lease_id"])

    def ready(self) -> list[str]:
        return [pool.pool_id for pool in self.pools.all() if view(pool.state).ready]

    async def end(self) -> None:
        self.task.cancel()
        await self.demand.close()
        await self.reloads.close()
        await self.pools.close()


@pytest.fixture
async def world() -> AsyncIterator[DemandWorld]:
    made = DemandWorld()
    yield made
    await made.end()


async def test_a_model_that_is_down_is_started_and_one_that_is_ready_is_leased_at_once(world: DemandWorld) -> None:
    first = await world.have("a")
    assert first["pool_id"] == "a" and first["started"] is True and first["url"].startswith("http://127.0.0.1:")
    second = await world.demand.acquire(AcquireRequest("a"))
    assert second["started"] is False and second["queued_ms"] == 0 and second["lease_id"] != first["lease_id"]
    assert world.fakes.registry.get_active_leases("a") == 2 and len(world.fakes.launcher.processes) == 1


async def test_a_start_is_told_in_the_context_of_who_waits_for_it(world: DemandWorld) -> None:
    asker, told = ContextVar("asker", default="nobody"), []
    world.services.events.listen(lambda event: told.append((event.type, asker.get())))
    asker.set("me")
    given = await world.have("a")
    assert {who for type_, who in told if type_ in ("start", "staged", "spawn")} == {"me"}
    world.release(given)


async def test_who_goes_away_while_its_room_is_looked_at_is_not_missed(world: DemandWorld) -> None:
    looking, go_on, scan = asyncio.Event(), asyncio.Event(), world.fakes.monitor.scan

    async def slow() -> DeviceScan:
        looking.set()
        await go_on.wait()
        return await scan()

    world.fakes.monitor.scan = slow  # type: ignore[method-assign]
    waiter = world.ask("a")
    await looking.wait()
    waiter.cancel()
    await asyncio.wait({waiter})
    go_on.set()
    assert (await world.have("b"))["pool_id"] == "b"
    assert not world.services.events.recent("internal_error")


async def test_any_number_of_callers_join_one_start(world: DemandWorld) -> None:
    waiters = [world.ask("a", holder=str(number)) for number in range(40)]
    await world.pass_until(lambda: sum(waiter.done() for waiter in waiters) == 2)
    while not all(waiter.done() for waiter in waiters):
        for waiter in waiters:
            if waiter.done() and (given := waiter.result())["lease_id"] in {
                one.lease_id for one in world.fakes.registry.leases("a")
            }:
                world.release(given)
        await settle()
    assert len(world.fakes.launcher.processes) == 1 and len({waiter.result()["lease_id"] for waiter in waiters}) == 40


async def test_an_idle_pool_makes_room_and_is_started_again_by_demand(world: DemandWorld) -> None:
    world.release(await world.have("a"))
    given = await world.have("b")
    assert world.ready() == ["b"] and world.pools.get("a").state.desired is Desired.EVICTED
    world.release(given)
    assert (await world.have("a"))["started"] is True and world.ready() == ["a"]


async def test_what_is_in_flight_is_never_cut_off_and_who_waits_has_the_slot_when_it_ends(world: DemandWorld) -> None:
    first, waiter = await world.have("a"), world.ask("b")
    await world.fakes.clock.advance(20)
    (row,) = world.demand.rows()
    assert not waiter.done() and world.ready() == ["a"] and row["waits_for"] == "a must end what it has in hand first"
    assert (row["pool_id"], row["place"], row["state"]) == ("b", 1, "uninitialized")
    world.release(first)
    await world.pass_until(waiter.done)
    assert waiter.result()["pool_id"] == "b" and not world.fakes.launcher.processes[0].signals[1:]


async def test_requests_without_a_lease_are_in_flight_too(world: DemandWorld) -> None:
    world.release(await world.have("a"))
    world.fakes.prober.told = Counters(1, 1)
    waiter = world.ask("b")
    await world.fakes.clock.advance(10)
    assert not waiter.done() and world.ready() == ["a"]
    world.fakes.prober.told = Counters(1, 0)
    await world.pass_until(waiter.done)


async def test_the_same_models_requests_go_together_until_somebody_starves(world: DemandWorld) -> None:
    first = await world.have("a")
    other = world.ask("b")
    await world.fakes.clock.advance(20)
    second = await world.have("a")
    world.release(first)
    await world.fakes.clock.advance(15)
    late = world.ask("a")
    await world.fakes.clock.advance(2)
    assert not late.done() and not other.done(), "it has a free slot, and gives none to who came after one that starves"
    world.release(second)
    await world.pass_until(other.done)
    world.release(other.result())
    await world.pass_until(late.done)
    assert late.result()["pool_id"] == "a"


async def test_a_pool_that_was_kept_free_for_somebody_who_went_away_is_given_again(world: DemandWorld) -> None:
    held, starving = await world.have("a"), world.ask("b")
    await world.fakes.clock.advance(40)
    late = world.ask("a")
    await world.fakes.clock.advance(2)
    assert not late.done()
    starving.cancel()
    await world.pass_until(late.done, seconds=3)
    assert held["lease_id"] != late.result()["lease_id"]


async def test_nobody_waits_longer_than_they_said(world: DemandWorld) -> None:
    await world.have("a")
    waiter = world.ask("b", wait_ms=5_000)
    await world.fakes.clock.advance(6)
    with pytest.raises(RequestError, match="no slot of pool 'b' within 5 s: it was number 1") as refused:
        await waiter
    assert (refused.value.status, refused.value.code, refused.value.retriable) == (503, "QUEUE_TIMEOUT", True)
    assert world.demand.rows() == []


async def test_who_goes_away_does_not_wait_and_a_load_that_nobody_wants_is_given_up(world: DemandWorld) -> None:
    world.fakes.prober.result = type(world.fakes.prober.result)(
        world.fakes.prober.result.outcome.__class__("error"), "answered 503"
    )
    one, two = world.ask("a"), world.ask("a")
    await until(lambda: world.phase("a") is Phase.STARTING, "the engine to load")
    one.cancel()
    await settle()
    assert world.phase("a") is Phase.STARTING and len(world.demand.rows()) == 1
    two.cancel()
    await world.pass_until(lambda: world.phase("a") is Phase.DOWN)
    assert world.pools.get("a").state.desired is Desired.EVICTED and world.demand.rows() == []


async def test_a_load_that_somebody_else_has_asked_for_is_not_given_up(world: DemandWorld) -> None:
    world.fakes.prober.result = type(world.fakes.prober.result)(
        world.fakes.prober.result.outcome.__class__("error"), "answered 503"
    )
    await world.pools.change(world.pools.get("a"), "start", ev.Start(), "up", desired="up")
    waiter = world.ask("a")
    await until(lambda: world.phase("a") is Phase.STARTING, "the engine to load")
    waiter.cancel()
    await world.fakes.clock.advance(2)
    assert world.phase("a") is Phase.STARTING


async def test_a_model_that_does_not_load_tells_everybody_why(world: DemandWorld) -> None:
    world.fakes.launcher.refuse = EngineError("preload failed: cannot run /engine: no such file", hint="install it")
    waiters = [world.ask("a") for _ in range(3)]
    await world.pass_until(lambda: all(waiter.done() for waiter in waiters))
    for waiter in waiters:
        with pytest.raises(PoolError, match="cannot run /engine: no such file"):
            await waiter


async def test_what_a_person_stopped_drained_or_held_is_not_started(world: DemandWorld) -> None:
    await world.have("a")
    await world.pools.change(world.pools.get("a"), "stop", ev.Stop(), "down", desired="down")
    await world.pass_until(lambda: world.phase("a") is Phase.DOWN)
    with pytest.raises(RequestError, match="stopped by request") as refused:
        await world.have("a")
    assert (refused.value.status, refused.value.code) == (409, "POOL_STOPPED")
    await world.pools.change(world.pools.get("b"), "hold", ev.Hold(), "now", held=True)
    with pytest.raises(RequestError) as held:
        await world.have("b")
    assert held.value.code == "POOL_HELD"


async def test_what_is_pinned_stays_and_what_never_fits_is_refused() -> None:
    world = DemandWorld(pool={"pinned": True})
    world.release(await world.have("a"))
    with pytest.raises(PoolError, match="pool a 14 GiB") as refused:
        await world.have("b")
    assert refused.value.code == "INSUFFICIENT_VRAM" and world.ready() == ["a"]
    await world.end()
    world = DemandWorld(gib=30)
    with pytest.raises(PoolError, match="needs 30 GiB") as never:
        await world.have("a")
    assert never.value.code == "INSUFFICIENT_VRAM"
    await world.end()


async def test_foreign_memory_is_named_and_nothing_goes_in_vain(world: DemandWorld) -> None:
    world.release(await world.have("a"))
    world.foreign_gib = 6
    world.needs("b", 20)
    with pytest.raises(PoolError, match=r"pid 900 \(blender\) 6 GiB"):
        await world.have("b")
    assert world.ready() == ["a"]


async def test_a_higher_priority_goes_first(world: DemandWorld) -> None:
    held = [await world.have("a"), await world.have("a")]
    low, high = world.ask("a", priority=-1), world.ask("a", priority=5)
    await settle()
    assert [row["priority"] for row in world.demand.rows()] == [5, -1]
    world.release(held[0])
    await world.pass_until(high.done)
    assert not low.done()
    low.cancel()


async def test_names_lead_to_pools_and_unknown_ones_to_those_that_exist() -> None:
    world = DemandWorld(pool={"aliases": ["gpt"], "served_name": "small"})
    for name in ("b", "gpt", "small"):
        given = await world.have(name)
        assert given["pool_id"] == "b", "the one that is loaded"
        world.release(given)
    with pytest.raises(RequestError, match="model 'gpt-9' not found") as unknown:
        await world.demand.acquire(AcquireRequest("gpt-9"))
    assert unknown.value.status == 404 and "gpt" in (unknown.value.hint or "")
    await world.end()


async def test_of_pools_with_one_name_whichever_is_free_first_serves() -> None:
    world = DemandWorld(gib=7, pool={"aliases": ["any"]})
    held = [await world.have("any"), await world.have("any")]
    assert {one["pool_id"] for one in held} == {"a"}, "what is loaded comes first"
    waiter = world.ask("any")
    await world.pass_until(waiter.done)
    other = waiter.result()
    assert other["pool_id"] != "a" and len(world.ready()) == 2, "it fits, so it is started by who waits"
    last = await world.have("any")
    assert last["pool_id"] == other["pool_id"]
    waiter = world.ask("any")
    await world.fakes.clock.advance(0.5)
    world.release(held[0])
    await world.pass_until(waiter.done, 2)
    assert waiter.result()["pool_id"] == "a", "the one that became free, though it is not the first to start"
    await world.end()


async def test_no_pool_goes_for_another_one_of_the_same_name() -> None:
    world = DemandWorld(pool={"aliases": ["any"]})
    held = [await world.have("any"), await world.have("any")]
    waiter = world.ask("any", wait_ms=20_000)
    await world.fakes.clock.advance(15)
    assert not waiter.done() and world.ready() == ["a"]
    world.release(held[1])
    await world.pass_until(waiter.done, 2)
    assert waiter.result()["pool_id"] == "a"
    await world.end()


async def test_only_so_many_wait() -> None:
    world = DemandWorld(queue={"max_waiting_per_pool": 2})
    held = [await world.have("a"), await world.have("a")]
    waiters = [world.ask("a"), world.ask("a")]
    await settle()
    with pytest.raises(RequestError) as full:
        await world.demand.acquire(AcquireRequest("a"))
    assert full.value.status == 429 and held
    for waiter in waiters:
        waiter.cancel()
    await world.end()


async def test_an_idle_pool_is_stopped_after_its_time_and_one_in_use_is_not() -> None:
    world = DemandWorld(lifecycle={"idle_ttl_ms": 30_000})
    given = await world.have("a")
    await world.fakes.clock.advance(120)
    assert world.ready() == ["a"] and world.demand.idle.ms(world.pools.get("a")) is None
    world.release(given)
    await world.fakes.clock.advance(25)
    assert world.ready() == ["a"] and world.demand.idle.ms(world.pools.get("a")) == 25_000
    await world.pass_until(lambda: world.phase("a") is Phase.DOWN, seconds=10)
    assert world.pools.get("a").state.desired is Desired.EVICTED and world.demand.idle.ms(world.pools.get("a")) is None
    assert any(event.type == "evicted" and "idle for 30 s" in event.human for event in world.fakes.told)
    await world.end()


async def test_the_plan_says_what_would_go_and_touches_nothing(world: DemandWorld) -> None:
    assert (await world.demand.plan("a"))["would"] == "a request for pool 'a' would start it"
    world.release(await world.have("a"))
    plan = await world.demand.plan("b")
    assert [(row["pool_id"], row["action"]) for row in plan["stops"]] == [("a", "stop")] and "before that: stop (a)" in plan[
        "would"
    ]
    assert world.ready() == ["a"] and plan["refused"] is None
    await world.have("a")
    plan = await world.demand.plan("b")
    assert [(row["action"], row["in_flight"]) for row in plan["stops"]] == [("wait for its requests", 1)]
    assert (await world.demand.plan("a"))["would"] == "a request for pool 'a' would have a slot at once"
    world.foreign_gib = 6
    world.needs("b", 20)
    assert "blender" in str((await world.demand.plan("b"))["refused"])


async def test_a_ticket_can_be_cancelled_and_nonsense_is_refused(world: DemandWorld) -> None:
    await world.have("a")
    waiter = asyncio.create_task(world.demand.acquire(AcquireRequest("b"), "mine"))
    await settle()
    assert world.demand.find("mine") is not None
    world.demand.cancel("mine")
    with pytest.raises(RequestError, match="cancelled"):
        await waiter
    with pytest.raises(RequestError, match="does not wait"):
        world.demand.cancel("mine")
    with pytest.raises(SpecError):
        AcquireRequest("a", wait_ms=-1)
    with pytest.raises(SpecError):
        AcquireRequest("a", priority=101)
    with pytest.raises(SpecError, match="ttl_ms"):
        await world.demand.acquire(AcquireRequest("a", ttl_ms=0))


async def test_a_model_that_crashes_while_others_wait_for_a_slot_of_it_comes_back_for_them(world: DemandWorld) -> None:
    held = [await world.have("a"), await world.have("a")]
    waiter = world.ask("a")
    await settle()
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await world.pass_until(waiter.done)
    assert waiter.result()["lease_id"] not in {one["lease_id"] for one in held} and world.ready() == ["a"]


async def test_a_node_that_closes_leaves_nobody_waiting(world: DemandWorld) -> None:
    await world.have("a")
    waiter = world.ask("b")
    await settle()
    await world.demand.close()
    with pytest.raises(NodeError) as closing:
        await waiter
    assert closing.value.code == "NODE_UNAVAILABLE"
    with pytest.raises(NodeError, match="the node is not running"):
        await world.demand.acquire(AcquireRequest("a"))


async def test_a_pool_that_lacked_nothing_but_room_starts_as_soon_as_there_is_some(world: DemandWorld) -> None:
    given = await world.have("a")
    await world.pools.change(world.pools.get("b"), "start", ev.Start(), "up", desired="up")
    await until(lambda: world.pools.get("b").state.lacks_room, "b to wait for room")
    waiter = world.ask("b")
    await settle()
    world.release(given)
    before = world.fakes.clock.monotonic()
    await world.pass_until(waiter.done)
    due = world.pools.get("b").state.history.failures
    assert waiter.result()["pool_id"] == "b" and world.ready() == ["b"] and due
    assert world.fakes.clock.monotonic() - before < 1, "nobody waits for its next try"


async def test_nothing_goes_for_a_pool_that_must_wait_before_it_is_started_again(world: DemandWorld) -> None:
    await world.have("b")
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await until(lambda: world.pools.get("b").instance.phase is Phase.BACKOFF, "b to wait")
    assert world.demand._conditions.of_id("b").condition is Condition.LOADING
    plan = await world.demand.plan("b")
    assert plan["stops"] == []


async def test_an_evicted_pool_is_wanted_no_more_than_its_configuration_says(world: DemandWorld) -> None:
    await world.pools.change(world.pools.get("a"), "start", ev.Start(), "up", desired="up")
    await world.pass_until(lambda: world.ready() == ["a"])
    await world.have("b")
    stored = world.pools.intents.get("a")
    assert stored is not None and stored.desired == "auto", "the next daemon starts it on demand"
    stopping = world.pools.get("c")
    await world.pools.change(stopping, "stop", ev.Stop(), "down", desired="down")
    await world.pools.change(stopping, "evict", ev.Evict(), "down", desired="evicted")
    assert (kept := world.pools.intents.get("c")) is not None and kept.desired == "down", "what a person stopped stays down"


@pytest.mark.parametrize("seed", range(20))
async def test_whoever_asks_in_whatever_order_everybody_is_served(seed: int) -> None:
    """Three models of which one fits, callers that come, stay, go away and fail: nobody waits for ever, nothing is cut off."""
    chance = random.Random(seed)
    world = DemandWorld(queue={"starving_ms": 20_000, "residency_ms": chance.choice((0, 5_000))})
    served: dict[int, float] = {}

    async def caller(number: int, model: str, after_s: float, holds_s: float) -> None:
        clock = world.fakes.clock
        await pause(clock, after_s)
        asked = clock.monotonic()
        given = await world.demand.acquire(AcquireRequest(model, priority=chance.randint(-1, 1)))
        served[number] = clock.monotonic() - asked
        try:
            await pause(clock, holds_s)
            kept = [one.lease_id for one in world.fakes.registry.leases(model)]
            assert given["lease_id"] in kept, "its engine was not taken from it"
        finally:
            world.release(given)

    drawn = [(chance.choice("abc"), chance.uniform(0, 60), chance.choice((0.1, 1.0, 8.0))) for _ in range(30)]
    callers = [asyncio.create_task(caller(number, *how)) for number, how in enumerate(drawn)]
    leaves = chance.sample(callers, 4)
    for _ in range(2_400):
        await settle()
        if all(task.done() for task in callers):
            break
        assert len(world.ready()) <= 1
        await world.fakes.clock.advance(0.25)
        if leaves and chance.random() < 0.02:
            leaves.pop().cancel()
    assert all(task.done() for task in callers), world.demand.rows()
    assert [repr(task.exception()) for task in callers if not task.cancelled() and task.exception() is not None] == []
    assert max(served.values()) < 240 and world.demand.rows() == []
    await world.end()


async def test_who_waits_for_a_pool_that_is_kept_free_is_told_for_whom() -> None:
    world = DemandWorld()
    held, starving = await world.have("a"), world.ask("b")
    await world.fakes.clock.advance(40)
    late = world.ask("a", wait_ms=5_000)
    await settle()
    row = next(row for row in world.demand.rows() if row["pool_id"] == "a")
    assert row["waits_for"] == "pool 'b' to have its turn, which it is kept free for" and held
    would = (await world.demand.plan("a"))["would"]
    assert would == "a request for pool 'a' would wait for pool 'b' to have its turn, which it is kept free for"
    await world.fakes.clock.advance(6)
    with pytest.raises(RequestError, match="for pool 'b' to have its turn") as late_told:
        await late
    assert late_told.value.code == "QUEUE_TIMEOUT"
    starving.cancel()
    await world.end()


async def test_who_waits_for_a_slot_is_told_who_holds_them(world: DemandWorld) -> None:
    held = [await world.have("a", holder="bench"), await world.have("a")]
    waiter = world.ask("a", wait_ms=2_000)
    await settle()
    (row,) = world.demand.rows()
    assert row["waits_for"] == "a slot: 2 leases are held, by bench (1), others (1)"
    assert (await world.demand.plan("a"))["would"] == f"a request for pool 'a' would wait for {row['waits_for']}"
    await world.fakes.clock.advance(3)
    with pytest.raises(RequestError, match=r"for a slot: 2 leases are held, by bench \(1\), others \(1\)"):
        await waiter
    world.release(held[0])
    other = await world.have("a")
    waiter = world.ask("a")
    await settle()
    assert world.demand.rows()[0]["waits_for"] == "a slot: 2 leases are held, by callers that gave no name" and other
    waiter.cancel()


async def test_who_waits_during_a_reload_is_told_of_it(world: DemandWorld) -> None:
    first = await world.have("a")
    operation = await world.reloads.begin(ReloadRequest("a", changes={"slots": 3}, strategy="stop_start"))
    await world.pass_until(lambda: world.reloads.stage_of("a") == "draining")
    waiter = world.ask("a", wait_ms=1_000)
    await settle()
    assert world.demand.rows()[0]["waits_for"] == "its reload to end"
    assert (await world.demand.plan("a"))["would"] == "a request for pool 'a' would wait for its reload to end"
    with pytest.raises(RequestError, match="cannot lease pool a: it is being reloaded") as refused:
        world.leases.allocate(world.pools.get("a"), None, None)
    assert (refused.value.status, refused.value.code) == (409, "POOL_DRAINING") and "reload" in (refused.value.hint or "")
    await world.fakes.clock.advance(2)
    with pytest.raises(RequestError, match="for its reload to end"):
        await waiter
    world.release(first)
    await world.pass_until(lambda: operation.status != "running")


async def test_a_model_that_the_server_lacks_is_no_mistake_of_who_asks_for_it(
    world: DemandWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def missing(*_: Any) -> None:
        raise SpecError("cannot use model file:a.gguf: there is no such file", hint="put it there")

    monkeypatch.setattr(world.services.admission, "trial", missing)
    with pytest.raises(EngineError, match="there is no such file") as told:
        await world.have("a")
    assert (told.value.status, told.value.code, told.value.retriable) == (500, "PRELOAD_FAILED", False)
    assert told.value.hint == "put it there"
    plan = await world.demand.plan("a")
    assert plan["refused"] and plan["would"].startswith("a request for pool 'a' would be refused: cannot use model")


async def test_a_need_that_can_never_fit_is_not_tried_again() -> None:
    world = DemandWorld(gib=30)
    with pytest.raises(PoolError, match="when it is empty") as never:
        await world.have("a")
    assert never.value.retriable is False
    operation = await world.pools.change(world.pools.get("b"), "start", ev.Start(), "up", desired="up")
    with pytest.raises(PoolError, match="when it is empty") as asked:
        await operation.wait()
    assert asked.value.retriable is False and world.phase("b") is Phase.BACKOFF, "a GPU may come that has room"
    await world.end()


async def test_a_refusal_names_the_pools_that_a_person_keeps_there() -> None:
    world = DemandWorld(pool={"pinned": True})
    world.release(await world.have("a"))
    with pytest.raises(PoolError, match="pool 'a' does not go for it, as it is pinned") as refused:
        await world.have("b")
    assert refused.value.hint is not None and "`pool-managerd evict a`" in refused.value.hint
    await world.end()


@pytest.mark.parametrize("wrong", [{"model": 5}, {"wait_ms": "x"}, {"priority": "x"}, {"ttl_ms": True}, {"holder": 5}])
def test_what_is_asked_for_with_the_wrong_type_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=f"cannot ask with {next(iter(wrong))}"):
        AcquireRequest(**{"model": "a", **wrong})


async def test_somebody_elses_engine_is_not_evicted_and_one_that_is_let_go_is_attached_to_on_demand() -> None:
    world = DemandWorld(pool={"provisioning": {"mode": "external", "url": "http://127.0.0.1:9999"}})

    async def no_model(pool: PoolConfig | None, submitted: PreparedEngine | None) -> LaunchInputs:
        raise SpecError("cannot use the model: there is no such file")

    world.fakes.admission._sizer = no_model  # of an engine that somebody else runs, there is none here
    try:
        world.release(await world.have("a"))
        with pytest.raises(RequestError, match="somebody else runs its engine") as refused:
            await world.pools.change(world.pools.get("a"), "evict", ev.Evict(), "down", desired="evicted")
        assert refused.value.code == "EXTERNAL_ENGINE" and world.ready() == ["a"]
        world.release(await world.have("b"))
        assert world.fakes.launcher.processes == [] and (await world.demand.plan("c"))["refused"] is None
    finally:
        await world.end()


async def test_leases_that_routers_only_keep_are_asked_back_for_a_moment(world: DemandWorld) -> None:
    given, told = await world.have("a"), world.demand.routes.watch()
    assert (await anext(told))["waiting"] is False
    recall = asyncio.create_task(
        world.demand.routes.recall(lambda: not world.fakes.registry.get_active_leases("a"), world.fakes.clock)
    )
    assert (await anext(told))["waiting"] is True
    world.release(given)
    await world.pass_until(recall.done)
    assert world.demand.routes.now()["waiting"] is False
    await world.have("a")
    began = world.fakes.clock.monotonic()
    recall = asyncio.create_task(world.demand.routes.recall(lambda: False, world.fakes.clock))
    await world.pass_until(recall.done)
    assert world.fakes.clock.monotonic() - began <= 1, "who is in use does not hold it up"
