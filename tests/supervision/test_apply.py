"""Applies on fake parts and a manual clock: who is touched, what fails alone, and what is in force afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

import pytest

from pool_managerd.config import Config
from pool_managerd.config.plan import Plan
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.core.listeners import NOBODY, Listener
from pool_managerd.core.memory.estimate import EngineSettings
from pool_managerd.core.memory.estimator import LaunchInputs
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.apply import Applies, ApplyOptions
from pool_managerd.supervision.boot import boot
from pool_managerd.supervision.made_of import runs_by_another
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.overrides import OVERRIDE
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

RULES = {"bake_ms": 1_000}


class ApplyWorld(World):
    """Three pools, ``a``, ``b`` and ``c``, which run."""

    def __init__(self, *ids: str) -> None:
        super().__init__(ids=list(ids or "abc"), reload=RULES)
        self.applies = Applies(self.pools, self.services, self.reloads, lambda: self.config, self.use)

    def use(self, config: Config) -> None:
        self.config = config
        self.pools.use_config(config)

    def file(self, *pools: dict[str, Any], **sections: Any) -> Config:
        written = [{"engine": "llamacpp", "model": "file:m.gguf", "slots": 2, **pool} for pool in pools]
        return Config.model_validate({"pools": written, "reload": RULES, **sections})

    def pids(self) -> dict[str, int | None]:
        """Of those that run."""
        found = ((pool.pool_id, pool.launch.process if pool.instance.has_process else None) for pool in self.pools.all())
        return {pool_id: None if process is None else process.pid for pool_id, process in found}

    async def begin(self, new: Config, **options: Any) -> Operation:
        return await self.applies.begin(new, ApplyOptions(**options))

    async def apply(self, new: Config, **options: Any) -> Operation:
        """To its end."""
        return await self.ended(await self.begin(new, **options))

    async def ended(self, operation: Operation) -> Operation:
        deadline = time.monotonic() + 10
        while operation.status == "running":
            assert time.monotonic() < deadline, f"it does not end: {operation.progress}"
            await self.fakes.clock.advance(0.25)
            await asyncio.sleep(0.001)
        await settle()
        return operation


@pytest.fixture
async def world() -> AsyncIterator[ApplyWorld]:
    made = ApplyWorld()
    await boot(made.pools, made.services, {})
    await until_ready(made)
    yield made
    await made.applies.close()
    await made.reloads.close()
    await made.pools.close()


async def until_ready(world: ApplyWorld) -> None:
    deadline = time.monotonic() + 10
    while not all(view(pool.state).ready for pool in world.pools.all()):
        assert time.monotonic() < deadline, "the pools do not become ready"
        await asyncio.sleep(0.001)


def told(operation: Operation, pool_id: str) -> dict[str, Any]:
    outcome = operation.outcome if operation.error is None else operation.error.details
    assert outcome is not None
    return dict(outcome["pools"][pool_id])


async def test_one_changed_pool_is_touched_and_nobody_else(world: ApplyWorld) -> None:
    before = world.pids()
    new = world.file({"id": "c"}, {"id": "a", "slots": 3}, {"id": "b"})
    plan = await world.applies.plan(new)
    assert [(row["pool_id"], row["action"]) for row in plan["pools"]] == [("a", "reload")] and plan["untouched"] == 2
    assert plan["pools"][0]["changes"] == [{"key": "slots", "old": 2, "new": 3}] and world.pids() == before
    operation = await world.apply(new, expect=plan["digest"])
    assert operation.status == "succeeded" and told(operation, "a")["rolled_back"] is False
    after = world.pids()
    assert (after["b"], after["c"]) == (before["b"], before["c"]) and after["a"] != before["a"]
    entry = world.fakes.registry.get("a")
    assert entry is not None and entry.slots_total == 3
    assert {pool.id: pool.slots for pool in world.config.pools} == {"a": 3, "b": 2, "c": 2}
    assert not (await world.applies.plan(new))["would_change"]
    assert world.fakes.records.facts(OVERRIDE).get("a", {}).get("changes") is None, "nothing beside the file is kept of it"


async def test_what_only_the_daemon_goes_by_is_taken_over_without_touching_an_engine(world: ApplyWorld) -> None:
    before = world.pids()
    new = world.file(
        {"id": "a", "preload": False, "restart": "never"}, {"id": "b"}, {"id": "c"}, supervision={"stop_grace_ms": 7},
        health={"failure_threshold": 9},
    )  # fmt: skip
    operation = await world.apply(new)
    assert operation.status == "succeeded" and told(operation, "a")["action"] == "take_over"
    assert world.pids() == before
    rules = {pool.pool_id: pool.definition.policy for pool in world.pools.all()}
    assert {(r.stop_grace_ms, r.failure_threshold) for r in rules.values()} == {(7, 9)}
    assert (rules["a"].restart, rules["b"].restart) == ("never", "on-failure")
    assert not runs_by_another(world.pools.get("a"), world.fakes.records), "its engine is the one that the file asks for"


async def test_one_that_does_not_do_goes_on_as_it_was_and_the_others_stand(world: ApplyWorld) -> None:
    before = world.pids()
    world.fakes.engines.found = (SpecError("cannot use the flag --nope"),)
    new = world.file({"id": "a", "slots": 3}, {"id": "b", "restart": "never"}, {"id": "c"}, {"id": "d", "preload": False})
    operation = await world.apply(new)
    assert operation.status == "failed" and operation.error is not None
    assert "1 of 3 pools (a), the others stand" in operation.error.message and operation.error.code == "APPLY_FAILED"
    assert told(operation, "a")["status"] == "failed" and "--nope" in told(operation, "a")["error"]
    assert [told(operation, pool_id)["status"] for pool_id in "bd"] == ["succeeded", "succeeded"]
    assert world.pids() == {**before, "d": None}
    assert "--nope" in str(world.applies.unapplied("a")) and world.applies.unapplied("b") is None
    assert {pool.id: pool.slots for pool in world.config.pools} == {"a": 2, "b": 2, "c": 2, "d": 2}, "a's word is not in force"
    assert [row["action"] for row in (await world.applies.plan(new))["pools"]] == ["reload"], "it is still to be done"
    world.fakes.engines.found = ()
    assert (await world.apply(new)).status == "succeeded" and world.applies.unapplied("a") is None


async def test_each_apply_is_counted_by_how_it_ended(world: ApplyWorld) -> None:
    new = world.file({"id": "a", "restart": "never"}, {"id": "b"}, {"id": "c"})
    for _ in range(2):
        assert (await world.apply(new)).status == "succeeded"
    world.fakes.engines.found = (SpecError("cannot use the flag --nope"),)
    assert (await world.apply(world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}))).status == "failed"
    with pytest.raises(RequestError):
        await world.apply(new, expect="another plan")
    counted = [event.fields["outcome"] for event in world.fakes.told if event.type == "apply"]
    assert counted == ["applied", "unchanged", "failed", "refused"]


async def test_what_could_not_be_applied_is_forgotten_once_the_file_takes_it_back(world: ApplyWorld) -> None:
    world.fakes.engines.found = (SpecError("no"),)
    await world.apply(world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}))
    assert world.applies.unapplied("a")
    await world.apply(world.file({"id": "a"}, {"id": "b"}, {"id": "c"}))
    assert world.applies.unapplied("a") is None


async def test_pools_that_are_not_named_are_kept_unless_they_may_go(world: ApplyWorld) -> None:
    new, before = world.file({"id": "a"}, {"id": "c"}), world.pids()
    operation = await world.apply(new)
    assert operation.outcome is not None and operation.outcome["kept"] == ["b"] and world.pids() == before
    world.fakes.registry.allocate_lease("b")
    operation = await world.begin(new, prune=True)
    await settle()
    assert operation.progress is not None and operation.progress["action"] == "remove"
    assert operation.status == "running" and world.pids()["b"] == before["b"], "its lease is waited for"
    world.fakes.registry.release_lease("b")
    world.pools.leases_changed("b")
    assert (await world.ended(operation)).status == "succeeded"
    assert world.pools.ids() == ["a", "c"] and [pool.id for pool in world.config.pools] == ["a", "c"]
    assert world.fakes.registry.get("b") is None and "b" not in world.store.pools


async def test_a_new_port_that_something_else_has_is_told_with_who_has_it(world: ApplyWorld) -> None:
    b = world.pools.get("b")
    assert isinstance(b.launch.prepared, PreparedEngine)
    b.launch = replace(b.launch, prepared=replace(b.launch.prepared, port=9100))
    asked: list[int] = []

    async def listener(_: int, __: str, port: int) -> Listener:
        asked.append(port)
        return Listener("other", "pid 7 (nginx)") if port in (9001, 9002) else NOBODY

    world.applies = Applies(
        world.pools, replace(world.services, listener=cast("Any", listener)), world.reloads, lambda: world.config, world.use
    )

    async def warned(*ports: int) -> list[str]:
        return (await world.applies.plan(given(*ports)))["pools"][0]["warnings"]  # type: ignore[no-any-return]

    def given(*ports: int) -> Config:
        return world.file({"id": "a", "provisioning": {"ports": ports}}, {"id": "b"}, {"id": "c"})

    so = "the pool does not get it while that is so"
    assert await warned(9001, 9000, 9002) == [f"port {port} is taken by pid 7 (nginx): {so}" for port in (9001, 9002)]
    assert await warned(9100) == [f"port 9100 is taken by pool 'b': {so}"]
    await world.apply(given(9001))
    asked.clear()
    changed = {"id": "a", "slots": 3, "provisioning": {"ports": [9001]}}
    plan = await world.applies.plan(world.file(changed, {"id": "b"}, {"id": "c"}))
    assert plan["pools"][0]["warnings"] == [] and asked == [], "it was given that before"


def needing(pool_id: str, gib: float) -> LaunchInputs:
    return LaunchInputs("fake-1", pool_id, EngineSettings(), weights_bytes=int(gib * (1 << 30)), overhead_bytes=0)


async def test_reloads_that_free_memory_come_before_those_that_need_more(world: ApplyWorld) -> None:
    for pool_id in "abc":
        world.fakes.needs[pool_id] = needing(pool_id, 4)
        await world.ended(await world.pools.change(world.pools.get(pool_id), "restart", ev.Restart(), "up"))
    new = world.file(*({"id": pool_id, "slots": 3} for pool_id in "abc"))

    async def order() -> list[str]:
        return [row["pool_id"] for row in (await world.applies.plan(new))["pools"]]

    assert await order() == ["a", "b", "c"], "nothing changes"
    world.fakes.needs |= {"a": needing("a", 6), "b": needing("b", 0), "c": needing("c", 3)}
    assert await order() == ["c", "b", "a"], "of b nobody knows it"
    seen = (await world.applies.plan(new))["digest"]
    world.fakes.needs["a"] = needing("a", 2)
    assert await order() == ["a", "c", "b"]
    operation = await world.apply(new, expect=seen)
    assert operation.outcome is not None and list(operation.outcome["pools"]) == ["a", "c", "b"], "the order is no other plan"


async def test_a_removal_says_how_the_engine_ends_and_for_how_long_at_most(world: ApplyWorld) -> None:
    new = world.file({"id": "c"}, lifecycle={"drain_deadline_ms": 4_000})
    told = ("pool_id", "ends_by", "drain_deadline_ms", "forecast_duration_ms")
    await world.ended(await world.pools.change(world.pools.get("b"), "stop", ev.Stop(), "down"))
    plan = await world.applies.plan(new, prune=True)
    assert [tuple(row[key] for key in told) for row in plan["pools"]] == [("a", "drain", 4_000, None), ("b", None, None, 0)]
    assert plan["forecast_duration_ms"] is None, "no stop of it was measured"
    for _ in range(2):  # a stop's time is kept with the next load's
        await world.ended(await world.pools.change(world.pools.get("a"), "restart", ev.Restart(), "up"))
    plan = await world.applies.plan(new, prune=True)
    assert plan["forecast_duration_ms"] == plan["pools"][0]["forecast_duration_ms"] >= 0


async def test_what_is_new_starts_and_a_failure_of_it_is_its_own(world: ApplyWorld) -> None:
    world.fakes.launcher.refusals = [EngineError("preload failed: no such program")]
    operation = await world.apply(world.file(*({"id": pool_id} for pool_id in "abcd"), {"id": "e", "preload": False}))
    assert operation.status == "failed" and "no such program" in told(operation, "d")["error"]
    assert told(operation, "e")["status"] == "succeeded" and world.pids()["e"] is None
    assert world.applies.unapplied("d") is None and len(world.config.pools) == 5, "it is there as the file says, and fails"


async def test_what_a_person_stopped_is_not_started_by_a_file(world: ApplyWorld) -> None:
    pool = world.pools.get("b")
    await (await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")).wait()
    operation = await world.apply(world.file({"id": "a"}, {"id": "b", "slots": 5}, {"id": "c"}))
    assert told(operation, "b")["action"] == "take_over" and world.pids()["b"] is None
    await (await world.pools.change(pool, "start", ev.Start(), "up", desired="up")).wait()
    entry = world.fakes.registry.get("b")
    assert entry is not None and entry.slots_total == 5, "its next start goes by it"


async def test_one_that_drains_is_not_changed_before_it_is_down(world: ApplyWorld) -> None:
    """The drain may be taken back, and what runs then is not what the file says."""
    pool, new = world.pools.get("b"), world.file({"id": "a"}, {"id": "b", "slots": 5}, {"id": "c"})
    world.fakes.registry.allocate_lease("b")
    drain = await world.pools.change(pool, "drain", ev.Drain(600_000, 0), "drained", desired="drained")
    operation = await world.apply(new)
    assert operation.status == "failed" and "it is draining" in told(operation, "b")["error"]
    world.fakes.registry.release_lease("b")
    world.pools.leases_changed("b")
    await drain.wait()
    assert told(await world.apply(new), "b")["action"] == "take_over" and world.pids()["b"] is None


async def test_one_that_fails_is_tried_again_by_what_the_file_says_now(world: ApplyWorld) -> None:
    pool = world.pools.get("b")
    await (await world.pools.change(pool, "stop", ev.Stop(), "down", desired="down")).wait()
    world.fakes.launcher.refuse = EngineError("preload failed: no")
    with pytest.raises(PoolError):
        await (await world.pools.change(pool, "start", ev.Start(), "up", desired="up")).wait()
    world.fakes.launcher.refuse = None
    operation = await world.apply(world.file({"id": "a"}, {"id": "b", "slots": 5}, {"id": "c"}))
    assert (told(operation, "b")["action"], operation.status) == ("start", "succeeded") and view(pool.state).ready


async def test_a_reload_by_hand_stays_until_the_file_says_something_else_of_that_pool(world: ApplyWorld) -> None:
    await world.ended(await world.reloads.begin(ReloadRequest("a", changes={"ctx": 512})))
    pid = world.pids()["a"]
    shown = await world.applies.plan(world.file({"id": "a"}, {"id": "b"}, {"id": "c"}))
    assert not shown["would_change"] and shown["pools"] == []
    assert shown["by_hand"] == [{"pool_id": "a", "runs": True, "changes": [{"key": "ctx", "old": 512, "new": None}]}]
    await world.apply(world.file({"id": "a"}, {"id": "b", "slots": 3}, {"id": "c"}))
    config = world.pools.get("a").config
    assert world.pids()["a"] == pid and config is not None and config.ctx == 512
    await world.apply(world.file({"id": "a", "ctx": 512}, {"id": "b", "slots": 3}, {"id": "c"}))
    assert world.pids()["a"] == pid, "what is written down runs already"
    assert "changes" not in world.fakes.records.facts(OVERRIDE).get("a", {})
    await world.apply(world.file({"id": "a"}, {"id": "b", "slots": 3}, {"id": "c"}))
    config = world.pools.get("a").config
    assert world.pids()["a"] != pid and config is not None and config.ctx is None


async def test_one_at_a_time_and_none_beside_a_reload_of_the_same_pool(world: ApplyWorld) -> None:
    new = world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"})
    first = await world.begin(new)
    with pytest.raises(RequestError, match="another one is being applied") as busy:
        await world.begin(new)
    assert (busy.value.code, busy.value.status, busy.value.retriable) == ("OPERATION_IN_PROGRESS", 409, True)
    for _ in range(50):  # until its own reload is under way
        if world.pools.precedence.has("a"):
            break
        await asyncio.sleep(0.001)
    with pytest.raises(RequestError, match="another one is being applied"):
        await world.applies.plan(new)
    await world.ended(first)
    reload = await world.reloads.begin(ReloadRequest("b", changes={"slots": 4}))
    with pytest.raises(RequestError, match="pool 'b' is being reloaded"):
        await world.begin(world.file({"id": "a", "slots": 3}, {"id": "b", "slots": 9}, {"id": "c"}))
    await world.ended(reload)
    assert (await world.apply(world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}))).status == "succeeded"


async def test_another_plan_than_the_one_that_was_shown_is_refused(world: ApplyWorld) -> None:
    shown = await world.applies.plan(world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}))
    with pytest.raises(RequestError) as refused:
        await world.begin(world.file({"id": "a", "slots": 4}, {"id": "b"}, {"id": "c"}), expect=shown["digest"])
    assert refused.value.code == "PLAN_CHANGED" and world.config.pools[0].slots == 2


async def test_what_comes_first_stops_everything_where_it_fails(world: ApplyWorld) -> None:
    before = world.config

    async def full(_: Plan) -> None:
        raise NodeError("cannot write the file")

    new = world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}, supervision={"stop_grace_ms": 7})
    with pytest.raises(NodeError):
        await world.begin(new, first=full)
    assert world.config == before and not [o for o in world.pools.operations.all() if o.kind == "apply"]
    assert (await world.apply(new)).status == "succeeded"


async def test_a_name_that_a_submitted_engine_has_is_refused_as_a_whole(world: ApplyWorld) -> None:
    await world.pools.submit("d", PreparedEngine("d", "/bin/true", port=1, verbatim=True))
    await settle()
    with pytest.raises(RequestError, match="pool 'd' is there already"):
        await world.begin(world.file({"id": "a", "slots": 3}, *({"id": pool_id} for pool_id in "bcd")))
    assert world.config.pools[0].slots == 2


async def test_a_registered_name_is_taken_over(world: ApplyWorld) -> None:
    await world.pools.register("d")
    operation = await world.apply(world.file(*({"id": pool_id} for pool_id in "abcd")))
    assert operation.status == "succeeded" and view(world.pools.get("d").state).ready


async def test_an_engine_of_somebody_else_is_let_go_and_attached_to_anew(world: ApplyWorld) -> None:
    outside = {"mode": "external", "url": "http://127.0.0.1:1"}
    operation = await world.apply(world.file({"id": "a", "provisioning": outside}, {"id": "b"}, {"id": "c"}))
    assert (told(operation, "a")["action"], operation.status) == ("restart", "succeeded"), operation.error
    assert world.pools.get("a").definition.external and world.pids()["a"] is None
    other = {"mode": "external", "url": "http://127.0.0.1:2"}
    assert (await world.apply(world.file({"id": "a", "provisioning": other}, {"id": "b"}, {"id": "c"}))).status == "succeeded"
    assert (await world.apply(world.file({"id": "b"}, {"id": "c"}), prune=True)).status == "succeeded"
    assert world.pools.ids() == ["b", "c"]


async def test_secrets_are_in_no_plan_outcome_or_event(world: ApplyWorld) -> None:
    given = {"env": {"HF_TOKEN": "s3cr3t-value"}, "flags": ["--api-key", "k3y-value-1"], "url": "http://u:pa55w0rd@h:1"}
    new = world.file({"id": "a", "provisioning": given}, {"id": "b"}, {"id": "c"}, {"id": "d", "provisioning": given})
    world.fakes.engines.found = (SpecError("cannot use s3cr3t-value"),)
    seen = [str(await world.applies.plan(new))]
    operation = await world.apply(new)
    seen += [str(operation.to_dict()), str(world.fakes.told), str(world.applies.unapplied("a"))]
    assert not any(secret in text for text in seen for secret in ("s3cr3t-value", "k3y-value-1", "pa55w0rd"))


async def test_a_daemon_that_ends_meanwhile_leaves_the_rest_to_the_next_one(world: ApplyWorld) -> None:
    operation = await world.begin(world.file({"id": "a", "slots": 3}, {"id": "b", "slots": 3}, {"id": "c"}))
    await settle()
    await world.applies.close()
    assert operation.status == "failed" and operation.error is not None and "shutting down" in operation.error.message


async def test_a_new_pool_that_is_not_started_takes_no_time(world: ApplyWorld) -> None:
    same = [{"id": pool_id} for pool_id in "abc"]
    plan = await world.applies.plan(world.file(*same, {"id": "d", "preload": False}))
    assert [row["action"] for row in plan["pools"]] == ["add"] and plan["forecast_duration_ms"] == 0
    plan = await world.applies.plan(world.file(*same, {"id": "d", "preload": False}, {"id": "e"}))
    assert plan["forecast_duration_ms"] is None, "how long the other takes was never measured"


async def test_the_end_is_told_with_how_many_pools_failed(world: ApplyWorld) -> None:
    told_of: list[int] = []
    await world.apply(world.file({"id": "a", "restart": "never"}, {"id": "b"}, {"id": "c"}), last=told_of.append)
    world.fakes.engines.found = (SpecError("cannot use the flag --nope"),)
    await world.apply(world.file({"id": "a", "slots": 3}, {"id": "b"}, {"id": "c"}), last=told_of.append)
    assert told_of == [0, 1]
