"""Reloads while the old engine sleeps, on fake parts and a manual clock: who holds which memory, and who wakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.gpu.accounts import Reservation
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.question import Question
from pool_managerd.core.reload import ReloadRequest, Stage
from pool_managerd.errors import NodeError, RequestError
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.operations import Operation
from pool_managerd.testing.fake_parts import FakeProcess
from pool_managerd.testing.manual_clock import settle
from tests.core.gpus import GIB, gpu, process
from tests.supervision.test_pools import World
from tests.supervision.test_reload import RULES, error_of, fact, slots, until

R0, R1 = InstanceId("p"), InstanceId("p", "r1")
NEEDS, ASLEEP = 14, 1.5
CARD = "GPU-00000000"


class SleepyWorld(World):
    """Pool p on one GPU that holds one engine of it, and those asleep.

    ``frees``: going to sleep frees memory. ``refuses``: what the engine answers to such a request instead. ``sleeps``: its word.
    """

    def __init__(self, needs: float = NEEDS) -> None:
        super().__init__(reload=RULES)
        self.size = needs
        self.fakes.engines.kind, self.fakes.engines.flags = "vllm", ("--enable-sleep-mode",)
        self.fakes.prober.answers = self.answer
        self.fakes.needs["p"] = LaunchInputs("fake-1", "p", EngineSettings(), weights_bytes=int(needs * GIB), overhead_bytes=0)
        self.sleeps, self.frees, self.refuses = False, True, dict[str, Exception]()
        self.strangers: tuple[Any, ...] = ()
        self.asked: list[str] = []
        self._scan, self.fakes.monitor.scan = self.fakes.monitor.scan, self.scan  # type: ignore[method-assign]

    async def scan(self) -> DeviceScan:
        """The driver tells of every engine that runs, and of who else is there."""
        held = [process(one.pid, self.held_by(one)) for one in self.processes if not one._record.done()]
        self.fakes.monitor.show(gpu(0, 24, processes=(*held, *self.strangers)))
        return await self._scan()

    def answer(self, question: Question) -> Any:
        self.asked.append(question.path)
        if (refused := self.refuses.get(question.path)) is not None:
            raise refused
        if question.path == "/is_sleeping":
            return {"is_sleeping": self.sleeps}
        self.sleeps = question.path.startswith("/sleep")
        return None

    def held_by(self, one: FakeProcess) -> float:
        return ASLEEP if self.sleeps and self.frees and one is self.processes[0] else self.size

    @property
    def processes(self) -> list[FakeProcess]:
        return self.fakes.launcher.processes

    def reserved(self) -> dict[InstanceId, float]:
        return {one.instance_id: one.bytes_by_device[CARD] / GIB for one in self.fakes.gpus.memory.ledger.all()}


@pytest.fixture
async def world() -> AsyncIterator[SleepyWorld]:
    made = SleepyWorld()
    await made.up()
    yield made
    await made.reloads.close()
    await made.pools.close()


async def reload(world: SleepyWorld, stage: Stage = Stage.GATING, **asked: Any) -> Operation:
    operation = await world.reloads.begin(ReloadRequest("p", **(asked or {"changes": {"slots": 3}})))
    await until(lambda: world.reloads.stage_of("p") in (None, stage.value), f"the reload to be {stage}")
    return operation


async def ends(world: SleepyWorld, operation: Operation) -> None:
    """Time passes, and the driver tells who is left, until it is over."""
    for _ in range(400):
        if operation.status != "running":
            return
        await world.fakes.clock.advance(0.5)
        await asyncio.sleep(0.001)
    raise AssertionError(f"the reload does not end: {world.reloads.stage_of('p')}, {world.p.state}")


async def test_the_old_engine_sleeps_while_the_new_one_loads_and_ends_when_it_stays(world: SleepyWorld) -> None:
    plan = await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}))
    assert plan["strategy"] == "sleep_old"
    assert plan["why"].startswith("the engine can sleep while the new one loads, and both do not run side by side: cannot start")
    assert any("put the engine to sleep" in step and "for up to 30 s more (gpu.vram_wait_ms)" in step for step in plan["steps"])
    with pytest.raises(RequestError, match="side by side") as refused:
        await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}, strategy="blue_green"))
    assert refused.value.hint == "leave the strategy out, or ask for sleep_old or stop_start"
    old, operation = world.p, await reload(world)
    assert old.instance.phase is Phase.SLEEPING and old.instance_id == R0 and not world.processes[0].signals
    assert world.reserved() == {R0: 0.0, R1: float(NEEDS)}, "both together have what one has"
    assert not view(world.p.state).ready
    await ends(world, operation)
    outcome = await operation.wait()
    assert (outcome["strategy"], outcome["rolled_back"]) == ("sleep_old", False) and outcome["downtime_ms"] >= 0
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    assert world.p.instance_id == R1 and view(world.p.state).ready and slots(world) == 3 and world.p.state.crash_count == 0
    assert world.processes[0].signals == ["term"] and world.reserved() == {R1: float(NEEDS)}
    assert world.asked.count("/sleep?level=1") == 1 and "/wake_up" not in world.asked


@pytest.mark.parametrize("how", ["crashes", "answers wrongly", "does not come up"])
async def test_it_wakes_where_the_new_one_does_not_pass(world: SleepyWorld, how: str) -> None:
    pid = world.processes[0].pid
    if how == "answers wrongly":
        world.fakes.prober.says = "five"
    if how == "does not come up":
        world.fakes.launcher.refusals.append(NodeError("cannot run /engine"))
    operation = await reload(world)
    if how == "crashes":
        world.processes[1].end(ExitRecord(signal=11))
        await settle()
    await ends(world, operation)
    error = error_of(operation)
    assert error.message.endswith("what ran before is awake and serves again") and error.details["rolled_back"] is True
    assert world.p.instance_id == R0 and view(world.p.state).ready and slots(world) == 2
    assert world.p.launch.process is not None and world.p.launch.process.pid == pid and not world.processes[0].signals
    assert world.reserved() == {R0: float(NEEDS)} and world.pools.replacements.find("p") is None and fact(world) == {}
    assert not world.sleeps and world.p.state.crash_count == 0


async def test_what_it_says_of_its_sleep_is_not_believed_but_what_is_seen(world: SleepyWorld) -> None:
    world.frees = False
    operation = await reload(world, Stage.LOADING)
    await ends(world, operation)
    error = error_of(operation)
    assert error.code == "SLEEP_FAILED" and "does not free the memory that the new one needs" in error.message
    assert "pool p 14 GiB" in error.message, "who holds it is named"
    assert len(world.processes) == 1 and view(world.p.state).ready and world.reserved() == {R0: float(NEEDS)}
    plan = await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}))
    assert plan["strategy"] == "stop_start", "this engine is not put to sleep again in vain"
    tried = "its engine's sleep was tried before, in vain: its engine sleeps, and does not free the memory"
    assert tried in plan["why"]
    asked = await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}, strategy="sleep_old"))
    assert asked["strategy"] == "sleep_old" and asked["why"].startswith(f"as asked for; {tried}")


async def test_memory_that_becomes_free_a_moment_later_is_waited_for(world: SleepyWorld) -> None:
    world.frees = False
    operation = await reload(world, Stage.LOADING)
    await world.fakes.clock.advance(1)
    assert len(world.processes) == 1
    world.frees = True
    await ends(world, operation)
    assert (await operation.wait())["strategy"] == "sleep_old"


@pytest.mark.parametrize("path", ["/sleep?level=1", "/is_sleeping"])
async def test_an_engine_that_does_not_fall_asleep_serves_on(world: SleepyWorld, path: str) -> None:
    world.refuses["/sleep?level=1"] = ValueError("the engine answered 500: CUDA error")
    operation = await reload(world, Stage.LOADING)
    if path == "/is_sleeping":
        world.sleeps = True
    await ends(world, operation)
    error = error_of(operation)
    assert error.code == "SLEEP_FAILED" and "CUDA error" in error.message and error.details["rolled_back"] is True
    assert "could not be asked" not in error.message and "pool-managerd logs p" in (error.hint or "")
    assert view(world.p.state).ready and len(world.processes) == 1 and world.p.instance.phase is Phase.READY


async def test_requests_in_flight_are_waited_for_and_at_the_deadline_it_stays_awake(world: SleepyWorld) -> None:
    lease = world.fakes.registry.grant("p").lease_id
    world.pools.leases_changed("p")
    operation = await reload(world, Stage.DRAINING, changes={"slots": 3}, drain_deadline_ms=3_000)
    with pytest.raises(RequestError, match="draining"):
        world.fakes.registry.grant("p")
    await ends(world, operation)
    assert "drain timeout" in error_of(operation).message and view(world.p.state).ready and world.asked == ["/is_sleeping"]
    operation = await reload(world, Stage.DRAINING)
    world.fakes.registry.release("p", lease)
    world.pools.leases_changed("p")
    await ends(world, operation)
    assert (await operation.wait())["strategy"] == "sleep_old"


async def test_nobody_else_is_given_the_memory_between_the_two(world: SleepyWorld) -> None:
    ledger = world.fakes.gpus.memory.ledger
    other = Reservation(InstanceId("q"), 1, {CARD: 11 * GIB})
    refusals: list[str] = []

    def ask(_: Any) -> None:
        objection = ledger.objection(other, world.fakes.gpus.memory.accounts())
        if objection is None:
            refusals.append(f"given at stage {world.reloads.stage_of('p')}: {world.reserved()}")

    world.fakes.prober.says = "five"
    fits = Reservation(InstanceId("q"), 1, {CARD: 8 * GIB})
    assert ledger.objection(fits, world.fakes.gpus.memory.accounts()) is None, "what is left is"
    world.fakes.events.listen(ask)
    operation = await reload(world)
    await ends(world, operation)
    assert error_of(operation).code == "GATE_FAILED" and refusals == []


async def test_it_is_not_woken_into_memory_that_somebody_else_holds(world: SleepyWorld) -> None:
    operation = await reload(world)
    world.strangers = (process(900, 15, name="blender"),)
    world.processes[1].end(ExitRecord(signal=11))
    for _ in range(20):
        await world.fakes.clock.advance(0.5)
    assert operation.status == "running" and "/wake_up" not in world.asked
    world.strangers = ()
    await ends(world, operation)
    assert "/wake_up" in world.asked and view(world.p.state).ready


async def test_an_engine_that_dies_in_its_sleep_is_started_again_where_the_new_one_does_not_pass(world: SleepyWorld) -> None:
    world.fakes.prober.says = "five"
    operation = await reload(world)
    world.processes[0].end(ExitRecord(signal=9))
    await settle()
    await ends(world, operation)
    assert error_of(operation).code == "GATE_FAILED"
    for _ in range(40):
        await world.fakes.clock.advance(1)
    assert view(world.p.state).ready and world.p.instance_id == R0 and world.p.instance.epoch > 2
    assert world.reserved() == {R0: float(NEEDS)}


async def test_an_engine_that_dies_in_its_sleep_does_not_come_back_while_the_new_one_is_tried(world: SleepyWorld) -> None:
    world.fakes.prober.result = ProbeResult(ProbeOutcome.ERROR, "answered 503")
    operation = await reload(world, Stage.LOADING)
    world.processes[0].end(ExitRecord(signal=9))
    for _ in range(20):
        await settle()
        await world.fakes.clock.advance(1)
    assert operation.status == "running" and world.p.instance.phase is Phase.DOWN, "its memory is the new one's"
    assert len([one for one in world.processes if not one._record.done()]) == 1


async def test_a_stop_ends_both(world: SleepyWorld) -> None:
    operation = await reload(world)
    stopping = await world.pools.change(world.p, "stop", ev.Stop(), "down", desired="down")
    for _ in range(20):
        await world.fakes.clock.advance(0.5)
    await stopping.wait()
    await until(lambda: world.pools.replacements.find("p") is None, "the candidate to be gone")
    assert error_of(operation).code == "OPERATION_CANCELLED" and world.p.instance.phase is Phase.DOWN and world.reserved() == {}


async def test_one_that_need_not_sleep_is_not_put_to_it() -> None:
    world = SleepyWorld(needs=4)
    await world.up()
    assert (await world.reloads.plan(ReloadRequest("p", changes={"slots": 3})))["strategy"] == "blue_green"
    await world.pools.close()


@pytest.mark.parametrize(
    ("kind", "flags", "why"),
    [
        ("vllm", (), "its engine cannot sleep"),
        ("tgi", ("--enable-sleep-mode",), "its engine cannot sleep"),
        ("vllm", ("--enable-sleep-mode",), "VLLM_SERVER_DEV_MODE=1"),
    ],
)
async def test_an_engine_that_cannot_sleep_is_not_asked_to(kind: str, flags: tuple[str, ...], why: str) -> None:
    world = SleepyWorld()
    world.fakes.engines.kind, world.fakes.engines.flags = kind, flags
    world.refuses["/is_sleeping"] = ValueError("the engine answered 404: Not Found")
    await world.up()
    assert (await world.reloads.plan(ReloadRequest("p", changes={"slots": 3})))["strategy"] == "stop_start"
    with pytest.raises(RequestError, match=why) as refused:
        await world.reloads.plan(ReloadRequest("p", changes={"slots": 3}, strategy="sleep_old"))
    assert refused.value.status == 409 and "stop_start" in (refused.value.hint or "")
    await world.pools.close()


async def test_an_engine_that_falls_asleep_by_itself_is_only_let_to_where_that_is_asked_for() -> None:
    world = SleepyWorld()
    world.fakes.engines.kind, world.fakes.engines.flags = "llamacpp", ("--sleep-idle-seconds", "2")
    world.fakes.prober.answers = lambda question: (
        {"is_sleeping": world.sleeps} if question.path == "/props" else world.answer(question)
    )
    await world.up()
    assert (await world.reloads.plan(ReloadRequest("p", changes={"slots": 3})))["strategy"] == "stop_start"
    operation = await reload(world, Stage.DRAINING, changes={"slots": 3}, strategy="sleep_old")
    assert not any(question.path.startswith("/sleep") for question in world.fakes.prober.questions)
    world.sleeps = True
    await ends(world, operation)
    assert (await operation.wait())["strategy"] == "sleep_old"
    await until(lambda: world.pools.replacements.find("p") is None, "the old engine to be gone")
    await world.pools.close()


@pytest.mark.parametrize("sleeps", [True, False])
async def test_the_next_daemon_wakes_one_that_was_left_asleep(sleeps: bool) -> None:
    world = SleepyWorld()
    world.sleeps, left = sleeps, FakeProcess(4711)
    record = LaunchRecord(
        R0, 5, ("/engine", "--enable-sleep-mode"), "", "", "vllm", "1", "m", None, 8080, "http://127.0.0.1:8080", "/health", 2,
        (CARD,), {CARD: NEEDS * GIB}, {}, 0, 0,
    )  # fmt: skip
    world.fakes.adoption.engines[R0] = LeftEngine(record, 1.0, was_ready=True)
    world.fakes.adoption.processes[R0] = left
    world.processes.append(left)
    world.pools.add("p", world.config.pools[0])
    await boot(world.pools, world.services, {})
    for _ in range(10):
        await world.fakes.clock.advance(0.5)
    assert view(world.p.state).ready and world.p.instance.epoch == 5 and not world.sleeps
    assert ("/wake_up" in world.asked) is sleeps
    await world.pools.close()


async def test_of_two_pools_on_one_gpu_one_falls_asleep_after_the_other() -> None:
    turns, order = SleepyWorld().fakes.gpus, list[str]()

    async def take(name: str, *uuids: str) -> None:
        async with turns.turn(uuids):
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")

    await asyncio.gather(take("a", "x", "y"), take("b", "y", "x"), take("c", "z"))
    assert order.index("a out") < order.index("b in") and order.index("c in") < order.index("b in")


async def test_one_that_cannot_sleep_makes_room_by_ending_on_a_gpu_that_shows_what_it_holds(world: SleepyWorld) -> None:
    operation = await world.reloads.begin(ReloadRequest("p", changes={"slots": 3}, strategy="stop_start"))
    await ends(world, operation)
    assert (await operation.wait())["strategy"] == "stop_start" and world.reserved() == {R0: float(NEEDS)}
