"""Reloads on fake parts and a manual clock: what is seen meanwhile, how they end, and what is undone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord, PreparedEngine
from pool_managerd.core.health import Counters
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Desired, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.reload import ReloadRequest, Stage
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.overrides import OVERRIDE
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

RULES = {"smoke_prompt": "2 + 2?", "smoke_expect": "four", "bake_ms": 2_000}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World(reload=RULES)
    await made.up()
    yield made
    await made.reloads.close()
    await made.pools.close()


async def until(condition: Callable[[], object], what: str) -> None:
    """What is looked at on disk is looked at in a thread, which no turn of the loop waits for."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        await asyncio.sleep(0.001)
    await settle()


async def reload(world: World, **asked: Any) -> Operation:
    """Begun; it has ended, or waits for the clock or for leases."""
    operation = await world.reloads.begin(ReloadRequest("p", **(asked or {"changes": {"slots": 3}})))
    stages = (Stage.DRAINING, Stage.GATING)

    def waits() -> bool:
        running = world.reloads._running.get("p")
        return running is None or running.stage in stages

    await until(waits, "the reload to wait or end")
    return operation


async def baked(world: World) -> None:
    """The time for which it is tried is over."""
    deadline = time.monotonic() + 10
    while world.reloads._running:
        assert time.monotonic() < deadline, "the reload does not end"
        await world.fakes.clock.advance(0.5)
        await asyncio.sleep(0.001)
    await settle()


def slots(world: World) -> int | None:
    """Of the engine that was launched last."""
    entry = world.fakes.registry.get("p")
    assert entry is not None
    return entry.slots_total


def error_of(operation: Operation) -> PoolError:
    assert operation.status == "failed" and operation.error is not None
    assert operation.error.message.startswith("reload failed")
    return operation.error


def fact(world: World) -> dict[str, Any]:
    """What is kept for the next daemon, but for which operation was the last."""
    kept = world.fakes.records.facts(OVERRIDE).get("p", {})
    return {key: value for key, value in kept.items() if key != "operation"}


async def test_a_pool_runs_what_it_was_reloaded_with_and_so_does_the_next_daemons(world: World) -> None:
    epoch = world.p.instance.epoch
    operation = await reload(world)
    assert operation.status == "running" and view(world.p.state).ready, "it is tried for a while"
    assert fact(world)["pending"]["epoch"] == epoch, "until then the next daemon undoes it"
    await baked(world)
    outcome = await operation.wait()
    assert {k: outcome[k] for k in ("pool_id", "strategy", "engine_version", "rolled_back")} == {
        "pool_id": "p", "strategy": "stop_start", "engine_version": "fake-1", "rolled_back": False,
    }  # fmt: skip
    assert slots(world) == 3 and world.p.config is not None and world.p.config.slots == 3 and "pending" not in fact(world)
    assert world.store.pools["p"].desired == "up" and world.p.state.restart_count == 0
    again = await reload(world, changes={"ctx": 512})
    await baked(world)
    assert (await again.wait())["rolled_back"] is False and fact(world)["changes"] == {"slots": 3, "ctx": 512}

    following = World(reload=RULES)
    following.fakes.records.known.update(world.fakes.records.known)
    await following.pools.restore({})
    assert following.p.config is not None and (following.p.config.slots, following.p.config.ctx) == (3, 512)
    await following.pools.close()
    edited = World(reload=RULES, pool={"slots": 5})
    edited.fakes.records.known.update(world.fakes.records.known)
    await edited.pools.restore({})
    assert edited.p.config is not None and edited.p.config.slots == 5, "the file has the last word"
    assert "not in force any more" in edited.fakes.told[-1].human
    await edited.pools.close()


async def test_what_is_the_same_already_is_a_success_that_touches_nothing(world: World) -> None:
    outcome = await (await reload(world, new_model_ref="file:m.gguf")).wait()
    assert (outcome["downtime_ms"], len(world.fakes.launcher.processes), outcome["unchanged"]) == (0, 1, True)
    assert world.fakes.told[-1].human == "Nothing was to change: pool 'p' runs that already"


async def test_leases_are_waited_for_and_no_new_ones_given(world: World) -> None:
    world.fakes.registry.allocate_lease("p")
    operation = await reload(world)
    await until(lambda: view(world.p.state).draining, "the drain")
    assert not world.fakes.launcher.processes[0].signals
    world.fakes.registry.release_lease("p")
    world.pools.leases_changed("p")
    await settle()
    await baked(world)
    assert (await operation.wait())["rolled_back"] is False and slots(world) == 3


async def test_leases_that_are_not_back_in_time_end_the_reload_and_nothing_else(world: World) -> None:
    world.fakes.registry.allocate_lease("p")
    operation = await reload(world, changes={"slots": 3}, drain_deadline_ms=1_000)
    await until(lambda: view(world.p.state).draining, "the drain")
    await world.fakes.clock.advance(1.1)
    await settle()
    error = error_of(operation)
    assert "drain timeout: 1 requests" in error.message and error.code == "DRAIN_TIMEOUT" and error.details["rolled_back"]
    assert view(world.p.state).ready and len(world.fakes.launcher.processes) == 1 and slots(world) == 2
    assert world.fakes.registry.get_active_leases("p") == 1 and fact(world) == {} and world.p.state.desired is Desired.WANTED
    assert world.fakes.types().count("reload_failed") == 1 and world.fakes.told[-1].fields["reason"] == "drain_timeout"


@pytest.mark.parametrize(
    ("prober", "why"),
    [
        ({"says": "five"}, "lacks 'four'"),
        ({"says": " "}, "is empty"),
    ],
)
async def test_an_engine_that_does_not_pass_makes_room_for_the_one_before_it(
    world: World, prober: dict[str, Any], why: str
) -> None:
    for name, value in prober.items():
        setattr(world.fakes.prober, name, value)
    operation = await reload(world)
    await baked(world)
    error = error_of(operation)
    assert why in error.message and error.message.endswith("what ran before runs again") and error.code == "GATE_FAILED"
    assert error.details["rolled_back"] is True and error.details["evidence"]["stage"] == "gating"
    assert view(world.p.state).ready and slots(world) == 2 and len(world.fakes.launcher.processes) == 3
    assert world.p.config is not None and world.p.config.slots == 2 and fact(world) == {}


@pytest.mark.parametrize(
    ("rates", "stays"), [((30.0,), False), ((50.0, 10.0, 10.0, 48.0), True), ((50.0, 10.0, 10.0, 10.0), False)]
)
async def test_a_slower_engine_does_not_stay_unless_it_was_slow_for_a_moment(
    world: World, rates: tuple[float, ...], stays: bool
) -> None:
    """``rates`` are what the new one makes: in its warm-up, then each time it is measured, the last one for ever."""
    left = list(rates)

    async def warm_up(*_: Any) -> tuple[float, float]:
        new = len(world.fakes.launcher.processes) == 2
        return 20.0, (left.pop(0) if len(left) > 1 else left[0]) if new else 50.0

    world.fakes.prober.warm_up = warm_up  # type: ignore[method-assign,assignment]
    operation = await reload(world)
    await baked(world)
    assert (operation.status == "succeeded") is stays
    assert stays or "tokens/s where 50.0 were measured before" in error_of(operation).message
    assert slots(world) == (3 if stays else 2)


async def test_a_pool_has_its_own_rules_where_it_says_so_and_a_reload_may_change_them() -> None:
    made = World(reload=RULES, pool={"reload": {"smoke_prompt": "2 + 2 in digits?", "smoke_expect": "4", "bake_ms": 9_000}})
    await made.up()
    plan = await made.reloads.plan(ReloadRequest("p", changes={"slots": 3, "reload": {"bake_ms": 7_000}}))
    assert "stay ready for 7 s" in plan["steps"][-1]
    asked: list[str] = []

    async def complete(engine: Any, prompt: str, timeout_s: float) -> str:
        asked.append(prompt)
        return "four"

    made.fakes.prober.complete = complete  # type: ignore[method-assign]
    operation = await reload(made)
    await baked(made)
    assert "lacks '4': 'four'" in error_of(operation).message and asked == ["2 + 2 in digits?"]
    operation = await reload(made, changes={"slots": 3, "reload": {"smoke_expect": "FOUR"}})
    await baked(made)
    assert operation.status == "succeeded" and slots(made) == 3
    await made.reloads.close()
    await made.pools.close()


async def test_an_engine_that_crashes_while_it_is_tried_is_replaced_by_the_one_before_it(world: World) -> None:
    operation = await reload(world)
    world.fakes.launcher.processes[1].end(ExitRecord(signal=11))
    await settle()
    await baked(world)
    error = error_of(operation)
    assert "did not stay ready for 2 s" in error.message and view(world.p.state).ready and slots(world) == 2


async def test_an_engine_that_cannot_start_is_replaced_by_the_one_before_it(world: World) -> None:
    world.fakes.launcher.refusals.append(EngineError("preload failed: cannot run /engine: no such file"))
    operation = await reload(world)
    await baked(world)
    error = error_of(operation)
    assert "cannot run /engine" in error.message and error.details["rolled_back"] and view(world.p.state).ready
    assert slots(world) == 2


async def test_when_the_one_before_it_cannot_start_either_both_are_told(world: World) -> None:
    world.fakes.launcher.refusals += [EngineError("preload failed: new one"), EngineError("preload failed: old one")]
    operation = await reload(world)
    await until(lambda: operation.status != "running", "the end")
    error = error_of(operation)
    assert "new one" in error.message and "old one" in error.message and error.details["rolled_back"] is False
    assert view(world.p.state).state == "backoff" and world.fakes.told[-1].fields["reason"] == "rollback_failed"
    await world.fakes.clock.advance(6)
    await settle()
    assert view(world.p.state).ready and slots(world) == 2, "it is tried again as after any failure"


async def test_what_is_known_to_be_in_the_way_is_found_while_the_engine_serves(world: World) -> None:
    world.fakes.engines.found = (SpecError("unknown flag '--ctx-siz'"), SpecError("no such model"))
    operation = await reload(world)
    assert "'--ctx-siz'; no such model" in error_of(operation).message
    assert view(world.p.state).ready and len(world.fakes.launcher.processes) == 1 and fact(world) == {}


async def test_a_pool_that_is_down_comes_up_as_it_was_reloaded_or_stays_down(world: World) -> None:
    await (await world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down")).wait()
    world.fakes.launcher.refusals.append(EngineError("preload failed: no"))
    failed = await reload(world)
    await baked(world)
    assert "the pool stays down, as it was" in error_of(failed).message and not view(world.p.state).live
    operation = await reload(world)
    await baked(world)
    assert (await operation.wait())["downtime_ms"] == 0 and slots(world) == 3 and world.store.pools["p"].desired == "up"


async def test_meanwhile_a_start_waits_a_stop_gives_it_up_and_everything_else_is_refused(world: World) -> None:
    operation = await reload(world)
    started = await world.start()
    await settle()
    assert started.status == "running", "it is accepted at once"
    for event in (ev.Drain(0, 0), ev.Restart(), ev.Start(join=False)):
        with pytest.raises(RequestError, match="is being reloaded") as refused:
            await world.pools.change(world.p, "x", event, "down")
        assert refused.value.code == "OPERATION_IN_PROGRESS" and refused.value.retriable
    with pytest.raises(RequestError, match="is being reloaded already"):
        await reload(world)
    stop = await world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down")
    await settle()
    await stop.wait()
    assert "stopped by request" in error_of(operation).message and not view(world.p.state).live
    assert world.p.config is not None and world.p.config.slots == 2 and fact(world) == {}
    await until(lambda: started.status != "running", "the start to be over, one way or the other")
    await settle()
    assert world.p.state.desired is Desired.STOPPED and not view(world.p.state).live, "who asked last has it"


async def test_the_same_request_again_is_the_same_reload(world: World) -> None:
    one = await reload(world, changes={"slots": 3}, key="k")
    assert await reload(world, changes={"slots": 3}, key="k") is one
    await baked(world)
    assert await reload(world, changes={"slots": 3}, key="k") is one and len(world.fakes.launcher.processes) == 2
    with pytest.raises(RequestError, match="key 'k' was another request's") as refused:
        await reload(world, changes={"slots": 4}, key="k")
    assert refused.value.status == 409


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"changes": {"ctxx": 1}}, "unknown key 'ctxx'"),
        ({"changes": {"id": "q"}}, "cannot change 'id'"),
        ({"changes": {"provisioning": {"env": {"API_KEY": "s"}}}}, "what may be secret (API_KEY)"),
    ],
)
async def test_what_cannot_be_is_refused_at_once(world: World, asked: dict[str, Any], why: str) -> None:
    with pytest.raises(SpecError) as refused:
        await reload(world, **asked)
    assert why in refused.value.message and world.pools.operations.all()[-1].kind == "start"


@pytest.mark.parametrize("more", [{}, {"url": "http://127.0.0.1:9"}])
async def test_a_pool_is_not_reloaded_to_an_engine_that_somebody_else_runs(world: World, more: dict[str, str]) -> None:
    request = ReloadRequest("p", changes={"provisioning": {"mode": "external", **more}})
    for ask in (world.reloads.plan, world.reloads.begin):
        with pytest.raises(SpecError, match="to mode external: somebody else runs such an engine") as refused:
            await ask(request)
        assert "attach a pool of another id" in str(refused.value.hint)
    assert view(world.p.state).ready and world.pools.operations.all()[-1].kind == "start"


async def test_a_held_pool_is_not_reloaded(world: World) -> None:
    await world.pools.change(world.p, "hold", ev.Hold(), "now", held=True)
    with pytest.raises(RequestError, match="it is held"):
        await reload(world)


async def test_a_plan_says_what_would_be_done_and_how_long_it_would_take_and_does_nothing(world: World) -> None:
    request = ReloadRequest("p", changes={"slots": 4, "ctx": 9})
    plan = await world.reloads.plan(request)
    assert plan["changes"] == [{"key": "ctx", "old": None, "new": 9}, {"key": "slots", "old": 2, "new": 4}]
    assert plan["forecast_downtime_ms"] is None and len(plan["steps"]) == 5 and plan["strategy"] == "stop_start"
    operation = await reload(world)
    await baked(world)
    await operation.wait()
    plan = await world.reloads.plan(request)
    assert plan["forecast_downtime_ms"] >= 0 and plan["forecast_duration_ms"] == plan["forecast_downtime_ms"] + 2_000
    assert len(world.fakes.launcher.processes) == 2
    world.fakes.ram_bytes = 1
    with pytest.raises(SpecError):
        await world.reloads.plan(ReloadRequest("p", changes={"slots": 0}))


async def test_the_next_daemon_starts_what_ran_before_a_reload_that_was_not_done(world: World) -> None:
    operation = await reload(world)
    assert operation.status == "running" and fact(world)["pending"]
    following = World(reload=RULES, pool={"preload": True})
    following.fakes.records.known.update({kind: dict(rows) for kind, rows in world.fakes.records.known.items()})
    await boot(following.pools, following.services, {"p": StoredPool("p", desired="up")})
    await settle()
    assert view(following.p.state).ready and slots(following) == 2 and fact(following) == {}
    assert "is undone" in next(event.human for event in following.fakes.told if event.type == "reload_undone")
    await following.pools.close()


async def test_a_stop_that_comes_while_a_reload_is_committed_comes_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next daemon would run what this one had given up."""
    written, commit = asyncio.Event(), world.pools.overrides.commit

    async def slow(*given: Any) -> None:
        await written.wait()
        await commit(*given)

    monkeypatch.setattr(world.pools.overrides, "commit", slow)
    operation = await reload(world)
    await world.fakes.clock.advance(2.5)
    await until(lambda: world.reloads.stage_of("p") == "committing", "the commit")
    stopping = asyncio.create_task(world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down"))
    await settle()
    assert not stopping.done() and view(world.p.state).ready
    written.set()
    await (await stopping).wait()
    assert operation.status == "succeeded" and fact(world)["changes"] == {"slots": 3}
    assert world.p.config is not None and world.p.config.slots == 3 and not view(world.p.state).live


async def test_a_change_that_is_being_made_is_made_before_a_reload_begins(world: World) -> None:
    async with world.pools.turn(world.p):
        begun = asyncio.create_task(reload(world))
        stopped = asyncio.create_task(world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down"))
        await settle()
        assert not world.reloads.has("p") and not stopped.done()
    operation = await begun
    await (await stopped).wait()
    assert "stopped by request" in error_of(operation).message and not view(world.p.state).live


async def test_a_pool_that_is_being_reloaded_is_not_forgotten(world: World) -> None:
    await reload(world)
    with pytest.raises(RequestError, match="it is being reloaded"):
        await world.pools.remove(world.p)


async def test_a_daemon_that_cannot_write_undoes_a_reload_all_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await reload(world)
    following = World(reload=RULES, pool={"preload": True})
    following.fakes.records.known.update({kind: dict(rows) for kind, rows in world.fakes.records.known.items()})

    put_fact = following.fakes.records.put_fact

    async def full(kind: str, *given: Any) -> None:
        if kind == OVERRIDE:
            raise NodeError("cannot write to state directory", code="STATE_UNWRITABLE", status=507)
        await put_fact(kind, *given)

    monkeypatch.setattr(following.fakes.records, "put_fact", full)
    await boot(following.pools, following.services, {"p": StoredPool("p", desired="up")})
    await settle()
    assert view(following.p.state).ready and slots(following) == 2
    assert fact(following) == {}, "it is left for when it can be written"
    await following.pools.close()


async def test_what_the_new_engine_failed_at_is_not_held_against_the_old_one(world: World) -> None:
    for _ in range(6):
        operation = await reload(world)
        world.fakes.launcher.processes[-1].end(ExitRecord(code=1))
        await settle()
        await baked(world)
        assert "exit_code=1" in error_of(operation).message, "how it ended is known"
    assert view(world.p.state).ready and world.p.state.restart_count == 0
    assert world.p.state.history.failures == 0 and world.p.state.history.circuit == "closed"


async def test_a_plan_shows_no_secrets(world: World) -> None:
    pool = world.p
    old = PreparedEngine("p", "/engine", ("--api-key", "old-secret-1"), port=9, env={"API_KEY": "old-secret-2"}, verbatim=True)
    await world.submit(pool, old)
    world.pools.post("p", ev.Tick(), replace(pool.definition, config=None))
    await settle()
    new = replace(old, flags=("--api-key", "new-secret-1"), env={"API_KEY": "new-secret-2", "OMP_NUM_THREADS": "2"})
    plan = await world.reloads.plan(ReloadRequest("p", engine=new))
    assert {change["key"] for change in plan["changes"]} == {"flags", "env"} and "secret-" not in str(plan)
    assert "OMP_NUM_THREADS" in str(plan)


async def test_an_engine_that_is_outdated_is_replaced_even_where_nothing_is_to_change(world: World) -> None:
    world.p.launch = replace(world.p.launch, outdated=("it runs as an earlier configuration said",))
    operation = await reload(world, new_model_ref="file:m.gguf")
    await baked(world)
    assert (await operation.wait())["rolled_back"] is False and len(world.fakes.launcher.processes) == 2


async def test_by_which_configuration_it_was_launched_is_kept_each_time_it_is_another(world: World) -> None:
    def kept() -> Any:
        return world.fakes.records.facts("configuration")["p"]

    first = kept()
    for changes in ({"slots": 3}, {"slots": 2}):
        operation = await reload(world, changes=changes)
        await baked(world)
        assert operation.status == "succeeded"
    assert kept() == first
    world.fakes.prober.says = "no"
    await reload(world, changes={"slots": 5})
    await baked(world)
    assert kept() == first, "what ran before runs again"


async def test_a_machine_that_is_busy_is_not_held_against_the_new_engine(world: World) -> None:
    world.fakes.prober.tokens_per_s = 30.0
    operation = await reload(world)
    await baked(world)
    assert operation.status == "succeeded", "the old one is as slow now"


async def test_a_pool_that_comes_up_by_demand_alone_stays_so(world: World) -> None:
    world.store.pools.clear()
    world.pools.intents.restore({})
    await reload(world)
    await baked(world)
    assert world.store.pools.get("p", StoredPool("p")).desired == "auto"


@pytest.mark.parametrize(("desired", "down"), [(Desired.DRAINED, ev.Drain(0, 0)), (Desired.STOPPED, ev.Stop())])
async def test_a_pool_that_a_person_took_down_is_as_it_was_after_a_failed_reload(
    world: World, desired: Desired, down: ev.Event
) -> None:
    await (await world.pools.change(world.p, "x", down, "down", desired="down")).wait()
    world.fakes.launcher.refusals.append(EngineError("preload failed: no"))
    await reload(world)
    await baked(world)
    assert world.p.state.desired is desired and not view(world.p.state).live


async def test_what_was_reloaded_is_forgotten_on_request(world: World) -> None:
    for changes in ({"slots": 3}, {"ctx": 512}):
        await reload(world, changes=changes)
        await baked(world)
    operation = await reload(world, reset=True, changes={"ctx": 1024})
    await baked(world)
    assert operation.status == "succeeded" and fact(world)["changes"] == {"ctx": 1024}
    assert world.p.config is not None and (world.p.config.slots, world.p.config.ctx) == (2, 1024)
    operation = await reload(world, reset=True)
    await baked(world)
    assert operation.status == "succeeded" and fact(world) == {} and world.p.config == world.config.pools[0]


async def test_a_plan_of_what_would_be_refused_is_refused_and_one_of_nothing_says_so(world: World) -> None:
    plan = await world.reloads.plan(ReloadRequest("p", changes={"slots": 2}))
    assert plan["steps"] == ["nothing: it runs that already"] and plan["forecast_duration_ms"] == 0
    await reload(world)
    with pytest.raises(RequestError, match="is being reloaded already"):
        await world.reloads.plan(ReloadRequest("p", changes={"slots": 4}))


async def test_a_start_during_a_reload_is_accepted_at_once_and_meets_the_new_engine(world: World) -> None:
    await reload(world)
    started = await world.start()
    assert started.status == "running"
    await baked(world)
    await until(lambda: started.status != "running", "the start to end")
    assert (await started.wait())["pid"] == world.fakes.launcher.processes[-1].pid


async def test_what_is_told_of_a_reloads_drain_is_its_own_deadline(world: World) -> None:
    world.fakes.registry.allocate_lease("p")
    await reload(world, changes={"slots": 3}, drain_deadline_ms=9_000)
    told = next(event for event in world.fakes.told if event.type == "drain_started")
    assert told.fields["deadline_ms"] == 9_000 and "one request may run on for 9 s" in told.human
    await world.fakes.clock.advance(9.1)
    await settle()
    assert view(world.p.state).ready and world.fakes.types().count("undrain") == 1


async def test_an_engine_without_a_free_slot_is_not_measured(world: World) -> None:
    """A prompt of ours would wait behind its clients."""
    warm_ups: list[int] = []

    async def warm_up(*_: Any) -> tuple[float, float]:
        warm_ups.append(len(world.fakes.launcher.processes))
        return 20.0, 50.0

    world.fakes.prober.warm_up = warm_up  # type: ignore[method-assign,assignment]
    world.fakes.prober.told = Counters(requests=2)
    operation = await reload(world, drain_deadline_ms=1_000, changes={"slots": 3})
    await world.fakes.clock.advance(1.1)
    await until(lambda: operation.status != "running", "the drain to be given up")
    assert warm_ups == [] and "drain timeout: 2 requests" in error_of(operation).message


async def test_a_reload_that_is_given_up_before_its_first_step_is_over(world: World) -> None:
    """Found by the simulator: whoever stopped the pool asked for ever."""
    operation = await world.reloads.begin(ReloadRequest("p", changes={"slots": 3}))
    stop = await asyncio.wait_for(world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down"), 5)
    await settle()
    await stop.wait()
    assert "stopped by request" in error_of(operation).message and not world.reloads.has("p")
