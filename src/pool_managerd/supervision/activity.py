"""Watching one engine from outside, at every probe: what its processes use, what it says of its own work.

The reading is cheap while nothing is doubtful: one small read per process, and its counters at every twelfth probe. More is
read while it loads, works or is leased, and while its probes fail. What it means is decided in `core.activity`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from pool_managerd.core.activity import NOT_SEEN, Activity, ActivityRules, Sample, Track, doubtful, ignored, judge, observe
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.engines import ENGINES, CounterNames
from pool_managerd.core.health import Counters, ProbeOutcome, ProbeResult
from pool_managerd.core.lifecycle import Phase
from pool_managerd.core.lifecycle.phase import SERVING
from pool_managerd.errors import PoolError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import UsageReader
from pool_managerd.supervision.services import Services

_LOAD_GAP_S = 1.0
_IDLE_LOOKS = 12
"""Of so many looks at an idle engine one asks for its counters."""


@dataclass(slots=True)
class _Seen:
    """What is known of one launch. ``asked_at``: since when its counters have been asked for without an answer.

    Of prompts of our own: ``prompted_at`` is when the last was sent, ``unanswered_at`` since when they have not been answered,
    ``answered_at`` when one was.
    """

    epoch: int
    looks: int = 0
    looked_at: float = float("-inf")
    reader: UsageReader | None = None
    track: Track | None = None
    activity: Activity = NOT_SEEN
    counters: Counters | None = None
    has_counters: bool = True
    asked_at: float | None = None
    asking: bool = False
    prompted_at: float = float("-inf")
    unanswered_at: float | None = None
    answered_at: float = float("-inf")


class ActivityWatch:
    """Of one pool, launch after launch. ``run`` runs beside everything else what waits for an answer of the engine."""

    def __init__(self, pool: Pool, services: Services, run: Callable[[Coroutine[Any, Any, None]], object]) -> None:
        self._pool, self._s, self._run = pool, services, run
        self._seen = _Seen(-1)

    async def look(self, result: ProbeResult) -> Activity:
        """What the engine does, as far as it can be seen beside the probe that ended with ``result``."""
        i, engine, now = self._pool.instance, self._pool.launch.prepared, self._s.clock.monotonic()
        if self._seen.epoch != i.epoch:
            self._seen = _Seen(i.epoch)
        seen, loading = self._seen, i.phase is Phase.STARTING
        if engine is None or not (loading or i.phase in SERVING):
            return NOT_SEEN
        if loading and (result.ok or now - seen.looked_at < _LOAD_GAP_S):  # a good answer is told without delay
            return seen.activity
        seen.looked_at, seen.looks = now, seen.looks + 1
        silent, rules = result.outcome is ProbeOutcome.TIMEOUT, self._pool.definition.policy.activity
        in_hand = seen.counters is not None and seen.counters.requests > 0
        sample = await self._sample(engine, seen, loading=loading, full=loading or silent or in_hand)
        seen.track = observe(seen.track, sample, rules)
        seen.activity = judge(seen.track, sample.at, rules, silent_since=(i.last_good_at or i.since) if silent else None)
        if not loading:
            works = seen.track.cpu_at == sample.at
            leased = self._s.registry.leases_on(self._pool.pool_id, self._pool.instance.epoch) > 0
            self._ask(engine, seen, often=silent or in_hand or works or leased)
            if not silent and (doubtful(seen.track, sample.at, rules) or await self._ignores_clients(seen, rules, often=leased)):
                self._prompt(engine, seen, sample.at, rules.stall_s / 2)
        return seen.activity

    async def _ignores_clients(self, seen: _Seen, rules: ActivityRules, *, often: bool) -> bool:
        """Asked when its counters are fresh: who came before the last prompt that it answered has been served."""
        engine, track = self._pool.launch.prepared, seen.track
        if not isinstance(engine, PreparedEngine) or not engine.warmable or track is None or track.last.requests:
            return False
        if not often and seen.looks % _IDLE_LOOKS != 2:
            return False
        silent = await self._s.usages.silent_clients(engine.port)
        now = self._s.clock.monotonic()
        return ignored(track, now, rules, (silent_s for silent_s in silent if now - silent_s > seen.answered_at))

    async def _sample(self, engine: AnyEngine, seen: _Seen, *, loading: bool, full: bool) -> Sample:
        launch, told = self._pool.launch, seen.counters
        if seen.reader is None and launch.process is not None:
            seen.reader = self._s.usages.reader(launch.process.pid)
        used = await seen.reader.read(full=full) if seen.reader is not None else None
        uuids = () if launch.allocation is None else tuple(device.uuid for device in launch.allocation.devices)
        gpu_percent, vram_bytes = self._s.gpus.load_of(uuids) if uuids else (None, 0)
        now = self._s.clock.monotonic()
        sample = Sample(
            now, gpu_percent=gpu_percent,
            log_bytes=self._log_bytes(engine) if loading else None,
            tokens=None if told is None else told.tokens, requests=None if told is None else told.requests,
            unanswered_s=0.0 if told is None or seen.asked_at is None else now - seen.asked_at,
            prompted_s=0.0 if seen.unanswered_at is None else now - seen.unanswered_at,
        )  # fmt: skip
        if used is None:
            return sample
        return replace(
            sample, cpu_s=used.cpu_s, memory_bytes=used.memory_bytes + vram_bytes, data_bytes=used.data_bytes,
            stopped=used.stopped, blocked=used.blocked,
        )  # fmt: skip

    def _log_bytes(self, engine: AnyEngine) -> int | None:
        try:
            return sum(self._s.files.log_mark(engine.instance_id).values())
        except PoolError:  # what is wrong there is told by whoever must write there
            return None

    def _ask(self, engine: AnyEngine, seen: _Seen, *, often: bool) -> None:
        """Ask for its counters, one question at a time; the answer is for the next look."""
        kind = ENGINES.get(engine.engine)
        if kind is None or kind.counters is None or not seen.has_counters or seen.asking:
            return
        dozes = isinstance(engine, PreparedEngine) and engine.sleep is not None and engine.sleep.by_itself
        if often or seen.asked_at is not None or (seen.looks % _IDLE_LOOKS == 1 and not dozes):  # a question would wake it
            seen.asking = True
            seen.asked_at = self._s.clock.monotonic() if seen.asked_at is None else seen.asked_at
            self._run(self._read_counters(engine, seen, kind.counters))

    async def _read_counters(self, engine: AnyEngine, seen: _Seen, names: CounterNames) -> None:
        """A busy engine answers late: there is patience, as nobody waits for this."""
        try:
            told = await self._s.prober.counters(engine.url, names, self._pool.definition.policy.stall_s)
        except TimeoutError:
            return
        except (aiohttp.ClientError, OSError, ValueError):
            seen.asked_at = None  # which the probes will tell
        else:
            seen.counters, seen.has_counters, seen.asked_at = told, told is not None, None
        finally:
            seen.asking = False

    def _prompt(self, engine: AnyEngine, seen: _Seen, now: float, timeout_s: float) -> None:
        """Before it is said that work stands still, a prompt of our own: the engine's word on its requests may be old."""
        asks = isinstance(engine, PreparedEngine) and engine.warmable
        if asks and now - seen.prompted_at >= timeout_s:
            seen.prompted_at = now
            self._run(self._send_prompt(engine, seen, timeout_s))

    async def _send_prompt(self, engine: AnyEngine, seen: _Seen, timeout_s: float) -> None:
        """An engine that answers works: what was held against it is forgotten. A refusal says nothing of its work."""
        if seen.unanswered_at is None:
            seen.unanswered_at = self._s.clock.monotonic()
        try:
            await self._s.prober.warm_up(engine, timeout_s)
        except TimeoutError:
            return
        except (aiohttp.ClientError, OSError, ValueError):
            pass
        else:
            seen.track = None
        seen.unanswered_at, seen.answered_at = None, self._s.clock.monotonic()
