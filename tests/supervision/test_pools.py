"""Drivers on fake parts and a manual clock: what happens in which order, and what callers are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, ExitRecord, PreparedEngine
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.crash_diagnosis import LaunchLog
from pool_managerd.core.health import ProbeOutcome, ProbeResult
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.core.listeners import NOBODY, Listener
from pool_managerd.core.preflight import Report, assert_gpu_only
from pool_managerd.errors import EngineError, PoolError, RequestError, SpecError
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.measured import benched
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.policy import policy_for
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.reload import Reloads
from pool_managerd.supervision.shutdown import stop_all
from pool_managerd.supervision.status import status_of
from pool_managerd.testing.fake_parts import FakeNode, no_binary
from pool_managerd.testing.fake_watch import FakeListeners
from pool_managerd.testing.manual_clock import settle

BAD = ProbeResult(ProbeOutcome.ERROR, "answered 503")
STRANGER = Listener("other", "pid 666 (stranger)")


class Store:
    """Remembers intent; ``full`` refuses every write."""

    def __init__(self) -> None:
        self.pools: dict[str, StoredPool] = {}
        self.full = False

    async def put_pool(self, pool: StoredPool) -> None:
        if self.full:
            raise PoolError("cannot write to state directory", code="STATE_UNWRITABLE", status=507)
        self.pools[pool.pool_id] = pool

    def note_down(self, pool_id: str) -> None:
        self.pools[pool_id] = replace(self.pools[pool_id], desired="down")

    async def remove_pool(self, pool_id: str) -> None:
        self.pools.pop(pool_id, None)

    def parse_prepared(self, body: Any, pool_id: str) -> PreparedEngine:
        return PreparedEngine(pool_id, body["binary_path"], port=body["port"], verbatim=True)

    def prepared_to_json(self, engine: AnyEngine) -> dict[str, Any] | None:
        return {"binary_path": engine.binary_path, "port": engine.port} if isinstance(engine, PreparedEngine) else None


class World:
    """Fakes, a store, and the pools made of them."""

    def __init__(self, **config: Any) -> None:
        ids = config.pop("ids", ["p"])
        pool = config.pop("pool", {})
        pools = [{"id": pool_id, "engine": "llamacpp", "model": "file:m.gguf", "slots": 2, **pool} for pool_id in ids]
        self.config = Config.model_validate({"pools": pools, **config})
        self.fakes, self.store, self._count = FakeNode(), Store(), 0
        self.services = self.fakes.services()
        self.pools = Pools(self.config, self.services, self.store, self.store, self.new_id)
        self.reloads = Reloads(self.pools, self.services, lambda: self.config)

    def new_id(self) -> str:
        self._count += 1
        return f"op-{self._count}"

    @property
    def p(self) -> Pool:
        return self.pools.get("p")

    async def up(self) -> Pool:
        pool = self.pools.add("p", self.config.pools[0])
        operation = await self.start()
        await settle()
        assert operation.status == "succeeded"
        return pool

    async def submit(self, pool: Pool, engine: AnyEngine) -> None:
        """Let the pool have an engine of somebody's own, without starting it."""
        self.pools.post(pool.pool_id, ev.Tick(), replace(pool.definition, submitted=engine))
        await settle()

    async def start(self, **start: Any) -> Operation:
        return await self.pools.change(self.p, "start", ev.Start(**start), "up", desired="up")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.pools.close()


async def test_the_pid_file_comes_before_the_first_probe_and_the_handoff_after_it(world: World) -> None:
    await world.up()
    assert world.fakes.files.history == ["pid 4000", "handoff"]
    entry = world.fakes.registry.get("p")
    assert entry is not None and entry.ready and entry.engine_version == "fake-1" and entry.slots_total == 2
    assert entry.perf_hints is not None and entry.perf_hints.first_token_ms == 20.0


async def test_what_was_measured_is_told_with_what_by_and_a_warm_up_changes_nothing_of_a_bench(world: World) -> None:
    pool = await world.up()
    entry, engine = world.fakes.registry.get("p"), pool.launch.prepared
    assert entry is not None and entry.perf_hints is not None and engine is not None
    assert entry.perf_hints.measured_with == "warm-up of 16 tokens" and entry.perf_hints.measured_at_ms is not None
    bench = Baseline(9.0, 200.0, 3, "bench of 128 tokens, 3 runs", 5, {})
    benched(world.services, engine, bench)
    world.pools.post("p", ev.Restart())
    await settle()
    entry = world.fakes.registry.get("p")
    assert view(pool.state).ready and entry is not None and entry.perf_hints is not None
    assert (entry.perf_hints.perf_tokens_per_s, entry.perf_hints.measured_with) == (200.0, bench.measured_with)
    shown = status_of(pool, world.fakes.registry, "home", 0.0, 0)
    assert [(b["kind"], b["tokens_per_s"], b["samples"]) for b in shown["baselines"]] == [
        ("bench", 200.0, 3),
        ("warm-up", 50.0, 2),
    ]
    assert shown["perf"]["measured_with"] == bench.measured_with and shown["perf"]["tokens_per_s"] == 200.0


async def test_a_preload_answers_with_pid_and_handoff_path(world: World) -> None:
    world.pools.add("p", world.config.pools[0])
    operation = await world.start()
    assert await operation.wait() == {"pool_id": "p", "pid": 4000, "handoff_path": "/run/engines/engine.json"}


async def test_the_pid_file_is_gone_before_live_turns_false(world: World) -> None:
    pool = await world.up()
    seen: list[bool] = []
    world.fakes.events.listen(lambda event: seen.append(InstanceId("p") in world.fakes.files.pids or view(pool.state).live))
    remove = world.fakes.files.remove_pid

    def remove_and_look(instance: InstanceId) -> None:
        remove(instance)
        entry = world.fakes.registry.get(instance.pool_id)
        assert entry is not None and entry.live, "live may turn false only after this"

    world.fakes.files.remove_pid = remove_and_look  # type: ignore[method-assign]
    world.fakes.launcher.processes[0].end(ExitRecord(signal=9))
    await settle()
    assert not view(pool.state).live and InstanceId("p") not in world.fakes.files.pids


async def test_files_of_a_running_engine_that_somebody_removed_are_put_back_at_the_next_probe(world: World) -> None:
    await world.up()
    world.fakes.files.pids.clear()
    await world.fakes.clock.advance(6)
    assert world.fakes.files.pids == {InstanceId("p"): 4000} and world.fakes.files.history.count("handoff") == 2
    await world.fakes.clock.advance(6)
    assert [event.level for event in world.fakes.told if event.type == "notice" and "written again" in event.human] == ["warn"]


async def test_a_crashed_engine_comes_back_after_its_backoff(world: World) -> None:
    pool = await world.up()
    world.fakes.files.log = ["it broke"]
    world.fakes.launcher.processes[0].end(ExitRecord(code=7))
    await settle()
    assert view(pool.state).state == "backoff" and pool.state.last_error == "exit_code=7"
    crash = next(event for event in world.fakes.told if event.type == "crash")
    backoff = next(event for event in world.fakes.told if event.type == "backoff")
    assert crash.fields["exit_code"] == 7 and crash.fields["crash_count"] == 1 and crash.fields["engine_version"] == "fake-1"
    assert crash.fields["log_tail"] == ["it broke"]
    assert backoff.fields["backoff_ms"] > 0 and backoff.fields["crash_reason"] == "process_exit"
    assert backoff.fields["next_restart_at"] == world.fakes.clock.wall_ms() + backoff.fields["backoff_ms"]
    await world.fakes.clock.advance(1.2)
    assert view(pool.state).ready and len(world.fakes.launcher.processes) == 2
    assert world.fakes.records.counters["p"] == (1, 1)


async def test_a_failed_start_quotes_the_cause_and_never_an_earlier_launchs_log(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = ProbeResult(ProbeOutcome.ERROR, "was refused")
    await world.start()
    await settle()
    world.fakes.files.log += ["E x: cannot reserve 3 slots", "srv: exiting due to model loading error"]
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    await settle()
    assert 'its log says "x: cannot reserve 3 slots"' in str(pool.state.last_error)
    await world.fakes.clock.advance(2)
    world.fakes.launcher.processes[1].end(ExitRecord(code=1))
    await settle()
    assert "reserve" not in str(pool.state.last_error), "the second launch wrote nothing"


async def test_a_start_that_fails_tells_the_caller_why_and_is_tried_again(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.launcher.refuse = no_binary()
    operation = await world.start()
    with pytest.raises(EngineError, match="preload failed: cannot run /engine") as failed:
        await operation.wait()
    assert failed.value.status == 500 and failed.value.hint == "install it"
    assert "cannot run /engine" in str(pool.state.last_error)
    world.fakes.launcher.refuse = None
    await world.fakes.clock.advance(1.2)
    assert view(pool.state).ready


async def test_a_wrong_configuration_is_not_tried_again(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.models.refuse = SpecError("cannot find the model /m.gguf", hint="check the path")
    operation = await world.start()
    with pytest.raises(EngineError, match=r"cannot find the model /m.gguf \(check the path\)"):
        await operation.wait()
    assert view(pool.state).state == "failed" and pool.state.reason == "config_error"


async def test_a_submitted_engine_is_kept_durably_and_not_tried_again(world: World) -> None:
    pool = world.pools.add("s")
    await world.submit(pool, PreparedEngine("s", "/engine", port=9000, verbatim=True))
    world.fakes.launcher.refuse = no_binary()
    operation = await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up")
    with pytest.raises(EngineError):
        await operation.wait()
    assert view(pool.state).state == "failed"
    assert world.store.pools["s"].submitted == {"binary_path": "/engine", "port": 9000}
    assert world.fakes.types().count("warmup") == 0


async def test_a_submitted_engine_is_not_warmed_up(world: World) -> None:
    pool = world.pools.add("s")
    await world.submit(pool, PreparedEngine("s", "/engine", port=9000, verbatim=True))
    operation = await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up")
    await operation.wait()
    assert "warmup" not in world.fakes.types()


async def test_a_preload_of_a_ready_pool_is_refused_and_leaves_no_operation(world: World) -> None:
    await world.up()
    with pytest.raises(RequestError) as refused:
        await world.start(join=False)
    assert refused.value.code == "ALREADY_READY" and refused.value.status == 409
    assert len(world.pools.operations.all()) == 1


async def test_an_intent_that_cannot_be_written_is_not_acknowledged(world: World) -> None:
    await world.up()
    world.store.full = True
    with pytest.raises(PoolError) as failed:
        await world.pools.change(world.p, "hold", ev.Hold(), "now", held=True)
    assert failed.value.status == 507


async def test_drain_waits_for_the_last_lease_and_tells_how_it_went(world: World) -> None:
    pool = await world.up()
    lease = world.fakes.registry.grant("p")
    operation = await world.pools.change(pool, "drain", ev.Drain(30_000, 0), "drained", desired="down")
    await world.fakes.clock.advance(2)
    assert operation.status == "running" and world.fakes.registry.get_draining("p")
    with pytest.raises(RequestError, match="draining"):
        world.fakes.registry.grant("p")
    world.fakes.registry.release("p", lease.lease_id)
    world.pools.leases_changed("p")
    assert await operation.wait() == {"pool_id": "p", "force_stopped": False, "duration_ms": 2000, "final_lease_count": 0}
    assert view(pool.state).state == "offline" and world.store.pools["p"].desired == "down"


async def test_leases_end_with_their_instance(world: World) -> None:
    pool = await world.up()
    world.fakes.registry.grant("p")
    operation = await world.pools.change(pool, "drain", ev.Drain(100, 0), "drained", desired="down")
    await world.fakes.clock.advance(0.2)
    outcome = await operation.wait()
    assert outcome["force_stopped"] is True and outcome["final_lease_count"] == 1
    assert world.fakes.registry.get_active_leases("p") == 0


async def test_a_lease_with_a_time_to_live_is_taken_back(world: World) -> None:
    await world.up()
    world.fakes.registry.grant("p", expires_at=world.fakes.clock.monotonic() + 3)
    world.pools.leases_changed("p", expiry=True)
    await world.fakes.clock.advance(2.9)
    assert world.fakes.registry.get_active_leases("p") == 1
    await world.fakes.clock.advance(0.2)
    assert world.fakes.registry.get_active_leases("p") == 0
    assert "lease_expired" in world.fakes.types()


async def test_a_stop_during_staging_cancels_it_and_tells_whoever_waits(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.models.stuck = True
    starting = await world.start()
    await settle()
    stopping = await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")
    await stopping.wait()
    with pytest.raises(RequestError, match="cancelled"):
        await starting.wait()
    assert view(pool.state).state == "offline"


async def test_a_launch_that_nobody_wants_any_more_leaves_no_process(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    launch = world.fakes.launcher.launch
    release = asyncio.Event()

    async def slow(engine: PreparedEngine, **given: Any) -> Any:
        await release.wait()
        return await launch(engine, **given)

    world.fakes.launcher.launch = slow  # type: ignore[method-assign]
    await settle()
    world.pools.post("p", ev.Stop())
    world.pools.post("p", ev.Start())
    await settle()
    release.set()
    await settle()
    running = [process for process in world.fakes.launcher.processes if not process.signals]
    assert view(pool.state).ready and running == [pool.launch.process]


async def test_a_process_whose_news_comes_too_late_is_killed(world: World) -> None:
    """A restart was in the inbox just before the word of the spawn."""
    pool = world.pools.add("p", world.config.pools[0])
    launch = world.fakes.launcher.launch

    async def restart_first(engine: PreparedEngine, *, epoch: int, **order: Any) -> Any:
        process = await launch(engine, epoch=epoch, **order)
        if epoch == 1:
            world.pools.post("p", ev.Restart())
        return process

    world.fakes.launcher.launch = restart_first  # type: ignore[method-assign]
    await world.start()
    await settle(100)
    running = [process for process in world.fakes.launcher.processes if not process.signals]
    assert view(pool.state).ready and running == [pool.launch.process]


async def test_a_good_answer_from_another_program_on_the_port_is_not_believed() -> None:
    world = World()
    services = world.fakes.services(listener=FakeListeners(STRANGER))
    world.pools = Pools(world.config, services, world.store, world.store, world.new_id)
    pool = world.pools.add("p", world.config.pools[0])
    operation = await world.start()
    await world.fakes.clock.advance(1)
    assert not view(pool.state).ready and "another program" in pool.instance.probe_reason
    await world.fakes.clock.advance(world.config.health.startup_timeout_ms / 1000)
    with pytest.raises(EngineError, match="health check failed"):
        await operation.wait()
    await world.pools.close()


@pytest.mark.parametrize("fail_open", [True, False])
async def test_a_ready_pool_whose_port_another_process_took_is_unready_at_the_next_probe(fail_open: bool) -> None:
    world = World(profile="dev" if fail_open else "home")
    listeners = FakeListeners()
    world.pools = Pools(world.config, world.fakes.services(listener=listeners), world.store, world.store, world.new_id)
    pool = world.pools.add("p", world.config.pools[0])
    await (await world.start()).wait()
    listeners.found = STRANGER
    await world.fakes.clock.advance(world.config.health.probe_interval_ms / 1000 + 0.1)
    assert not view(pool.state).ready
    assert "is not held by this engine but by pid 666 (stranger)" in (pool.state.last_error or "")
    await world.pools.close()


async def test_an_answer_does_not_count_when_nothing_listens_any_more() -> None:
    world = World()
    services = world.fakes.services(listener=FakeListeners(NOBODY))
    world.pools = Pools(world.config, services, world.store, world.store, world.new_id)
    pool = world.pools.add("p", world.config.pools[0])
    await world.start()
    await world.fakes.clock.advance(1)
    assert not view(pool.state).ready and "nothing listens" in pool.instance.probe_reason
    await world.pools.close()


async def test_a_pool_that_is_removed_leaves_nothing(world: World) -> None:
    pool = world.pools.add("s")
    await world.submit(pool, PreparedEngine("s", "/engine", port=9000, verbatim=True))
    await world.pools.remove(pool)
    assert world.fakes.launcher.forgotten == ["s"]


async def test_readiness_is_asked_for_often_at_first(world: World) -> None:
    world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = BAD
    await world.start()
    await world.fakes.clock.advance(0.2)
    assert world.fakes.prober.probes >= 5


async def test_an_external_engine_has_no_process_and_is_announced_once_it_answers() -> None:
    world = World(pool={"provisioning": {"mode": "external", "url": "http://127.0.0.1:9999"}})
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = BAD
    operation = await world.start()
    await world.fakes.clock.advance(1)
    assert view(pool.state).state == "starting" and operation.status == "running"
    world.fakes.prober.result = ProbeResult(ProbeOutcome.SUCCESS)
    await world.fakes.clock.advance(1)
    assert (await operation.wait())["pid"] is None
    assert world.fakes.launcher.processes == [] and world.fakes.files.pids == {}
    await world.pools.close()


async def no_gpu(pool_id: str) -> Report:
    assert_gpu_only(False)
    raise AssertionError("there is a GPU after all")


async def test_without_a_gpu_nothing_is_started_but_engines_of_others_are_attached_to() -> None:
    world = World(pool={"provisioning": {"mode": "external", "url": "http://127.0.0.1:9999"}})
    world.pools = Pools(world.config, world.fakes.services(preflight=no_gpu), world.store, world.store, world.new_id)
    theirs, ours = world.pools.add("theirs"), world.pools.add("ours")
    await world.submit(theirs, AttachedEngine("theirs", "http://127.0.0.1:9998"))
    await world.submit(ours, PreparedEngine("ours", "/engine", port=9000, verbatim=True))
    for pool in (theirs, ours, world.pools.add("p", world.config.pools[0])):
        world.pools.post(pool.pool_id, ev.Start())
    await settle()
    assert view(theirs.state).ready and view(world.p.state).ready
    assert view(ours.state).state == "failed" and ours.state.reason == "gpu_required"
    assert "GPU-only enforcement" in str(ours.state.last_error)
    await world.pools.close()


async def test_boot_loads_one_pool_after_the_other_in_the_order_of_their_ids() -> None:
    world = World(ids=["c", "a", "b"])
    world.fakes.prober.result = BAD
    await boot(world.pools, world.services, {})
    await settle()
    states = {pool.pool_id: view(pool.state).state for pool in world.pools.all()}
    assert states == {"a": "starting", "b": "provisioning", "c": "provisioning"}
    world.fakes.prober.result = ProbeResult(ProbeOutcome.SUCCESS)
    await world.fakes.clock.advance(2)
    await settle(100)
    assert [event.pool_id for event in world.fakes.told if event.type == "preload_succeeded"] == ["a", "b", "c"]
    await world.pools.close()


async def test_a_pool_that_was_stopped_or_held_stays_down_over_a_restart_of_the_daemon() -> None:
    world = World(ids=["down", "held", "up"])
    await boot(world.pools, world.services, {
        "down": StoredPool("down", desired="down", crash_count=4, restart_count=3), "held": StoredPool("held", held=True),
        "sub": StoredPool("sub", desired="up", submitted={"binary_path": "/engine", "port": 9000}),
    })  # fmt: skip
    await world.fakes.clock.advance(1)
    states = {pool.pool_id: view(pool.state).state for pool in world.pools.all()}
    assert states == {"down": "uninitialized", "held": "uninitialized", "sub": "ready", "up": "ready"}
    release = await world.pools.change(world.pools.get("held"), "release", ev.Release(), "now", held=False)
    await release.wait()
    await settle()
    assert view(world.pools.get("held").state).ready, "the start that the hold stood in the way of"
    entry = world.fakes.registry.get("down")
    assert entry is not None and (entry.crash_count, entry.restart_count) == (4, 3)
    await world.pools.close()


async def test_shutdown_stops_everything_and_forgets_no_intent(world: World) -> None:
    await world.up()
    await stop_all(world.pools, world.services, 1000)
    assert world.fakes.launcher.processes[0].signals == ["term"]
    assert world.store.pools["p"].desired == "up"
    with pytest.raises(RequestError, match="shutting down"):
        await world.start()


async def test_an_error_in_one_pool_is_said_and_too_many_end_the_daemon(world: World) -> None:
    await world.up()
    for _ in range(5):
        world.pools.post("p", object())  # type: ignore[arg-type]
    await settle()
    assert world.fakes.types().count("internal_error") == 5
    assert len(world.fakes.fatal) == 1


async def test_a_helper_that_breaks_is_noticed(world: World) -> None:
    pool = world.pools.add("p", world.config.pools[0])

    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    world.fakes.engines.prepare = broken  # type: ignore[method-assign]
    operation = await world.start()
    with pytest.raises(EngineError, match="boom"):
        await operation.wait()
    assert view(pool.state).state == "backoff"


async def test_a_broken_task_can_still_be_stopped(world: World) -> None:
    await world.up()
    for _ in range(5):
        world.pools.post("p", object())  # type: ignore[arg-type]
    await settle()
    await stop_all(world.pools, world.services, 1000)
    assert world.fakes.launcher.processes[0].signals == ["term"]


async def test_a_listener_that_raises_ends_nothing(world: World) -> None:
    pool = await world.up()

    def bad(event: Any) -> None:
        raise RuntimeError("listener")

    world.fakes.events.listen(bad)
    world.fakes.launcher.processes[0].end(ExitRecord(signal=11))
    await world.fakes.clock.advance(2)
    assert view(pool.state).ready and world.fakes.fatal == []


async def test_a_log_that_cannot_be_read_does_not_stop_the_clock(world: World) -> None:
    pool = await world.up()

    def unreadable(*_: Any, **__: Any) -> LaunchLog:
        raise PoolError("cannot use .runtime: Too many open files")

    world.fakes.files.launch_log = unreadable  # type: ignore[method-assign]
    world.fakes.launcher.processes[0].end(ExitRecord(signal=11))
    await world.fakes.clock.advance(60)
    assert view(pool.state).ready


async def test_shutdown_in_the_middle_of_a_restart_ends_with_nothing_running() -> None:
    world = World()
    world.fakes.launcher.ignores_term = True
    pool = await world.up()
    await world.pools.change(pool, "restart", ev.Restart(), "up", desired="up")
    stopping = asyncio.create_task(stop_all(world.pools, world.services, 30_000))
    await world.fakes.clock.advance(120)
    assert stopping.done()
    assert [process.signals[-1:] for process in world.fakes.launcher.processes] == [["kill"]]


async def test_shutdown_cuts_a_long_drain_at_its_own_deadline(world: World) -> None:
    pool = await world.up()
    world.fakes.registry.grant("p")
    await world.pools.change(pool, "drain", ev.Drain(86_400_000, 0), "drained", desired="down")
    stopping = asyncio.create_task(stop_all(world.pools, world.services, 30_000))
    await world.fakes.clock.advance(60)
    assert stopping.done()


async def test_a_start_that_races_the_shutdown_is_refused_and_leaves_no_engine() -> None:
    world = World(ids=["p", "q"])
    late = world.pools.add("q", world.config.pools[1])
    await world.up()
    world.fakes.registry.grant("p")
    written = asyncio.Event()
    put_pool = world.store.put_pool

    async def slow(pool: StoredPool) -> None:
        await written.wait()
        await put_pool(pool)

    world.store.put_pool = slow  # type: ignore[method-assign]
    starting = asyncio.create_task(world.pools.change(late, "start", ev.Start(), "up", desired="up"))
    await settle()
    stopping = asyncio.create_task(stop_all(world.pools, world.services, 5_000))
    await settle()
    written.set()
    await world.fakes.clock.advance(20)
    assert stopping.done()
    with pytest.raises(RequestError, match="shutting down"):
        await starting
    assert len(world.fakes.launcher.processes) == 1


async def test_an_acknowledged_preload_that_the_shutdown_interrupts_is_started_by_the_next_daemon(world: World) -> None:
    world.fakes.prober.result = BAD
    pool = world.pools.add("s")
    engine = PreparedEngine("s", "/engine", port=9000, verbatim=True)
    await world.pools.change(pool, "preload", ev.Start(retry=False), "up", desired="up", engine=engine)
    await settle()
    await stop_all(world.pools, world.services, 1000)
    assert world.store.pools["s"].desired == "up"


@pytest.mark.parametrize("after", [ev.Stop(), ev.Drain(0, 0)])
async def test_a_restart_that_is_overtaken_by_a_stop_ends_as_cancelled(after: ev.Event) -> None:
    world = World()
    world.fakes.launcher.ignores_term = True
    pool = await world.up()
    restart = await world.pools.change(pool, "restart", ev.Restart(), "up", desired="up")
    if isinstance(after, ev.Stop):
        await world.pools.change(pool, "stop", after, "down", desired="down")
    else:
        world.pools.post("p", ev.Stop())
    await world.fakes.clock.advance(60)
    assert restart.status == "failed"
    await world.pools.close()


async def test_a_drain_that_is_taken_back_ends_as_cancelled(world: World) -> None:
    pool = await world.up()
    world.fakes.registry.grant("p")
    drain = await world.pools.change(pool, "drain", ev.Drain(30_000, 0), "drained", desired="down")
    await world.pools.change(pool, "undrain", ev.Undrain(), "now", desired="up")
    with pytest.raises(RequestError, match="taken back"):
        await drain.wait()


async def test_a_restart_of_an_engine_that_cannot_be_ended_fails() -> None:
    world = World()
    pool = await world.up()
    process = world.fakes.launcher.processes[0]
    process.stop = lambda grace_ms: None  # type: ignore[method-assign]
    process.kill = lambda: None  # type: ignore[method-assign]
    restart = await world.pools.change(pool, "restart", ev.Restart(), "up", desired="up")
    await world.fakes.clock.advance(60)
    with pytest.raises(PoolError, match="survived SIGKILL"):
        await restart.wait()
    await world.pools.close()


async def test_an_external_engine_that_is_not_there_is_reported_and_still_waited_for() -> None:
    world = World(pool={"provisioning": {"mode": "external", "url": "http://127.0.0.1:9999"}})
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = BAD
    operation = await world.start()
    await world.fakes.clock.advance(world.config.health.startup_timeout_ms / 1000 + 1)
    with pytest.raises(EngineError, match="nothing healthy answered"):
        await operation.wait()
    assert "nothing healthy answered" in str(pool.state.last_error) and not view(pool.state).ready
    world.fakes.prober.result = ProbeResult(ProbeOutcome.SUCCESS)
    await world.fakes.clock.advance(2)
    assert view(pool.state).ready and pool.state.last_error is None
    await world.pools.close()


async def test_an_event_id_of_a_state_that_was_lost_resumes_from_the_beginning(world: World) -> None:
    await world.up()
    events = world.fakes.events.subscribe(after_id=5_000)
    assert [(event.type == "gap", event.id) for event in (await anext(events), await anext(events))] == [(True, 0), (False, 1)]


async def test_an_engine_that_ends_without_a_word_on_a_port_that_others_hold_gets_another_port() -> None:
    world = World()
    services = world.fakes.services(listener=FakeListeners(STRANGER))
    world.pools = Pools(world.config, services, world.store, world.store, world.new_id)
    pool = world.pools.add("p", world.config.pools[0])
    world.fakes.prober.result = BAD
    world.pools.post("p", ev.Start())
    await settle()
    world.fakes.launcher.processes[0].end(ExitRecord(code=1))
    async with asyncio.timeout(5):
        while len(world.fakes.launcher.processes) < 2:
            await asyncio.sleep(0)
    assert "port_conflict" in world.fakes.types() and pool.state.crash_count == 0
    await world.pools.close()


def test_engines_that_take_long_to_start_are_given_longer_unless_the_configuration_says_otherwise() -> None:
    def seconds(config: dict[str, Any], engine: str, submitted: str | None = None, **keys: Any) -> float:
        pool = None if submitted else PoolConfig.model_validate({"id": "p", "engine": engine, "model": "m", **keys})
        told = PreparedEngine("p", "/e", engine=submitted) if submitted else None
        return policy_for(Config.model_validate(config), "p", pool, "n", told).startup_timeout_s

    assert seconds({}, "vllm") == seconds({}, "", "vllm") == 900
    assert seconds({}, "llamacpp") == seconds({}, "", "llamacpp") == 120
    assert seconds({"health": {"startup_timeout_ms": 5_000}}, "vllm") == 5
    assert seconds({"health": {"startup_timeout_ms": 5_000}}, "vllm", startup_timeout_ms=7_000) == 7
