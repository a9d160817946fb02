"""Pools that take turns on one GPU where their engines can sleep: on fake parts and a manual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.event import Event
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.question import Question
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.supervision.gpu.sleepers import LEFT
from pool_managerd.testing.fake_parts import FakeProcess
from tests.core.gpus import gpu, process
from tests.supervision.test_demand import DemandWorld

ASLEEP = 1.5
CARD = "GPU-00000000"


class SleepersWorld(DemandWorld):
    """Pools a, b and c of 14 GiB on a GPU of 24; ``asleep`` are ports of engines that sleep, ``keeps`` what they hold then."""

    def __init__(self, **more: Any) -> None:
        self.asleep: set[int] = set()
        self.asked: list[tuple[int, str]] = []
        self.keeps, self.deaf = ASLEEP, False
        super().__init__(**more)
        self.fakes.engines.kind, self.fakes.engines.flags = "vllm", ("--enable-sleep-mode",)
        self.fakes.prober.ask = self.answer  # type: ignore[method-assign]
        self.events: list[Event] = []
        self.fakes.events.listen(self.events.append)

    async def answer(self, url: str, question: Question) -> Any:
        port = int(url.rpartition(":")[2])
        self.asked.append((port, question.path))
        if question.path == "/is_sleeping":
            return {"is_sleeping": port in self.asleep}
        if question.path.startswith("/sleep"):
            if self.deaf:
                raise ValueError("the engine answered 501")
            self.asleep.add(port)
        if question.path == "/wake_up":
            self.asleep.discard(port)
        return None

    def held_by(self, one: FakeProcess) -> float:
        pools = [pool for pool in self.pools.all() if pool.launch.process is one]
        prepared = pools[0].launch.prepared if pools else None
        return self.keeps if prepared is not None and int(prepared.url.rpartition(":")[2]) in self.asleep else self.gib

    async def scan(self) -> DeviceScan:
        held = [process(one.pid, self.held_by(one)) for one in self.fakes.launcher.processes if not one._record.done()]
        others = [process(900, self.foreign_gib, name="blender")] if self.foreign_gib else []
        self.fakes.monitor.show(gpu(0, 24, processes=(*held, *others)))
        return await self._scan()

    async def turn_of(self, model: str) -> dict[str, Any]:
        """It had a slot, and gave it back."""
        given = await self.have(model)
        self.release(given)
        return given

    def phase(self, pool_id: str) -> Phase:
        return self.pools.get(pool_id).instance.phase

    def reserved(self) -> dict[str, float]:
        return {one.instance_id.pool_id: one.bytes_by_device[CARD] / 2**30 for one in self.fakes.gpus.memory.ledger.all()}

    def told(self, kind: str) -> list[str]:
        return [event.human for event in self.events if event.type == kind]


@pytest.fixture
async def world() -> AsyncIterator[SleepersWorld]:
    made = SleepersWorld()
    yield made
    await made.end()


async def test_who_can_sleep_sleeps_to_make_room_and_is_woken_in_its_turn(world: SleepersWorld) -> None:
    await world.turn_of("a")
    plan = await world.demand.plan("b")
    assert [one["action"] for one in plan["stops"]] == ["put to sleep"] and "put to sleep (a)" in plan["would"]
    await world.turn_of("b")
    a = world.pools.get("a")
    assert world.phase("a") is Phase.SLEEPING and a.state.desired is Desired.EVICTED and not view(a.state).ready
    assert world.reserved() == {"a": ASLEEP, "b": 14.0} and len(world.fakes.launcher.processes) == 2
    again = await world.turn_of("a")
    assert again["started"] and world.reserved() == {"a": 14.0, "b": ASLEEP}
    assert len(world.fakes.launcher.processes) == 2 and a.state.crash_count == 0, "none was loaded again"
    assert world.told("evicted")[0] == "Pool 'a' is put to sleep to make room for pool 'b'"


async def test_what_sleep_does_not_free_is_stopped_and_not_put_to_sleep_again_in_vain(world: SleepersWorld) -> None:
    world.keeps = 13.0
    await world.turn_of("a")
    await world.turn_of("b")
    assert world.phase("a") is Phase.DOWN and world.reserved() == {"b": 14.0}
    assert [words.partition(" to make")[0] for words in world.told("evicted")] == [
        "Pool 'a' is put to sleep",
        "Pool 'a' is stopped",
    ]
    await world.turn_of("a")
    await world.turn_of("b")
    assert len(world.told("evicted")) == 5, "b was put to sleep in vain as well; a was not again"


async def test_sleepers_go_when_they_are_in_the_way_of_a_third(world: SleepersWorld) -> None:
    world.keeps = 6.0
    for model in ("a", "b", "c"):
        await world.turn_of(model)
    assert world.phase("c") is Phase.READY and sum(world.reserved().values()) <= 24
    assert {world.phase("a"), world.phase("b")} == {Phase.SLEEPING, Phase.DOWN}


async def test_nothing_in_flight_is_put_to_sleep(world: SleepersWorld) -> None:
    given = await world.have("a")
    waiter = world.ask("b", wait_ms=5_000)
    await world.fakes.clock.advance(3)
    assert world.phase("a") is Phase.READY and not waiter.done()
    world.release(given)
    await world.pass_until(waiter.done)
    assert world.phase("a") is Phase.SLEEPING and (await waiter)["pool_id"] == "b"


async def test_memory_that_another_program_has_taken_meanwhile_ends_the_sleeper_and_is_named(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    await (await world.pools.change(world.pools.get("b"), "stop", ev.Stop(), "down", desired="down")).wait()
    world.foreign_gib = 12.0
    with pytest.raises(NodeError) as refused:
        await world.have("a", wait_ms=20_000)
    assert "blender" in refused.value.message and world.phase("a") is Phase.DOWN and world.pools.get("a").state.crash_count == 0
    world.foreign_gib = 0.0
    assert (await world.have("a"))["started"]


async def test_a_person_starts_a_sleeper_where_another_one_is(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    operation = await world.pools.change(world.pools.get("a"), "start", ev.Start(), "up", desired="up")
    await world.pass_until(lambda: operation.status != "running")
    assert operation.status == "failed" and world.told("no_room_to_wake") and world.phase("b") is Phase.READY
    assert "INSUFFICIENT_VRAM" in str(operation.to_dict()) and "held by pool b" in str(operation.to_dict())
    assert world.phase("a") is Phase.SLEEPING and world.reserved() == {"a": ASLEEP, "b": 14.0}, "it is not lost for that"
    await world.turn_of("a")
    assert len(world.fakes.launcher.processes) == 2


async def test_a_cordoned_gpu_wakes_nobody(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    await world.fakes.gpus.watch.cordon(CARD)
    with pytest.raises(PoolError) as refused:
        await world.have("a", wait_ms=20_000)
    assert "0 can be used now" in refused.value.message and view(world.pools.get("b").state).ready


async def test_an_engine_that_dies_while_it_wakes_is_started_anew_for_whoever_waits(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    waiter = world.ask("a")
    await world.pass_until(lambda: world.phase("a") is Phase.WAKING)
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await world.pass_until(waiter.done, 120)
    assert (await waiter)["pool_id"] == "a" and len(world.fakes.launcher.processes) == 3


async def test_a_reload_of_a_sleeper_is_a_load_of_what_it_is_to_be(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    await (await world.pools.change(world.pools.get("b"), "stop", ev.Stop(), "down", desired="down")).wait()
    operation = await world.reloads.begin(ReloadRequest("a", changes={"slots": 3}))
    await world.pass_until(lambda: operation.status != "running")
    assert operation.status == "succeeded" and view(world.pools.get("a").state).ready and world.reserved() == {"a": 14.0}


async def test_an_engine_that_does_not_fall_asleep_serves_on_or_is_stopped(world: SleepersWorld) -> None:
    await world.turn_of("a")
    world.deaf = True
    waiter = world.ask("b")
    await world.pass_until(waiter.done, 200)
    assert (await waiter)["pool_id"] == "b" and world.phase("a") is Phase.DOWN, "it is not asked to sleep twice"
    assert [path for _, path in world.asked].count("/sleep?level=1") == 1


async def test_an_idle_sleeper_is_stopped_in_the_end() -> None:
    world = SleepersWorld(pool={"idle_ttl_ms": 60_000})
    await world.turn_of("a")
    await world.turn_of("b")
    assert world.phase("a") is Phase.SLEEPING
    await world.pass_until(lambda: world.phase("a") is Phase.DOWN, 120)
    await world.end()


async def test_what_it_holds_is_written_down_before_anybody_is_promised_the_rest(world: SleepersWorld) -> None:
    await world.turn_of("a")
    put, seen = world.fakes.records.put_fact, list[dict[str, float]]()

    async def noting(kind: str, key: str, value: Any) -> None:
        if kind == LEFT:
            seen.append(world.reserved())
        await put(kind, key, value)

    world.fakes.records.put_fact = noting  # type: ignore[method-assign]
    await world.turn_of("b")
    assert seen == [{"a": 14.0}]
    assert world.fakes.records.facts(LEFT)["a"]["holds"] == {CARD: int(ASLEEP * 2**30)}
    await world.turn_of("a")
    assert "a" not in world.fakes.records.facts(LEFT)


async def test_a_hold_keeps_a_sleeper_asleep_and_a_stop_ends_it(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    a = world.pools.get("a")
    await world.pools.change(a, "hold", ev.Hold(), "now", held=True)
    waiter = world.ask("a", wait_ms=1_000)
    await world.pass_until(waiter.done)
    assert "held" in str(waiter.exception()) and world.phase("a") is Phase.SLEEPING
    await (await world.pools.change(a, "stop", ev.Stop(), "down", desired="down")).wait()
    assert world.phase("a") is Phase.DOWN and world.reserved() == {"b": 14.0}


async def test_gpus_that_are_left_to_others_are_left_by_sleepers_too(world: SleepersWorld) -> None:
    await world.turn_of("a")
    await world.turn_of("b")
    await world.fakes.gpus.yields.begin([], 3600)
    await world.pass_until(lambda: world.phase("a") is world.phase("b") is Phase.DOWN)
    assert world.reserved() == {}
