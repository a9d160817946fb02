"""Reloads with both engines side by side, on fake parts and a manual clock: who serves when, and what is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import Diagnosis
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.reload import ReloadRequest, Stage
from pool_managerd.errors import EngineError, NodeError, RequestError
from pool_managerd.supervision.failures import operation_error
from pool_managerd.supervision.launch import Launch
from pool_managerd.supervision.leases import Leases
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.shutdown import stop_all
from pool_managerd.testing.fake_parts import FakeProcess
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World
from tests.supervision.test_reload import RULES, baked, error_of, fact, slots, until

R0, R1 = InstanceId("p"), InstanceId("p", "r1")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(reload=RULES)
    known(made)
    await made.up()
    yield made
    await made.reloads.close()
    await made.pools.close()


class Keeper:
    async def kept(self) -> None:
        """At once."""


def known(world: World, weights_bytes: int = 1 << 30) -> None:
    """How much its engines need, so that it can be said whether two fit."""
    world.fakes.needs["p"] = LaunchInputs("fake-1", "p", EngineSettings(), weights_bytes=weights_bytes)


async def reload(world: World, stage: Stage = Stage.GATING, **asked: Any) -> Operation:
    """Begun; it has come to ``stage``, or has ended."""
    operation = await world.reloads.begin(ReloadRequest("p", **(asked or {"changes": {"slots": 3}})))
    await until(lambda: world.reloads.stage_of("p") in (None, stage.value), f"the reload to be {stage}")
    return operation


async def done(world: World, **asked: Any) -> dict[str, Any]:
    operation = await reload(world, **asked)
    await baked(world)
    return await operation.wait()


def processes(world: World) -> list[FakeProcess]:
    return world.fakes.launcher.processes


def lease(world: World, ttl_s: float | None = None) -> str:
    expires_at = None if ttl_s is None else world.fakes.clock.monotonic() + ttl_s
    given = world.fakes.registry.grant("p", expires_at=expires_at)
    world.pools.leases_changed("p", expiry=True)
    return given.lease_id


async def give_back(world: World, lease_id: str) -> None:
    world.fakes.registry.release("p", lease_id)
    world.pools.leases_changed("p")
    await settle()


async def test_the_new_engine_has_the_place_of_the_old_one_in_one_step_and_the_old_one_keeps_its_leases(world: World) -> None:
    registry, first, before = world.fakes.registry, lease(world), world.p
    operation = await reload(world)
    entry = registry.get("p")
    assert entry is not None and (entry.ready, entry.slots_total, entry.replica_id, entry.active_leases) == (True, 2, "r0", 1)
    assert set(world.fakes.files.handoffs) == {R0}, "a candidate is nobody's yet"
    lease(world)
    with pytest.raises(RequestError, match="slots are in use"):
        registry.grant("p")
    await baked(world)
    outcome = await operation.wait()
    assert (outcome["strategy"], outcome["downtime_ms"], outcome["rolled_back"]) == ("blue_green", 0, False)
    entry = registry.get("p")
    assert entry is not None and (entry.ready, entry.slots_total, entry.replica_id, entry.active_leases) == (True, 3, "r1", 2)
    assert registry.leases_on("p", 1) == 2 and not processes(world)[0].signals, "requests go on"
    assert world.p is not before and before.latest() is world.p and world.p.state.desired is Desired.WANTED
    lease(world)
    await give_back(world, first)
    assert set(world.fakes.files.handoffs) == {R1} and set(world.fakes.files.pids) == {R0, R1}, "nobody is led to the old one"
    other = world.pools.replacements.find("p")
    assert other is before and other.instance.phase is Phase.DRAINING and registry.get_active_leases("p") == 2
    await give_back(world, registry.leases("p")[0].lease_id)
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    assert view(world.p.state).ready and registry.get_active_leases("p") == 1
    assert set(world.fakes.files.pids) == {R1} == set(world.fakes.files.handoffs)
    assert fact(world)["changes"] == {"slots": 3} and world.p.state.restart_count == 0


async def test_nobody_is_refused_a_lease_at_any_moment(world: World) -> None:
    refused: list[Exception] = []

    def take(_: Any) -> None:
        try:
            given = world.fakes.registry.grant("p")
        except RequestError as problem:
            refused.append(problem)
        else:
            world.fakes.registry.release("p", given.lease_id)

    world.fakes.events.listen(take)
    assert (await done(world))["strategy"] == "blue_green"
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    assert refused == [] and len(processes(world)) == 2


async def test_a_request_that_is_sent_again_has_its_lease_on_the_engine_that_it_was_given_on(world: World) -> None:
    leases = Leases(world.pools, world.fakes.registry, world.fakes.clock, Keeper())
    first = leases.allocate(world.p, None, None, "mine")
    await done(world)
    assert leases.allocate(world.p, None, None, "mine") == first and first["url"].endswith(":8080")
    assert leases.allocate(world.p, None, None, "yours")["url"].endswith(":8081")


async def test_what_it_runs_next_is_the_other_replica_again_and_no_epoch_is_used_twice(world: World) -> None:
    for expected in (R1, R0, R1):
        await done(world, changes={"ctx": 512 + len(processes(world))})
        await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
        assert world.p.instance_id == expected
    epochs = [process.epoch for process in processes(world)]
    assert epochs == sorted(set(epochs))
    processes(world)[-1].end(ExitRecord(code=1))
    await settle()
    await world.fakes.clock.advance(2)
    assert view(world.p.state).ready and world.p.instance_id == R1 and world.p.instance.epoch > epochs[-1]
    assert world.p.state.restart_count == 1, "it is supervised as any other"


@pytest.mark.parametrize("how", ["cannot run", "crashes", "answers wrongly"])
async def test_a_candidate_that_does_not_pass_goes_and_the_old_engine_has_never_stopped(world: World, how: str) -> None:
    taken, pid = lease(world), processes(world)[0].pid
    if how == "cannot run":
        world.fakes.launcher.refusals.append(EngineError("preload failed: cannot run /engine: no such file"))
    elif how == "answers wrongly":
        world.fakes.prober.says = "five"
    operation = await reload(world)
    if how == "crashes":
        processes(world)[1].end(ExitRecord(signal=11))
        await settle()
    await baked(world)
    error = error_of(operation)
    assert error.message.endswith("what ran before has served all along") and error.details["rolled_back"] is True
    entry = world.fakes.registry.get("p")
    assert entry is not None and entry.ready and slots(world) == 2 and world.p.instance_id == R0
    assert world.p.launch.process is not None and world.p.launch.process.pid == pid and not processes(world)[0].signals
    assert [kept.lease_id for kept in world.fakes.registry.leases("p")] == [taken]
    assert world.pools.replacements.find("p") is None and fact(world) == {}
    assert world.p.state.crash_count == 0 and set(world.fakes.files.pids) == {R0}


async def test_a_crash_of_a_candidate_is_no_crash_of_the_pool(world: World) -> None:
    operation = await reload(world)
    processes(world)[1].end(ExitRecord(code=1))
    await settle()
    await baked(world)
    error = error_of(operation)
    assert "`pool-managerd logs p --replica r1`" in (error.hint or "")
    early = operation_error("p", "exit_code=1", Launch(diagnosis=Diagnosis(CrashClass.PROCESS_EXIT, "exit_code=1")), "r1")
    assert "`pool-managerd logs p --replica r1`" in (early.hint or ""), "before it was ready, too"
    (report,) = world.fakes.crashes.recent("p")
    assert report.candidate and report.human.startswith("Candidate r1 of a reload: ")
    assert report.action == "none: it was tried by a reload, which is undone; what ran before goes on"
    assert "logs p --replica r1" in report.remedy.sentence and world.fakes.crashes.last("p") is None


async def test_leases_on_the_old_engine_have_until_the_deadline(world: World) -> None:
    lease(world)
    await done(world, changes={"slots": 3}, drain_deadline_ms=60_000)
    lease(world)
    kept = world.fakes.records.facts("retiring")["p"]
    left_s = kept["deadline"] - world.fakes.clock.monotonic()
    assert kept["epoch"] == 1 and 55 < left_s < 61, "it holds under the next daemon, too"
    await world.fakes.clock.advance(59)
    assert world.pools.replacements.find("p") is not None and world.fakes.registry.get_active_leases("p") == 2
    await world.fakes.clock.advance(2)
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    assert world.fakes.registry.get_active_leases("p") == 1 and view(world.p.state).ready
    assert world.fakes.records.facts("retiring") == {}


async def test_a_lease_that_runs_out_is_one_that_has_ended(world: World) -> None:
    lease(world, ttl_s=20)
    await done(world)
    lease(world, ttl_s=500)
    await world.fakes.clock.advance(21)
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    assert world.fakes.registry.get_active_leases("p") == 1


@pytest.mark.parametrize("stage", [Stage.GATING, None])
async def test_a_stop_stops_both(world: World, stage: Stage | None) -> None:
    lease(world)
    operation = await reload(world)
    if stage is None:
        await baked(world)
        assert operation.status == "succeeded" and world.pools.replacements.find("p") is not None
    stopping = await world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down")
    await settle()
    await stopping.wait()
    await until(lambda: world.pools.replacements.find("p") is None, "both engines to be gone")
    assert not view(world.p.state).live and all(process.signals for process in processes(world))
    assert slots(world) == (2 if stage else 3) and world.fakes.registry.get_active_leases("p") == 0


async def test_while_the_old_engine_drains_all_else_is_as_ever_but_no_reload_nor_forgetting(
    world: World,
) -> None:
    lease(world)
    await done(world)
    with pytest.raises(RequestError, match=r"has not ended yet \(one lease in flight\)") as refused:
        await reload(world, changes={"slots": 4})
    assert refused.value.retriable
    with pytest.raises(RequestError, match="it is being reloaded"):
        await world.pools.remove(world.p)
    await (await world.pools.change(world.p, "hold", ev.Hold(), "now", held=True)).wait()
    assert world.p.state.held


async def test_an_old_engine_that_crashes_meanwhile_comes_back_and_is_replaced_all_the_same(world: World) -> None:
    operation = await reload(world)
    processes(world)[0].end(ExitRecord(code=1))
    await settle()
    assert view(world.p.state).state == "backoff"
    await baked(world)
    assert operation.status == "succeeded" and view(world.p.state).ready and world.p.instance_id == R1
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    epochs = [process.epoch for process in processes(world)]
    assert len(set(epochs)) == len(epochs) and world.p.state.crash_count == 1
    processes(world)[-1].end(ExitRecord(code=1))
    processes(world)[1].end(ExitRecord(code=1))
    await settle()
    await world.fakes.clock.advance(3)
    assert processes(world)[-1].epoch > max(epochs) and view(world.p.state).ready


async def test_a_candidate_that_has_to_look_for_another_port_uses_no_epoch_of_the_pool(world: World) -> None:
    """Found by the simulator."""
    operation = await world.reloads.begin(ReloadRequest("p", changes={"slots": 3}))
    await until(lambda: len(processes(world)) == 2, "the candidate to run")
    processes(world)[1].end(ExitRecord(code=1))
    await baked(world)
    assert operation.status == "failed"
    processes(world)[0].end(ExitRecord(code=1))
    await settle()
    await world.fakes.clock.advance(3)
    epochs = [process.epoch for process in processes(world)]
    assert len(set(epochs)) == len(epochs) and epochs[-1] == 1 + 4 + 1, "one launch and three for want of a port"


async def test_a_caller_that_waited_for_the_reload_meets_the_new_engine(world: World) -> None:
    await reload(world)
    started = asyncio.create_task(world.start())
    await settle()
    await baked(world)
    assert (await (await started).wait())["pid"] == processes(world)[1].pid


async def test_the_plan_says_how_it_would_be_done_and_why(world: World) -> None:
    plan = await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}))
    assert (plan["strategy"], plan["why"], plan["forecast_downtime_ms"]) == ("blue_green", "there is room for both engines", 0)
    plan = await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}, strategy="stop_start"))
    assert (plan["strategy"], plan["why"]) == ("stop_start", "as asked for")
    known(world, weights_bytes=1 << 45)
    with pytest.raises(NodeError, match="RAM"):
        await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}))


@pytest.mark.parametrize(
    ("weights_bytes", "changes", "why"),
    [
        (1 << 45, {"slots": 3}, "RAM"),
        (0, {"slots": 3}, "the size of its model is not known"),
        (1 << 30, {"provisioning": {"ports": [8080]}}, "both would have to be at port 8080"),
    ],
)
async def test_side_by_side_is_not_tried_where_it_cannot_be(
    world: World, weights_bytes: int, changes: dict[str, Any], why: str
) -> None:
    known(world, weights_bytes)
    strategy, told = await world.reloads._strategies.choose(
        request := ReloadRequest("p", changes=changes), world.reloads._targets.of(request)
    )
    assert strategy == "stop_start" and why in told
    asked = ReloadRequest("p", changes=changes, strategy="blue_green")
    with pytest.raises(RequestError, match="side by side") as refused:
        await world.reloads._strategies.choose(asked, world.reloads._targets.of(asked))
    assert why in refused.value.message


async def test_a_submitted_engine_keeps_the_name_of_its_replica(world: World) -> None:
    await world.pools.submit("q", PreparedEngine("q", "/engine", port=9001, slots_total=1))
    await settle()
    world.fakes.needs["q"] = LaunchInputs("fake-1", "q", EngineSettings(), weights_bytes=1 << 20)
    new = PreparedEngine("q", "/engine", port=9002, slots_total=4)
    operation = await world.reloads.begin(ReloadRequest("q", engine=new))
    await until(lambda: world.reloads.stage_of("q") == "gating", "the candidate")
    while world.reloads.has("q"):
        await world.fakes.clock.advance(0.5)
        await settle()
    outcome = await operation.wait()
    pool = world.pools.get("q")
    assert outcome["strategy"] == "blue_green" and pool.instance_id == InstanceId("q", "r1") and pool.submitted is not None
    assert pool.submitted.replica_id == "r1" and world.store.pools["q"].submitted == {"binary_path": "/engine", "port": 9002}


async def test_a_daemon_that_ends_stops_both(world: World) -> None:
    lease(world)
    await done(world)
    closing = asyncio.create_task(stop_all(world.pools, world.services, 1_000))
    for _ in range(20):
        await settle()
        await world.fakes.clock.advance(0.5)
    await closing
    assert all(process.signals for process in processes(world)) and world.fakes.files.pids == {}
