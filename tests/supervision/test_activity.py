"""Watching an engine beside its probes, on fake parts and a manual clock: what is read when, and what is done about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.engines import CounterNames
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.supervision.status import status_of
from pool_managerd.testing.fake_watch import FakeProber
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World

SILENT = ProbeResult(ProbeOutcome.TIMEOUT, "had no answer within 2 s")
CPU = 1.5


class Prober(FakeProber):
    """Counts what it is asked. ``stuck``: a prompt is not answered, ``refuses``: with an error; ``silent``: counters are not."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.prompts = 0
        self.stuck, self.silent, self.refuses = False, False, False

    async def counters(self, url: str, names: CounterNames, timeout_s: float) -> Counters | None:
        self.asked += 1
        if self.silent:
            raise TimeoutError
        return self.told

    async def warm_up(self, engine: AnyEngine, timeout_s: float) -> tuple[float, float]:
        self.prompts += 1
        if self.stuck:
            raise TimeoutError
        if self.refuses:
            raise ValueError("the engine answered 400")
        return 20.0, 50.0


class Watched(World):
    """A pool whose engine is seen from outside."""

    prober: Prober

    async def pass_s(self, seconds: float, *, cores: float = 0.0) -> None:
        """Time passes, in which the engine uses so many CPUs."""
        for _ in range(round(seconds)):
            self.fakes.usages.cpu_s += cores
            await self.fakes.clock.advance(1)

    def errors(self) -> list[str]:
        """Why the pool was called unhealthy, each time."""
        return [str(event.fields["last_error"]) for event in self.fakes.told if event.type == "unhealthy"]

    def status(self) -> dict[str, Any]:
        return status_of(self.p, self.fakes.registry, "home", self.fakes.clock.monotonic(), 0)


@pytest.fixture
async def world() -> AsyncIterator[Watched]:
    made = Watched()
    made.prober = made.fakes.prober = Prober()
    made.fakes.usages.seen = True
    made.pools = type(made.pools)(made.config, made.fakes.services(), made.store, made.store, made.new_id)
    yield made
    await made.pools.close()


async def test_an_idle_engine_is_asked_for_its_counters_now_and_then_and_a_leased_one_at_every_probe(world: Watched) -> None:
    await world.up()
    world.prober.told = Counters(tokens=7, requests=0)
    await world.pass_s(120)
    idle, probes = world.prober.asked, world.prober.probes
    assert 2 <= idle <= probes / 12 + 1
    world.fakes.registry.allocate_lease("p")
    await world.pass_s(60)
    assert world.prober.asked - idle == world.prober.probes - probes
    assert world.status()["activity"] == {"verdict": "idle", "why": "has nothing to do"}
    assert view(world.p.state).ready and world.prober.prompts == 1, "the warm-up"


async def test_an_engine_without_counters_is_asked_once(world: Watched) -> None:
    await world.up()
    await world.pass_s(60)
    assert world.prober.asked == 1


async def test_requests_that_stand_still_end_the_engine_after_a_prompt_of_our_own_stood_still_too(world: Watched) -> None:
    await world.up()
    world.prober.told, world.prober.stuck = Counters(tokens=7, requests=3), True
    await world.pass_s(40)
    assert world.prober.prompts == 2 and world.status()["activity"]["verdict"] == "busy"
    assert view(world.p.state).ready
    await world.pass_s(35)
    assert world.fakes.launcher.processes[0].signals == ["term"]
    assert ["answers its health probes, but 3 requests have stood still for" in error for error in world.errors()] == [True]


async def test_a_gauge_that_is_old_does_not_end_an_engine_that_answers_our_prompt(world: Watched) -> None:
    await world.up()
    world.prober.told = Counters(tokens=7, requests=1)
    await world.pass_s(900)
    assert world.fakes.launcher.processes[0].signals == [] and view(world.p.state).ready
    assert 1 < world.prober.prompts < 900 / 30 + 2


async def test_a_client_that_the_engines_gauges_do_not_know_gets_it_asked_and_a_prompt_without_an_answer_ends_it(
    world: Watched,
) -> None:
    """As vLLM with a core that stands still: what comes then is in none of its gauges."""
    await world.up()
    world.prober.told, world.prober.stuck = Counters(tokens=7, requests=0), True
    world.fakes.registry.allocate_lease("p")
    await world.pass_s(120)
    assert world.prober.prompts == 1, "nobody is connected: the warm-up alone"
    world.fakes.usages.clients = (35.0,)
    await world.pass_s(6)
    assert world.prober.prompts == 2 and view(world.p.state).ready
    await world.pass_s(50)
    assert view(world.p.state).ready and world.status()["activity"]["why"].startswith("is at work (a prompt of the daemon's own")
    await world.pass_s(15)
    assert ["a prompt of the daemon's own has not been answered for" in error for error in world.errors()] == [True]
    assert world.fakes.launcher.processes[0].signals == ["term"]


async def test_a_connection_that_is_only_kept_open_gets_the_engine_asked_once(world: Watched) -> None:
    await world.up()
    world.prober.told = Counters(tokens=7, requests=0)
    for second in range(600):
        world.fakes.usages.clients = (float(second),)
        await world.pass_s(1)
    assert world.prober.prompts == 2 and view(world.p.state).ready and not world.errors()


async def test_an_engine_that_refuses_our_prompt_is_not_held_to_hang(world: Watched) -> None:
    await world.up()
    world.prober.told = Counters(tokens=7, requests=0)
    world.prober.refuses, world.fakes.usages.clients = True, (1_000.0,)
    await world.pass_s(900)
    assert world.prober.prompts == 2 and view(world.p.state).ready and not world.errors()


async def test_counters_that_are_not_answered_any_more_are_work_that_stands_still(world: Watched) -> None:
    """llama.cpp answers /health from another thread than /metrics: with the GPU hung, only the first is answered."""
    await world.up()
    world.prober.told = Counters(tokens=7, requests=0)
    world.fakes.registry.allocate_lease("p")
    await world.pass_s(30)
    world.prober.silent = world.prober.stuck = True
    await world.pass_s(55)
    assert view(world.p.state).ready
    await world.pass_s(30)
    assert ["its own counters have not been answered for" in error for error in world.errors()] == [True]
    assert world.fakes.launcher.processes[0].signals == ["term"]


async def test_a_silent_engine_is_left_alone_while_it_computes(world: Watched) -> None:
    await world.up()
    await world.pass_s(20, cores=CPU)
    world.prober.result = SILENT
    await world.pass_s(300, cores=CPU)
    assert world.fakes.launcher.processes[0].signals == [] and not view(world.p.state).ready
    assert world.status()["activity"] == {"verdict": "busy", "why": "is at work (1.5 CPUs)"}
    assert world.fakes.types().count("busy") == 1
    world.prober.result = ProbeResult(ProbeOutcome.SUCCESS)
    await world.pass_s(6)
    assert view(world.p.state).ready and world.p.state.last_error is None


async def test_a_silent_engine_that_stands_still_is_replaced_after_the_threshold(world: Watched) -> None:
    await world.up()
    await world.pass_s(20)
    world.prober.result = SILENT
    await world.pass_s(20)
    assert str(world.p.state.last_error).endswith("had no answer within 2 s; nothing of it moves")
    assert world.fakes.launcher.processes[0].signals == ["term"]


async def test_what_was_seen_of_one_launch_is_not_held_against_the_next(world: Watched) -> None:
    await world.up()
    world.prober.told, world.prober.stuck = Counters(tokens=7, requests=3), True
    await world.pass_s(75)
    assert world.p.state.active.epoch == 2
    world.prober.told, world.prober.stuck = Counters(tokens=1, requests=0), False
    await world.pass_s(10)
    await settle()
    assert view(world.p.state).ready and world.status()["activity"]["verdict"] == "idle"


async def test_a_killed_process_that_does_not_end_is_told_with_where_it_is_stuck(world: Watched) -> None:
    world.fakes.launcher.ignores_term = True
    await world.up()
    process = world.fakes.launcher.processes[0]
    process.kill = lambda: process.signals.append("kill")  # type: ignore[method-assign]
    world.fakes.usages.blocked = "pid 4000 (x) is in uninterruptible sleep (D) in nfs_wait"
    operation = await world.pools.change(world.p, "stop", ev.Stop(), "down", desired="stopped")
    await world.pass_s(40)
    assert operation.status == "failed"
    assert "survived SIGKILL for 10 s; pid 4000 (x) is in uninterruptible sleep (D) in nfs_wait" in str(world.p.state.last_error)
