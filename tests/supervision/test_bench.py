"""Benches on fake parts and a manual clock: what they hold, what they refuse, how they end, and what stays of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pool_managerd.core.bench import LIMIT_S, BenchRequest
from pool_managerd.core.health import Counters
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.lifecycle import view
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import PoolError
from pool_managerd.supervision.bench import HOLDER, LEASE_S, Benches
from pool_managerd.supervision.measured import baseline_key
from pool_managerd.supervision.operations import Operation
from pool_managerd.testing.manual_clock import settle
from tests.supervision.test_pools import World


class Benched(World):
    def __init__(self) -> None:
        super().__init__()
        self.benches = Benches(self.pools, self.services)

    async def bench(self, **asked: Any) -> Operation:
        operation = await self.benches.begin(BenchRequest("p", **asked))
        await settle(200)
        return operation

    def leases(self) -> list[str | None]:
        return [lease.holder for lease in self.fakes.registry.leases("p")]

    async def refusal(self, **asked: Any) -> PoolError:
        with pytest.raises(PoolError) as caught:
            await self.benches.begin(BenchRequest("p", **asked))
        return caught.value


@pytest.fixture
async def world() -> AsyncIterator[Benched]:
    made = Benched()
    await made.up()
    yield made
    await made.benches.close()
    await made.pools.close()


async def test_it_measures_alone_and_on_all_slots_and_what_it_found_is_the_pools_baseline(world: Benched) -> None:
    operation = await world.bench(tokens=20, runs=2)
    assert operation.status == "succeeded" and operation.outcome is not None and operation.to_dict()["progress"] is None
    found, prober = operation.outcome, world.fakes.prober
    assert (found["runs"], found["slots"], found["full"]["requests"], prober.at_once) == (2, 2, 2, 2)
    assert found["alone"]["tokens_per_s"] == pytest.approx(50.0) and found["alone"]["first_token_ms_p50"] == 20.0
    assert found["prompt_tokens"] == 511, "as the engine counts: two for each word and three more"
    assert len(set(prober.timed_prompts)) == 2 + 2 + 4, "none is cached from another"
    entry, engine = world.fakes.registry.get("p"), world.p.launch.prepared
    assert entry is not None and entry.perf_hints is not None and engine is not None
    assert entry.perf_hints.measured_with == found["measured_with"] == "bench of 20 tokens behind a prompt of 511, 2 runs"
    assert world.leases() == [] and entry.slots_free == 2
    warm = world.services.baselines.get(baseline_key(engine))
    assert warm is not None and warm.samples == 1, "nothing of it is folded into the warm-ups"
    rows = world.services.records.facts("baseline")["all"]["rows"]
    assert [len(row) for row in rows] == [8, 9], "kept for the next daemon"


async def test_a_shorter_one_is_told_and_the_longer_one_stays_the_baseline(world: Benched) -> None:
    long = (await world.bench(tokens=20, runs=2)).outcome
    short = (await world.bench(tokens=2, prompt_tokens=8, runs=2)).outcome
    assert long is not None and short is not None
    assert (long["longer_bench"], short["longer_bench"]) == (None, long["measured_with"])
    assert world.p.launch.measured[0].measured_with == long["measured_with"]
    assert f"stays what a longer bench has measured ({long['measured_with']})" in world.fakes.told[-1].human


async def test_while_it_runs_every_slot_is_leased_and_renewed(world: Benched) -> None:
    world.fakes.prober.stuck = True
    operation = await world.bench()
    assert operation.status == "running" and world.leases() == [HOLDER] * 2
    assert operation.to_dict()["progress"] == {"done": 0, "total": 6, "human": "p: seeing how long a prompt is"}
    await world.fakes.clock.advance(2 * LEASE_S)
    assert operation.status == "running" and world.leases() == [HOLDER] * 2
    assert (await world.refusal()).code == "OPERATION_IN_PROGRESS"
    world.benches.cancel("p")
    await settle()
    assert operation.status == "failed" and operation.error is not None and operation.error.code == "OPERATION_CANCELLED"
    assert world.leases() == [] and world.fakes.prober.at_once_now == 0
    with pytest.raises(PoolError, match="there is none"):
        world.benches.cancel("p")


@pytest.mark.parametrize("event", [ev.Drain(60_000, 0), ev.Stop(), ev.Restart()])
async def test_whoever_wants_the_pool_has_it_at_once(world: Benched, event: ev.Event) -> None:
    world.fakes.prober.stuck = True
    operation = await world.bench()
    await world.pools.change(world.p, "x", event, "down" if isinstance(event, ev.Stop) else "now")
    await settle()
    assert operation.error is not None and operation.error.message.startswith("the bench of pool 'p' was given up: it is ")
    assert world.leases() == [] and view(world.p.state).state in ("offline", "ready")


async def test_a_reload_is_not_measured_and_does_not_wait_for_a_bench(world: Benched) -> None:
    world.fakes.prober.stuck = True
    operation = await world.bench()
    await world.reloads.begin(ReloadRequest("p", changes={"slots": 3}))
    assert (await world.refusal()).code == "OPERATION_IN_PROGRESS"
    deadline = time.monotonic() + 10
    while operation.status == "running":
        assert time.monotonic() < deadline, "the bench goes on"
        await asyncio.sleep(0.001)
    assert operation.error is not None and operation.error.code == "OPERATION_CANCELLED" and world.leases() == []
    await world.reloads.close()


async def test_it_is_over_when_its_time_is(world: Benched) -> None:
    world.fakes.prober.stuck = True
    operation = await world.bench()
    await world.fakes.clock.advance(LIMIT_S)
    assert operation.error is not None and operation.error.code == "BENCH_FAILED"
    assert "not over within 600 s" in operation.error.message and world.leases() == []


async def test_a_slow_engine_is_asked_once_alone_and_once_on_all_slots(world: Benched) -> None:
    """Each answer takes a third of the time that there is."""
    timed = world.fakes.prober.timed

    async def slowly(*asked: Any) -> Any:
        world.fakes.clock._now += LIMIT_S / 6
        return await timed(*asked)

    world.fakes.prober.timed = slowly  # type: ignore[method-assign,assignment]
    operation = await world.bench(runs=9)
    assert operation.outcome is not None, operation.error
    assert (operation.outcome["alone"]["runs"], operation.outcome["full"]["runs"]) == (1, 1)
    assert operation.outcome["measured_with"].endswith("one run")


async def test_an_engine_that_answers_wrongly_is_told_of_and_nothing_is_kept(world: Benched) -> None:
    world.fakes.prober.first_token_ms = None
    operation = await world.bench()
    assert operation.error is not None and "the engine answered 400: too long" in operation.error.message
    assert world.leases() == [] and [len(row) for row in world.services.baselines.to_rows()] == [8]


async def test_it_is_refused_where_it_would_disturb_or_could_not_measure(world: Benched) -> None:
    lease = world.fakes.registry.grant("p")
    refused = await world.refusal()
    assert refused.code == "POOL_IN_USE" and "one lease in flight" in refused.message and "leases p" in str(refused.hint)
    world.fakes.registry.release("p", lease.lease_id)
    world.fakes.prober.told = Counters(tokens=1, requests=2)
    refused = await world.refusal()
    assert refused.code == "POOL_IN_USE" and "its engine works on 2 requests" in refused.message
    world.fakes.prober.told = None
    engine = world.p.launch.prepared
    assert engine is not None
    world.pools.learn("p", world.p.instance.epoch, prepared=replace(engine, warmup="embedding"))
    assert "it completes no prompts" in (await world.refusal()).message
    world.pools.learn("p", world.p.instance.epoch, prepared=replace(engine, ctx=64))
    assert "a slot has 32 tokens of context" in (await world.refusal(prompt_tokens=64)).message
    await world.pools.change(world.p, "stop", ev.Stop(), "down")
    await settle()
    assert (await world.refusal()).code == "POOL_UNREADY"
    assert world.leases() == []
