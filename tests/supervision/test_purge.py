"""Purges on fake parts: what is refused, what ends first, and what is left."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.artifacts import AttachedEngine
from pool_managerd.core.lifecycle import Desired, Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.purge import PurgeRequest
from pool_managerd.core.slot_cache import SlotSaving
from pool_managerd.errors import NodeError, PoolError, SpecError
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.purge import Purges
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

CACHE = {"path": "/run/cache/p", "bytes": 700}
WORK = {"path": "/run/work/p", "bytes": 20}


class Purged(World):
    def __init__(self) -> None:
        super().__init__(ids=["p", "q"])
        self.purges = Purges(self.pools, self.services, lambda: self.config)
        self.fakes.launcher.stored = {("p", "cache"): 700, ("p", "work"): 20, ("q", "cache"): 5}

    async def purge(self, **asked: Any) -> Operation:
        operation = await self.purges.begin(PurgeRequest("p", **asked))
        await settle(200)
        return operation

    async def refusal(self, **asked: Any) -> PoolError:
        """Of the plan and of the purge alike."""
        raised = []
        for ask in (self.purges.plan, self.purges.begin):
            with pytest.raises(PoolError) as caught:
                await ask(PurgeRequest("p", **asked))
            raised.append(caught.value)
        assert raised[0].message == raised[1].message and self.fakes.launcher.purged == []
        return raised[1]


@pytest.fixture
async def world() -> AsyncIterator[Purged]:
    made = Purged()
    await made.up()
    yield made
    await made.purges.close()
    await made.pools.close()


async def test_an_engine_is_drained_and_then_nothing_is_left_but_the_pool(world: Purged) -> None:
    lease = world.fakes.registry.grant("p")
    epoch = world.p.instance.epoch
    operation = await world.purge(delete_cache_dirs=True)
    assert operation.status == "running" and world.fakes.registry.get_draining("p") and world.fakes.launcher.purged == []
    world.fakes.launcher.seen = lambda: pytest.fail("it runs still") if world.p.instance.has_process else None
    world.fakes.registry.release("p", lease.lease_id)
    world.pools.leases_changed("p")
    await settle(200)
    assert operation.outcome == {"pool_id": "p", "removed": [CACHE, WORK], "freed_bytes": 720}, operation.error
    assert view(world.p.state).state == "uninitialized" and world.p.state.desired is Desired.DRAINED
    assert world.fakes.launcher.purged == [("p", "work"), ("p", "cache")] and ("q", "cache") in world.fakes.launcher.stored
    await world.start()
    await settle()
    assert view(world.p.state).ready and world.p.instance.epoch == epoch + 1, "no epoch is used twice"


async def test_a_purge_by_force_waits_for_nobody_and_keeps_the_cache_unless_told(world: Purged) -> None:
    world.fakes.registry.grant("p")
    operation = await world.purge(force=True)
    assert operation.outcome == {"pool_id": "p", "removed": [WORK], "freed_bytes": 20}
    assert world.fakes.registry.get_active_leases("p") == 0 and world.p.state.desired is Desired.STOPPED


@pytest.mark.parametrize("cache", [True, False])
async def test_a_purge_of_the_cache_has_nothing_saved_into_it_first(world: Purged, cache: bool) -> None:
    world.fakes.engines.slots = SlotSaving("/run/cache/p/slots")
    await world.pools.change(world.p, "restart", ev.Restart(), "up")
    await settle(200)
    world.fakes.slots.asked.clear()
    assert (await world.purge(delete_cache_dirs=cache)).status == "succeeded"
    assert world.fakes.slots.asked == (["unwanted p", "save p", "wanted p"] if cache else ["save p"])


async def test_a_pool_that_is_down_stays_what_it_was(world: Purged) -> None:
    await world.pools.change(world.p, "evict", ev.Evict(), "down")
    await settle()
    operation = await world.purge(drain_first=False)
    assert operation.status == "succeeded" and world.p.state.desired is Desired.EVICTED
    assert view(world.p.state).state == "uninitialized"


async def test_an_engine_that_fails_again_and_again_is_started_no_more(world: Purged) -> None:
    world.fakes.launcher.refuse = PoolError("no such program")
    await world.pools.change(world.p, "restart", ev.Restart(), "up")
    await settle()
    assert world.p.instance.phase is Phase.BACKOFF
    operation = await world.purge(drain_first=False)
    assert operation.status == "succeeded", operation.error
    await world.fakes.clock.advance(600)
    assert view(world.p.state).state == "uninitialized"


async def test_a_dry_run_says_it_all_and_does_nothing(world: Purged) -> None:
    plan = await world.purges.plan(PurgeRequest("p", delete_cache_dirs=True))
    assert plan == {"pool_id": "p", "stops_by": "drain", "would_remove": [CACHE, WORK], "would_free_bytes": 720}
    assert (await world.purges.plan(PurgeRequest("p", force=True)))["stops_by"] == "stop"
    assert view(world.p.state).ready and world.fakes.launcher.purged == [] and world.pools.operations.all()[-1].kind == "start"


async def test_what_serves_is_not_purged_unless_it_may_be_ended(world: Purged) -> None:
    refused = await world.refusal(drain_first=False)
    assert (refused.code, refused.status) == ("POOL_IN_USE", 409) and "it is ready" in refused.message


async def test_files_that_somebody_put_there_are_named_and_nothing_is_touched(world: Purged) -> None:
    world.pools.add("q", world.config.pools[1])
    refused = await world.refusal(purge_models=("file:m.gguf",))
    assert (refused.code, refused.status) == ("NOT_OURS", 409)
    assert f"({Path.cwd()}/m.gguf)" in refused.message and "pools run it: q" in refused.message
    assert "no pool runs it any more" in str(refused.hint)
    refused = await world.refusal(purge_models=("hf:org/m",), force=True)
    assert "the model hf:org/m is kept for all pools" in refused.message and "models rm hf:org/m" in str(refused.hint)
    refused = await world.refusal(purge_engine=True)
    assert refused.code == "NOT_OURS" and "its engine is" in refused.message
    assert view(world.p.state).ready
    with pytest.raises(SpecError, match="65 models are named"):
        PurgeRequest("p", purge_models=("file:x",) * 65)


async def test_one_at_a_time_and_not_while_it_is_reloaded_or_of_somebody_elses_engine(world: Purged) -> None:
    world.fakes.registry.grant("p")
    await world.purge()
    assert "it is being purged already" in (await world.refusal()).message
    await world.pools.change(world.p, "stop", ev.Stop(), "down")
    await settle(200)
    await world.submit(world.p, AttachedEngine("p", "http://127.0.0.1:1"))
    world.fakes.launcher.purged.clear()
    assert (await world.refusal()).code == "NOT_OURS"


async def test_a_drain_that_is_taken_back_leaves_everything(world: Purged) -> None:
    world.fakes.registry.grant("p")
    operation = await world.purge()
    await world.pools.change(world.p, "undrain", ev.Undrain(), "now", desired="up")
    await settle(200)
    assert operation.error is not None and operation.error.code == "OPERATION_CANCELLED"
    assert view(world.p.state).ready and world.fakes.launcher.purged == []


async def test_a_start_that_comes_while_it_ends_is_not_cut_off(world: Purged) -> None:
    """The last one to ask decides: it runs again before anything could be deleted."""
    process = world.fakes.launcher.processes[0]
    process._ignores_term = True
    operation = await world.purge(force=True)
    assert world.p.instance.phase is Phase.STOPPING
    await world.pools.change(world.p, "start", ev.Start(), "up", desired="up")
    process.kill()
    await settle(200)
    assert view(world.p.state).ready and world.fakes.launcher.purged == []
    assert operation.error is not None and "somebody started it meanwhile" in operation.error.message


async def test_an_engine_that_was_replaced_and_has_leases_still_has_the_directories(world: Purged) -> None:
    other: list[Any] = [world.p]
    world.pools.replacements.find = lambda _: other[0] if other else None  # type: ignore[method-assign,assignment]
    assert "the engine that it ran before has not ended yet" in (await world.refusal()).message
    operation = await world.purge(force=True)
    assert operation.status == "running" and world.fakes.launcher.purged == [] and not world.p.instance.has_process
    other.clear()
    await world.fakes.clock.advance(1)
    await settle(200)
    assert operation.status == "succeeded", operation.error


async def test_what_the_disk_forbids_is_told(world: Purged) -> None:
    def full() -> None:
        raise NodeError("cannot take away /run/work/p: Read-only file system")

    world.fakes.launcher.seen = full
    operation = await world.purge()
    assert operation.error is not None and "Read-only" in operation.error.message
    assert view(world.p.state).state == "offline"
