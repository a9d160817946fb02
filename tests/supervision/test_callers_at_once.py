"""Two callers at once: what one of them began, the others join; nobody is told that the other is in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError, RequestError, SpecError
from pool_managerd.supervision.operations import Operation
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import BAD, World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.pools.add("p", made.config.pools[0])
    made.fakes.launcher.ignores_term = True  # an engine ends when its test says so
    yield made
    await made.pools.close()


async def drain(world: World, deadline_ms: int = 60_000) -> Operation:
    return await world.pools.change(world.p, "drain", ev.Drain(deadline_ms, 0), "drained", desired="down")


async def ask(world: World, event: ev.Event, goal: str, desired: str | None = None) -> Operation:
    return await world.pools.change(world.p, type(event).__name__, event, goal, desired=desired)


async def test_many_starts_at_once_are_one_start_and_all_succeed(world: World) -> None:
    operations = await asyncio.gather(*(world.start() for _ in range(20)))
    outcomes = await asyncio.gather(*(operation.wait() for operation in operations))
    assert len(world.fakes.launcher.processes) == 1 and {outcome["pid"] for outcome in outcomes} == {4000}
    assert len({operation.operation_id for operation in operations}) == 20


async def test_a_start_of_a_ready_pool_is_done_at_once(world: World) -> None:
    await (await world.start()).wait()
    again = await world.start()
    assert again.status == "succeeded" and len(world.fakes.launcher.processes) == 1


async def test_all_who_joined_a_start_that_fails_are_told_why(world: World) -> None:
    world.fakes.models.refuse = PoolError("cannot read the model", code="MODEL_NOT_FOUND")
    operations = await asyncio.gather(*(world.start() for _ in range(3)))
    failures = await asyncio.gather(*(operation.wait() for operation in operations), return_exceptions=True)
    assert [str(failure) for failure in failures] == ["preload failed: cannot read the model"] * 3


async def test_a_start_that_comes_during_a_stop_is_carried_out_after_it(world: World) -> None:
    await (await world.start()).wait()
    stop = await ask(world, ev.Stop(), "down", "down")
    start = await world.start()
    await settle()
    assert stop.status == "running" and start.status == "running"
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    await settle()
    assert stop.status == "succeeded" and start.status == "succeeded" and view(world.p.state).ready
    assert world.store.pools["p"].desired == "up"


async def test_a_stop_that_overtakes_a_restart_cancels_it(world: World) -> None:
    await (await world.start()).wait()
    restart = await ask(world, ev.Restart(), "up", "up")
    stop = await ask(world, ev.Stop(), "down", "down")
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    await settle()
    assert stop.status == "succeeded" and restart.status == "failed" and len(world.fakes.launcher.processes) == 1
    with pytest.raises(PoolError) as told:
        await restart.wait()
    assert told.value.code == "OPERATION_CANCELLED"


async def test_restarts_at_once_are_one_restart(world: World) -> None:
    await (await world.start()).wait()
    restarts = await asyncio.gather(*(ask(world, ev.Restart(), "up", "up") for _ in range(3)))
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    await settle()
    assert [r.status for r in restarts] == ["succeeded"] * 3 and len(world.fakes.launcher.processes) == 2


async def test_drains_at_once_have_one_end_and_one_outcome(world: World) -> None:
    await (await world.start()).wait()
    lease = world.fakes.registry.grant("p")
    drains = await asyncio.gather(*(drain(world) for _ in range(3)))
    world.fakes.registry.release("p", lease.lease_id)
    world.pools.leases_changed("p")
    await settle()
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    outcomes = await asyncio.gather(*(operation.wait() for operation in drains))
    assert outcomes[0]["force_stopped"] is False and outcomes[0] == outcomes[1] == outcomes[2]


async def test_a_drain_that_a_start_follows_at_once_still_tells_its_outcome(world: World) -> None:
    await (await world.start()).wait()
    drained = await drain(world)
    await settle()
    started = await world.start()
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    await settle()
    assert (await drained.wait())["final_lease_count"] == 0 and started.status == "succeeded"


async def test_an_undrain_of_a_pool_that_serves_is_done_already(world: World) -> None:
    await (await world.start()).wait()
    assert (await ask(world, ev.Undrain(), "now", "up")).status == "succeeded"


async def test_an_undrain_that_comes_too_late_says_what_to_do(world: World) -> None:
    await (await world.start()).wait()
    await drain(world)
    await settle()
    world.fakes.launcher.processes[0].end(ExitRecord(code=0, stopped_by_us=True))
    await settle()
    with pytest.raises(PoolError, match="its engine is down; start it instead"):
        await ask(world, ev.Undrain(), "now", "up")
    assert world.store.pools["p"].desired == "down"


async def test_two_callers_may_forget_a_pool(world: World) -> None:
    await world.pools.register("q")
    pool = world.pools.get("q")
    assert sorted(await asyncio.gather(world.pools.remove(pool), world.pools.remove(pool))) == [False, True]
    assert world.pools.find("q") is None and "q" not in world.store.pools


async def test_demand_joins_what_a_person_wants_up_and_leaves_it_wanted(world: World) -> None:
    await (await world.start()).wait()
    world.fakes.launcher.processes[0].end(ExitRecord(signal=9))
    await settle()
    demand = await ask(world, ev.Start(origin="demand"), "up", "auto")
    assert demand.status == "running" and len(world.fakes.launcher.processes) == 1, "it waits for the restart that is due"
    await world.fakes.clock.advance(5)
    assert demand.status == "succeeded" and world.store.pools["p"].desired == "up"


async def test_a_caller_that_goes_away_while_its_change_is_stored_leaves_no_half_of_it(world: World) -> None:
    stored, go_on = asyncio.Event(), asyncio.Event()
    put = world.store.put_pool

    async def slowly(pool: object) -> None:
        stored.set()
        await go_on.wait()
        await put(pool)  # type: ignore[arg-type]

    world.store.put_pool = slowly  # type: ignore[method-assign]
    caller = asyncio.create_task(world.start())
    await stored.wait()
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    go_on.set()
    await settle()
    assert world.store.pools["p"].desired == "up" and view(world.p.state).ready


async def submitted(world: World) -> Operation:
    """A preload of an engine that is not healthy yet."""
    pool, engine = world.pools.add("q"), PreparedEngine("q", "/engine", port=8080, verbatim=True)
    world.fakes.prober.result = BAD
    preload = await world.pools.change(pool, "preload", ev.Start(join=False, retry=False), "up", desired="up", engine=engine)
    await settle()
    return preload


async def test_a_hold_that_is_stored_while_a_preload_fails_does_not_make_its_pool_wanted_again(world: World) -> None:
    preload = await submitted(world)
    put, go_on = world.store.put_pool, asyncio.Event()

    async def slowly(pool: StoredPool) -> None:
        await put(pool)
        await go_on.wait()

    world.store.put_pool = slowly  # type: ignore[method-assign]
    q = world.pools.get("q")
    hold = asyncio.create_task(world.pools.change(q, "hold", ev.Hold(), "now", held=True))
    await settle()
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    assert preload.status == "failed" and world.store.pools["q"].desired == "down"
    go_on.set()
    await hold
    assert world.store.pools["q"].held
    await world.pools.change(q, "release", ev.Release(), "now", held=False)
    assert world.store.pools["q"].desired == "down" and not world.store.pools["q"].held


async def test_the_failure_of_an_earlier_preload_does_not_undo_a_start_that_is_tried_again(world: World) -> None:
    preload = await submitted(world)
    q = world.pools.get("q")
    await world.pools.change(q, "stop", ev.Stop(), "down", desired="down")
    await world.pools.change(q, "start", ev.Start(), "up", desired="up")
    for process in (0, 1):
        world.fakes.launcher.processes[process].end(ExitRecord(code=1, stopped_by_us=process == 0))
        await settle()
    assert preload.status == "failed" and q.instance.phase is Phase.BACKOFF
    assert world.store.pools["q"].desired == "up"


async def test_a_pool_that_is_made_while_its_namesake_is_forgotten_is_made_when_that_is_gone(world: World) -> None:
    """What is cleared away by its name must not be the new one's: registry entry, port, files, secrets."""
    await world.pools.register("q")
    forget, going_on, may_end = world.fakes.launcher.forget, asyncio.Event(), asyncio.Event()

    async def slowly(pool_id: str) -> None:
        going_on.set()
        await may_end.wait()
        await forget(pool_id)

    world.fakes.launcher.forget = slowly  # type: ignore[method-assign]
    removing = asyncio.create_task(world.pools.deregister("q"))
    await going_on.wait()
    engine = PreparedEngine("q", "/engine", ("--api-key", "Zq7SECRETzz991"), port=8080, verbatim=True)
    registering, submitting = asyncio.create_task(world.pools.register("q")), asyncio.create_task(world.pools.submit("q", engine))
    await settle()
    assert world.pools.find("q") is None and not registering.done() and not submitting.done()
    with pytest.raises(RequestError, match="just being forgotten"):
        world.pools.add("q")
    may_end.set()
    assert await removing and await registering
    await (await submitting).wait()
    pool = world.pools.get("q")
    assert view(pool.state).ready and world.fakes.registry.get("q") is not None
    assert world.fakes.events.clean("it printed Zq7SECRETzz991") == "it printed ***"


async def test_register_and_forget_at_once_end_in_one_or_the_other(world: World) -> None:
    for _ in range(50):
        calls = [world.pools.deregister("q"), *(world.pools.register("q") for _ in range(3)), world.pools.deregister("q")]
        await asyncio.gather(*calls, return_exceptions=True)
        assert (world.pools.find("q") is None) is (world.fakes.registry.get("q") is None)


async def test_a_stop_of_what_is_down_says_that_nothing_was_to_stop(world: World) -> None:
    for event, desired in ((ev.Evict(), None), (ev.Stop(), "down")):
        assert (await (await ask(world, event, "down", desired)).wait())["unchanged"] is True
    await (await world.start()).wait()
    stop = await ask(world, ev.Stop(), "down", "down")
    world.fakes.launcher.processes[0].end(ExitRecord(code=0))
    assert "unchanged" not in await stop.wait()


async def test_to_evict_what_could_not_start_is_no_failure(world: World) -> None:
    world.fakes.models.refuse = SpecError("cannot read the model")
    with pytest.raises(PoolError):
        await (await world.start()).wait()
    assert world.p.instance.phase is Phase.FAILED
    assert (await (await ask(world, ev.Evict(), "down")).wait())["unchanged"] is True
