"""A pool that keeps failing, through its actor on a manual clock: what is logged, shown, stored and asked of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from pydantic import ValidationError

from pool_managerd.config import Config
from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.backoff import BackoffRules
from pool_managerd.core.breaker import BreakerRules
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.event import Event
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.restart_limit import RestartRules
from pool_managerd.errors import RequestError
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.policy import policy_for
from pool_managerd.supervision.status import explanation, status_of
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

BACKOFF = {"initial_ms": 1000, "max_ms": 1000, "jitter": 0}


@pytest.fixture
async def worlds() -> AsyncIterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        await world.pools.close()


@pytest.fixture
def world(worlds: list[World]) -> World:
    worlds.append(World(supervision={"backoff": BACKOFF}))
    return worlds[-1]


async def next_daemon(old: World, worlds: list[World], after_s: float, *, boot_id: str = "boot", desired: str = "auto") -> World:
    """Another one with the same state, ``after_s`` later; the engines of the old one are gone."""
    worlds.append(World(supervision={"backoff": BACKOFF}))
    new = worlds[-1]
    new.fakes.records.known.update(old.fakes.records.known)
    for fact in new.fakes.records.known.get("history", {}).values():
        assert fact["boot_id"] == "boot"
        fact["boot_id"] = boot_id
    new.fakes.histories.restore()
    await new.fakes.clock.advance(old.fakes.clock.monotonic() + after_s - new.fakes.clock.monotonic())
    await boot(new.pools, new.services, {"p": StoredPool("p", desired=desired)})
    await settle()
    return new


async def crash(world: World, times: int = 1) -> None:
    """The engine dies by itself that many times, each time right after it was ready."""
    for n in range(times):
        if n:
            await world.fakes.clock.advance(1.0)
        world.fakes.launcher.processes[-1].end(ExitRecord(code=1))
        await settle()


def told(world: World, type_: str) -> list[Event]:
    return [event for event in world.fakes.told if event.type == type_]


def status(world: World) -> dict[str, object]:
    clock = world.fakes.clock
    return status_of(world.p, world.fakes.registry, "home", clock.monotonic(), clock.wall_ms())


async def test_five_crashes_a_failed_trial_for_twice_as_long_and_a_reset(world: World) -> None:
    await world.up()
    await crash(world, 5)
    entry = world.fakes.registry.get("p")
    assert entry is not None and entry.circuit_state == "open" and not entry.ready
    seen, wall_ms = status(world), world.fakes.clock.wall_ms()
    assert (seen["state"], seen["reason"], seen["circuit_state"]) == ("failed", "circuit_open", "open")
    assert seen["circuits"] == {"general": "open", "cuda": "closed"} and seen["restart_rate"] == 4
    assert seen["next_restart_at_ms"] == wall_ms + 300_000
    (opened,) = told(world, "breaker")
    assert opened.level == "error" and opened.fields["next_restart_at"] == wall_ms + 300_000
    assert {k: opened.fields[k] for k in ("old_state", "new_state", "failure_count")} == {
        "old_state": "closed", "new_state": "open", "failure_count": 5,
    }  # fmt: skip

    await world.fakes.clock.advance(299)
    assert len(world.fakes.launcher.processes) == 5
    await world.fakes.clock.advance(1)
    assert len(world.fakes.launcher.processes) == 6 and status(world)["circuit_state"] == "half_open"
    await crash(world)
    await world.fakes.clock.advance(599)
    assert len(world.fakes.launcher.processes) == 6 and status(world)["circuit_state"] == "open"

    operation = await world.pools.change(world.p, "reset_breaker", ev.ResetBreaker(), "now")
    assert operation.status == "succeeded"
    await settle()
    assert status(world)["ready"] and status(world)["circuit_state"] == "closed"
    assert [event.fields["new_state"] for event in told(world, "breaker")] == ["open", "half_open", "open", "closed"]


async def test_a_minute_of_being_ready_closes_the_breaker_without_anybody_asking(world: World) -> None:
    await world.up()
    await crash(world, 5)
    await world.fakes.clock.advance(300)
    assert status(world)["circuit_state"] == "half_open"
    await world.fakes.clock.advance(59)
    assert status(world)["circuit_state"] == "half_open"
    await world.fakes.clock.advance(1)
    assert status(world)["circuit_state"] == "closed"
    entry = world.fakes.registry.get("p")
    assert entry is not None and entry.circuit_state == "closed"


async def test_demand_is_told_when_to_come_again_and_a_person_has_one_start(world: World) -> None:
    await world.up()
    await crash(world, 5)
    with pytest.raises(RequestError, match="circuit breaker is open") as refused:
        await world.start(origin="demand")
    assert (refused.value.code, refused.value.status, refused.value.retriable) == ("CIRCUIT_OPEN", 503, True)
    assert refused.value.retry_after_ms == 300_000
    operation = await world.start()
    await settle()
    assert operation.status == "succeeded" and len(world.fakes.launcher.processes) == 6
    await crash(world)
    await world.fakes.clock.advance(298)
    assert len(world.fakes.launcher.processes) == 6 and status(world)["circuit_state"] == "open"


async def test_the_next_daemon_knows_of_the_open_breaker_and_of_what_is_left_of_its_time(
    world: World, worlds: list[World]
) -> None:
    await world.up()
    await crash(world, 5)
    after = await next_daemon(world, worlds, 100)
    seen = status(after)
    assert (seen["state"], seen["circuit_state"], seen["last_error"]) == ("failed", "open", "exit_code=1")
    assert seen["next_restart_at_ms"] == after.fakes.clock.wall_ms() + 200_000
    await after.fakes.clock.advance(199)
    assert after.fakes.launcher.processes == []
    await after.fakes.clock.advance(1)
    assert status(after)["circuit_state"] == "half_open" and status(after)["ready"]
    await crash(after)
    assert status(after)["next_restart_at_ms"] == after.fakes.clock.wall_ms() + 600_000


async def test_after_a_reboot_it_begins_anew(world: World, worlds: list[World]) -> None:
    await world.up()
    await crash(world, 5)
    after = await next_daemon(world, worlds, 100, boot_id="another boot")
    assert status(after)["ready"] and status(after)["circuit_state"] == "closed"


async def test_the_history_is_written_when_it_changes_and_no_more_often(world: World) -> None:
    written: list[str] = []
    note = world.fakes.records.note_fact

    def noted(kind: str, key: str, value: object) -> None:
        written.append(kind)
        note(kind, key, value)  # type: ignore[arg-type]

    world.fakes.records.note_fact = noted  # type: ignore[method-assign]
    await world.up()
    await world.fakes.clock.advance(30)
    assert written.count("history") == 0
    await crash(world)
    assert written.count("history") == 1
    await world.fakes.clock.advance(1)  # it is restarted, and ready again: its error is over
    assert written.count("history") == 3
    await world.fakes.clock.advance(50)
    assert written.count("history") == 3
    await world.fakes.clock.advance(600)  # three times something is forgotten, and then there is nothing left
    assert written.count("history") == 6 and world.fakes.records.facts("history") == {}


async def test_a_pool_that_is_forgotten_takes_its_history_with_it(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    await settle()
    await crash(world)
    assert "p" in world.fakes.records.facts("history")
    await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")
    await settle()
    await world.pools.discard(pool)
    assert world.fakes.records.facts("history") == {}
    assert world.pools.add("p", world.config.pools[0]).state.history.failures == 0


async def test_what_a_drain_cut_off_is_said_until_the_next_good_start(world: World, worlds: list[World]) -> None:
    pool = await world.up()
    world.fakes.registry.allocate_lease("p")
    operation = await world.pools.change(pool, "drain", ev.Drain(1000, 0), "drained", desired="drained")
    await world.fakes.clock.advance(1)
    assert (await operation.wait())["force_stopped"] is True
    error = "drain deadline reached: one request was cut off"
    assert status(world)["last_error"] == error
    after = await next_daemon(world, worlds, 5, desired="drained")
    assert status(after)["last_error"] == error
    await world.start()
    await settle()
    assert status(world)["ready"] and status(world)["last_error"] is None


async def test_who_waits_for_a_start_after_a_stop_is_told_at_once_when_the_breaker_opens(world: World) -> None:
    await world.up()
    await crash(world, 4)
    await world.fakes.clock.advance(1)
    world.pools.post("p", ev.Died(world.p.instance.epoch))
    await settle()
    assert status(world)["state"] == "stopping", "it is dead, and how it ended is not known yet"
    operation = await world.start(origin="demand")
    assert operation.status == "running"
    world.fakes.launcher.processes[-1].end(ExitRecord(code=1))
    await settle()
    assert status(world)["circuit_state"] == "open" and operation.status == "failed"


async def test_what_a_start_would_do_tells_of_an_open_breaker(world: World) -> None:
    await world.up()
    await crash(world, 5)
    told = await explanation(world.p, world.config, [], world.services)
    assert told["steps"][0]["kind"] == "breaker" and "open for 5 min" in told["steps"][0]["detail"]
    await world.pools.change(world.p, "reset_breaker", ev.ResetBreaker(), "now")
    told = await explanation(world.p, world.config, [], world.services)
    assert "breaker" not in [step["kind"] for step in told["steps"]]


def test_the_rules_are_those_of_the_configuration() -> None:
    config = Config.model_validate({
        "supervision": {
            "backoff": {"multipliers": {"vram_oom": 3}}, "breaker": {"threshold": 7},
            "restart_limit": {"max_restarts": 2, "storm_open": 4},
        },
    })  # fmt: skip
    policy = policy_for(config, "p", None, "node")
    assert policy.breaker == BreakerRules(threshold=7) and policy.restart_limit == RestartRules(max_restarts=2, storm_open=4)
    assert policy.backoff.multiplier(CrashClass.VRAM_OOM) == 3.0
    default = policy_for(Config(), "p", None, "node")
    assert (default.backoff, default.breaker, default.restart_limit) == (BackoffRules(), BreakerRules(), RestartRules())


def test_a_class_of_crash_that_does_not_exist_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ValidationError, match="vram_oom"):
        Config.model_validate({"supervision": {"backoff": {"multipliers": {"vramoom": 3}}}})
