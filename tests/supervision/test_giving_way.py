"""GPU memory that is to be free for others: who goes, who waits, who comes back, and what a start is told meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.core.gpu.devices import DeviceScan
from pool_managerd.core.gpu.kept_free import FreeRules
from pool_managerd.core.lifecycle import Desired
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import NodeError, RequestError
from tests.core.gpus import GIB, gpu, process
from tests.supervision.test_demand import DemandWorld


class Shared(DemandWorld):
    """``program`` is what holds ``foreign_gib`` of the GPU."""

    program = "blender"

    async def scan(self) -> DeviceScan:
        held = [process(one.pid, self.gib) for one in self.fakes.launcher.processes if not one._record.done()]
        others = [process(900, self.foreign_gib, name=self.program)] if self.foreign_gib else []
        self.fakes.monitor.show(gpu(0, 24, processes=(*held, *others)))
        return await self._scan()

    async def look(self) -> None:
        """A periodic scan has been."""
        await self.fakes.watch.rescan(periodic=True)
        await self.fakes.clock.advance(0.1)


@pytest.fixture
async def shared() -> AsyncIterator[Shared]:
    made = Shared(gib=5)
    made.config.pools[0].__dict__["preload"] = True
    yield made
    await made.end()


async def test_a_gpu_that_is_yielded_is_left_as_soon_as_nothing_is_in_flight_and_taken_back_afterwards(shared: Shared) -> None:
    shared.release(await shared.have("a"))
    busy = await shared.have("b")
    await shared.fakes.gpus.yields.begin([], 3600)
    await shared.pass_until(lambda: shared.ready() == ["b"])
    waiter = shared.ask("b")
    await shared.fakes.clock.advance(5)
    assert not waiter.done() and shared.ready() == ["b"], "who is served is not cut off, and nobody new is served"
    shared.release(busy)
    await shared.pass_until(waiter.done)
    with pytest.raises(NodeError, match=r"GPU 0 is left to others \(yielded until ") as refused:
        await waiter
    assert refused.value.code == "GPU_YIELDED" and refused.value.hint == "`pool-managerd yield --end` takes it back"
    assert shared.ready() == [] and shared.fakes.registry.snapshots()[0].vram_available_bytes == 0
    await shared.fakes.clock.advance(3600)
    await shared.pass_until(lambda: shared.ready() == ["a"])
    assert shared.pools.get("b").state.desired is Desired.EVICTED, "it starts when it is asked for"
    assert (await shared.have("b"))["started"]


async def test_a_start_by_hand_on_a_yielded_gpu_is_refused_whatever_is_thought_of_what_fits(shared: Shared) -> None:
    shared.fakes.admission._rules = shared.fakes.admission._rules.__class__(cpu_allowed=True, fit="off")
    await shared.fakes.gpus.yields.begin(["0"], None)
    await shared.begin("a")
    state = shared.pools.get("a").state
    assert state.lacks_room and state.last_error is not None and "GPU 0 is left to others (yielded)" in state.last_error
    await shared.fakes.gpus.yields.end([])
    await shared.pass_until(lambda: shared.ready() == ["a"], seconds=120)


async def test_what_is_yielded_is_known_to_the_next_daemon_and_ends_in_its_time(shared: Shared) -> None:
    await shared.fakes.gpus.yields.begin(["0"], 60)
    again = type(shared.fakes.gpus.yields)(
        shared.fakes.watch, shared.fakes.clock, shared.fakes.events, shared.fakes.records, FreeRules
    )
    again.restore()
    assert [one.until_ms for one in again.all()] == [one.until_ms for one in shared.fakes.gpus.yields.all()]
    await shared.fakes.clock.advance(61)
    assert again.all() == [] and shared.fakes.records.facts("yield") == {}


async def test_a_gpu_that_is_not_there_cannot_be_yielded(shared: Shared) -> None:
    with pytest.raises(RequestError, match="device 7 not found"):
        await shared.fakes.gpus.yields.begin(["7"], None)
    assert shared.fakes.gpus.yields.all() == []


async def test_pinned_pools_leave_a_gpu_that_a_person_wants_and_no_other(shared: Shared) -> None:
    shared.config.pools[0].__dict__["pinned"] = True
    shared.release(await shared.have("a"))
    shared.fakes.free_rules = FreeRules(22 * GIB)
    await shared.look()
    await shared.fakes.clock.advance(5)
    assert shared.ready() == ["a"]
    shared.fakes.free_rules = FreeRules()
    await shared.fakes.gpus.yields.begin([], None)
    await shared.pass_until(lambda: shared.ready() == [])


async def test_idle_pools_go_when_others_leave_less_free_than_is_to_be_and_come_back_when_they_are_gone(shared: Shared) -> None:
    shared.fakes.free_rules = FreeRules(8 * GIB)
    for model in ("a", "b"):
        shared.release(await shared.have(model))
        await shared.fakes.clock.advance(1)
    shared.foreign_gib = 7
    await shared.look()
    await shared.pass_until(lambda: shared.ready() == ["b"])
    shared.foreign_gib = 12
    await shared.look()
    await shared.pass_until(lambda: shared.ready() == [])
    with pytest.raises(NodeError, match=r"kept free 8 GiB \(gpu.keep_free_mib\)"):
        await shared.demand.acquire(AcquireRequest("b"))
    shared.foreign_gib = 0
    await shared.look()
    await shared.fakes.clock.advance(30)
    assert shared.ready() == [], "it does not come and go with what others hold"
    await shared.pass_until(lambda: shared.ready() == ["a"])


async def test_a_program_that_is_named_has_the_gpu_while_it_runs(shared: Shared) -> None:
    shared.fakes.free_rules = FreeRules(programs=("blend*",))
    shared.release(await shared.have("a"))
    shared.foreign_gib, shared.program = 0.5, "firefox"
    await shared.look()
    await shared.fakes.clock.advance(5)
    assert shared.ready() == ["a"]
    shared.program = "blender"
    await shared.look()
    await shared.pass_until(lambda: shared.ready() == [])
    with pytest.raises(NodeError, match="blender runs there"):
        await shared.demand.acquire(AcquireRequest("b"))
    shared.foreign_gib = 0
    await shared.look()
    await shared.pass_until(lambda: shared.ready() == ["a"])


async def test_what_a_person_stopped_meanwhile_does_not_come_back(shared: Shared) -> None:
    shared.release(await shared.have("a"))
    await shared.fakes.gpus.yields.begin([], None)
    await shared.pass_until(lambda: shared.ready() == [])
    await shared.pools.change(shared.pools.get("a"), "stop", ev.Stop(), "down", desired="stopped")
    await shared.fakes.gpus.yields.end([])
    await shared.fakes.clock.advance(30)
    assert shared.ready() == []
