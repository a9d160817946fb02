"""Benches, carried out: a ready engine measured on purpose (core/bench.py has the numbers).

While one runs it holds a lease on every slot, so that placement sees it and nobody is measured along with it. It ends at once
when its engine is to serve no more, when nobody wants it any longer, and when its time is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from pool_managerd.core.artifacts import AnyEngine
from pool_managerd.core.bench import (
    LIMIT_S,
    MAX_SLOTS,
    BenchRequest,
    Round,
    TimedAnswer,
    baseline,
    figures,
    prompt,
    words_for,
)
from pool_managerd.core.event import Event
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.narration import count
from pool_managerd.errors import EngineError, NodeError, PoolError, RequestError, SpecError
from pool_managerd.supervision.in_flight import requests_of
from pool_managerd.supervision.measured import benched
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services

_T = TypeVar("_T")

HOLDER = "pool-managerd bench"
LEASE_S, RENEW_S = 30.0, 10.0
"""A daemon that dies leaves its leases for so long at most."""
_SHORT, _LONGER = 4, 12
_SERVES = (Phase.READY, Phase.ATTACHED)


@dataclass
class _Bench:
    """One that is under way. ``why`` is the reason to break it off."""

    request: BenchRequest
    pool: Pool
    engine: AnyEngine
    operation: Operation
    epoch: int
    sizes: tuple[int, int]
    began: float
    leases: list[str] = field(default_factory=list)
    asked: int = 0
    why: PoolError | None = None
    task: asyncio.Task[None] | None = None

    def stop(self, why: PoolError) -> None:
        if self.why is None and self.task is not None:
            self.why = why
            self.task.cancel()

    def serves(self) -> bool:
        return self.pool.instance.epoch == self.epoch and self.pool.instance.phase in _SERVES


class Benches:
    """Of all pools of a node, one at a time per pool."""

    def __init__(self, pools: Pools, services: Services) -> None:
        self._pools, self._s = pools, services
        self._running: dict[str, _Bench] = {}
        services.events.listen(self._hear)

    # --- for the node ---

    async def begin(self, request: BenchRequest) -> Operation:
        """Accept a bench; what it measured is the operation's outcome. Raises PoolError for what is refused at once."""
        pool = self._pools.get(request.pool_id)
        in_hand = await requests_of(pool, self._s)  # clients without a lease are not to be disturbed either
        async with self._pools.turn(pool):
            bench = self._accepted(request, pool, in_hand)
        await self._pools.operations.kept()
        return bench.operation

    def cancel(self, pool_id: str) -> Operation:
        """Break it off. Raises RequestError when there is none."""
        self._pools.get(pool_id)
        bench = self._running.get(pool_id)
        if bench is None:
            raise _refusal(pool_id, "cannot cancel the bench of pool '{}': there is none", "INVALID_PARAMS")
        bench.stop(_refusal(pool_id, "the bench of pool '{}' was cancelled", "OPERATION_CANCELLED"))
        return bench.operation

    async def close(self) -> None:
        """The daemon ends."""
        for bench in tuple(self._running.values()):
            bench.stop(NodeError("cannot finish the bench: the daemon is shutting down"))
            await asyncio.gather(*(bench.task,) if bench.task is not None else (), return_exceptions=True)

    # --- beginning ---

    def _accepted(self, request: BenchRequest, pool: Pool, in_hand: int) -> _Bench:
        """From here to the leases nothing is waited for, so that nobody can come in between."""
        pool_id, engine = request.pool_id, self._check(pool, in_hand)
        slots = engine.slots_total
        sizes = request.sizes(None if engine.ctx is None else engine.ctx // slots)
        operation = self._pools.operations.begin("bench", pool_id)
        bench = _Bench(request, pool, engine, operation, pool.instance.epoch, sizes, self._s.clock.monotonic())
        for _ in range(min(slots, MAX_SLOTS)):
            lease = self._s.registry.grant(
                pool_id, holder=HOLDER, given_at_ms=self._s.clock.wall_ms(), expires_at=bench.began + LEASE_S
            )
            bench.leases.append(lease.lease_id)
        self._pools.leases_changed(pool_id, expiry=True)
        self._running[pool_id] = bench
        bench.task = asyncio.create_task(self._run(bench), name=f"bench:{pool_id}")
        bench.task.add_done_callback(lambda _: self._broken_off_at_once(bench))
        human = f"Measuring pool '{pool_id}'; all its slots are leased meanwhile"
        self._s.events.emit("bench_started", human, pool_id=pool_id, slots=len(bench.leases), runs=request.runs)
        return bench

    def _check(self, pool: Pool, in_hand: int) -> AnyEngine:
        pool_id, engine, seen = pool.pool_id, pool.launch.prepared, view(pool.state)
        leases = self._s.registry.get_active_leases(pool_id)
        if self._pools.closing:
            raise NodeError(f"cannot bench pool '{pool_id}': the daemon is shutting down")
        if self._pools.precedence.has(pool_id) or pool_id in self._running:
            doing = "measured" if pool_id in self._running else "reloaded"
            raise _refusal(pool_id, f"cannot bench pool '{{}}': it is being {doing} already", "OPERATION_IN_PROGRESS")
        if not seen.ready or engine is None:
            raise _refusal(pool_id, f"cannot bench pool '{{}}': it is {seen.state}", "POOL_UNREADY", 503)
        if engine.warmup != "completion":
            raise SpecError(f"cannot bench pool '{pool_id}': it completes no prompts, and nothing else is measured")
        if leases or in_hand:
            shows = f"`pool-managerd {'leases' if leases else 'status'} {pool_id}`"
            what = f"{count(leases, 'lease')} in flight" if leases else f"its engine works on {count(in_hand, 'request')}"
            raise RequestError(
                f"cannot bench pool '{pool_id}': {what}, which would be slowed down and measured along", code="POOL_IN_USE",
                status=409, pool_id=pool_id, retriable=True,
                hint=f"wait until it is idle; {shows} shows what it has in hand",
            )  # fmt: skip
        return engine

    # --- carrying it out ---

    async def _run(self, bench: _Bench) -> None:
        pool_id, over = bench.request.pool_id, TimeoutError(f"it was not over within {LIMIT_S:g} s")
        late = self._s.clock.call_at(bench.began + LIMIT_S, lambda: bench.stop(_failed(bench, over)))
        renewing = asyncio.create_task(self._renew(bench))
        outcome: dict[str, Any] | None = None
        error: PoolError | None = None
        try:
            outcome = await self._measured(bench)
        except asyncio.CancelledError:
            error = bench.why or NodeError("cannot finish the bench: it was broken off")
        except PoolError as problem:
            error = problem
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as problem:
            error = _failed(bench, problem)
        except Exception as problem:  # noqa: BLE001 - the task's boundary: whoever waits must be told, and no lease stay
            error = self._s.events.fault(f"while pool '{pool_id}' was measured", problem, pool_id)
        finally:
            late.cancel()
            renewing.cancel()
            self._ended(bench, outcome, error)

    def _broken_off_at_once(self, bench: _Bench) -> None:
        """Before its task's first step, which would have told its end."""
        if bench.operation.status == "running":
            self._ended(bench, None, bench.why or NodeError("cannot finish the bench: it was broken off"))

    def _ended(self, bench: _Bench, outcome: dict[str, Any] | None, error: PoolError | None) -> None:
        pool_id = bench.request.pool_id
        self._running.pop(pool_id, None)
        for lease_id in bench.leases:
            with suppress(RequestError):  # the pool is gone, and its leases with it
                self._s.registry.release(pool_id, lease_id)
        if self._pools.find(pool_id) is bench.pool:
            self._pools.leases_changed(pool_id)
        if error is not None:
            self._s.events.clean_error(error)
            human = f"Pool '{pool_id}' was not measured: {error.message}"
            self._s.events.emit("bench_failed", human, level="warn", pool_id=pool_id)
        self._pools.operations.finish(bench.operation, outcome, error)

    async def _measured(self, bench: _Bench) -> dict[str, Any]:
        alone, full = await self._rounds(bench)
        found = figures(alone, full, bench.engine.slots_total)
        known = baseline(found, self._s.clock.wall_ms())
        measured = benched(self._s, bench.engine, known)
        self._pools.learn(bench.request.pool_id, bench.epoch, measured=measured)
        longer = next((one.measured_with for one in measured[:1] if one != known), None)
        human = (
            f"Pool '{bench.request.pool_id}' makes {known.tokens_per_s:.1f} tokens/s alone"
            + (f", {found['full']['tokens_per_s_total']:.1f} on {found['full']['requests']} slots" if found["full"] else "")
            + f" ({known.measured_with})"
            + (f"; its baseline stays what a longer bench has measured ({longer})" if longer else "")
        )
        self._s.events.emit("bench_succeeded", human, pool_id=bench.request.pool_id, **found)
        engine = {"engine": bench.engine.engine, "engine_version": bench.engine.engine_version}
        what = {"model_id": bench.engine.model_id, "device_mask": bench.engine.device_mask}
        took_ms = round((self._s.clock.monotonic() - bench.began) * 1000)
        return {"pool_id": bench.request.pool_id, **engine, **what, "duration_ms": took_ms,
                "measured_with": known.measured_with, "longer_bench": longer, **found}  # fmt: skip

    async def _rounds(self, bench: _Bench) -> tuple[list[Round], list[Round]]:
        """As many as were asked for; a slow engine is asked less often, but once alone and once with all slots."""
        self._progress(bench, 0, "seeing how long a prompt is")
        words = await self._words(bench)
        slots = len(bench.leases)
        alone = await self._repeated(bench, words, 1, until_s=LIMIT_S / 4)
        return alone, [] if slots == 1 else await self._repeated(bench, words, slots, until_s=LIMIT_S / 2)

    async def _repeated(self, bench: _Bench, words: int, at_once: int, *, until_s: float) -> list[Round]:
        """At least one round; further ones begin until so long after the bench did."""
        rounds: list[Round] = []
        runs, before = bench.request.runs, 0 if at_once == 1 else bench.request.runs
        what = "one request alone" if at_once == 1 else f"{count(at_once, 'request')} at once"
        while len(rounds) < runs and not (rounds and self._s.clock.monotonic() - bench.began > until_s):
            self._progress(bench, before + len(rounds), f"{what}, run {len(rounds) + 1} of {runs}")
            rounds.append(await self._round(bench, words, at_once))
        return rounds

    async def _round(self, bench: _Bench, words: int, at_once: int) -> Round:
        began = asyncio.get_running_loop().time()
        answers = await _all(self._ask(bench, words, bench.sizes[1]) for _ in range(at_once))
        return Round(tuple(answers), asyncio.get_running_loop().time() - began)

    async def _words(self, bench: _Bench) -> int:
        """How many words the prompts have: by what the engine counts of two short ones, else one for a token."""
        counted = [(words, (await self._ask(bench, words, 2)).prompt_tokens) for words in (_SHORT, _LONGER)]
        (few, short), (more, longer) = counted
        if short is None or longer is None:
            return bench.sizes[0]
        return words_for(bench.sizes[0], (few, short), (more, longer))

    async def _ask(self, bench: _Bench, words: int, tokens: int) -> TimedAnswer:
        bench.asked += 1
        text = prompt(words, f"{bench.operation.operation_id[-8:]} {bench.asked}:")
        return await self._s.prober.timed(bench.engine, text, tokens)

    def _progress(self, bench: _Bench, done: int, what: str) -> None:
        total = bench.request.runs * (1 if len(bench.leases) == 1 else 2)
        human = f"{bench.request.pool_id}: {what}"
        bench.operation.progress = {"done": done, "total": total, "human": human}
        self._s.events.emit(
            "bench_progress", human, level="debug", pool_id=bench.request.pool_id, operation_id=bench.operation.operation_id,
            done=done, total=total,
        )  # fmt: skip

    async def _renew(self, bench: _Bench) -> None:
        pool_id = bench.request.pool_id
        while True:
            await pause(self._s.clock, RENEW_S)
            try:
                for lease_id in bench.leases:
                    self._s.registry.renew(pool_id, lease_id, self._s.clock.monotonic() + LEASE_S)
            except RequestError:  # this daemon itself stood for so long that they ran out: others may be on the engine by now
                bench.stop(_refusal(pool_id, "the bench of pool '{}' was given up: its leases ran out", "OPERATION_CANCELLED"))
                return
            self._pools.leases_changed(pool_id, expiry=True)

    def _hear(self, event: Event) -> None:
        bench = self._running.get(event.pool_id or "")
        reloaded = bench is not None and self._pools.precedence.has(bench.request.pool_id)
        if bench is not None and (reloaded or not bench.serves()):
            state = "being reloaded" if reloaded else view(bench.pool.state).state
            why = f"the bench of pool '{{}}' was given up: it is {state} now"
            bench.stop(_refusal(bench.request.pool_id, why, "OPERATION_CANCELLED"))


async def _all(work: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """What all of them return, which run at once; the first error ends the others, and is raised."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failed(bench: _Bench, problem: Exception) -> EngineError:
    why = str(problem) or type(problem).__name__
    return EngineError(
        f"cannot bench pool '{bench.request.pool_id}': {why}", code="BENCH_FAILED", pool_id=bench.request.pool_id,
        hint="ask for fewer tokens or runs, or see what the engine says: pool-managerd logs " + bench.request.pool_id,
    )  # fmt: skip


def _refusal(pool_id: str, why: str, code: str, status: int = 409) -> RequestError:
    again = code in ("OPERATION_IN_PROGRESS", "POOL_IN_USE", "POOL_UNREADY")
    return RequestError(why.format(pool_id), code=code, status=status, pool_id=pool_id, retriable=again)
