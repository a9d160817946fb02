"""The work of one pool's launches: stage, spawn, watch, probe, warm up. Started by effects, beside the loop.

Its outcome is posted as an event. What it learns about the launch on the way is handed to the actor, which is the only
one that writes it down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextvars import Context
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp

from pool_managerd import failpoints
from pool_managerd.core.artifacts import AnyEngine, AttachedEngine, PreparedEngine
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_diagnosis import Diagnosis, LaunchLog
from pool_managerd.core.crash_report import Source
from pool_managerd.core.gpu.allocation import Allocation
from pool_managerd.core.gpu.masks import DeviceMask, cuda_environment
from pool_managerd.core.health import ProbeOutcome
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.supervision.activity import ActivityWatch
from pool_managerd.supervision.asleep import left_asleep
from pool_managerd.supervision.crash_reports import launch_log, written
from pool_managerd.supervision.failures import LOG_TAIL_LINES, ending, exit_event, failure
from pool_managerd.supervision.fetching import fetch_model
from pool_managerd.supervision.health_probe import HealthProbe
from pool_managerd.supervision.in_flight import requests_of
from pool_managerd.supervision.kept_drains import kept_drain
from pool_managerd.supervision.made_of import changed_configuration, changed_files, keep_configuration
from pool_managerd.supervision.measured import baseline_key, warmed_up
from pool_managerd.supervision.policy import learn_secrets_of
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Process
from pool_managerd.supervision.reports import Reports
from pool_managerd.supervision.services import Services

LONG_LOG_BYTES = 8192


class LaunchWork:
    """The tasks of one pool. They read its record and change nothing of it."""

    def __init__(self, pool: Pool, actor: Reports, services: Services) -> None:
        self._pool, self._actor, self._s = pool, actor, services
        self.tasks: set[asyncio.Task[None]] = set()
        self._activity = ActivityWatch(pool, services, lambda work: self._keep(asyncio.create_task(work)))
        self._health = HealthProbe(pool, services)
        self._cancellable: dict[int, set[asyncio.Task[None]]] = {}

    # --- staging ---

    async def stage(self, epoch: int, *, queue: bool) -> None:
        """Model to disk, engine prepared; ``queue``: after its turn among the pools that load at boot, but for a download."""
        try:
            await fetch_model(self._pool, epoch, self._actor, self._s)
            if queue:
                still_waiting = partial(self._actor.post, ev.StagingProgress(epoch))
                await self._s.gate.queue(self._pool.pool_id, self._pool.definition.policy.staging_stall_s / 3, still_waiting)
            await self._s.epochs.reserve(self._pool.pool_id, epoch)
            allocation = await self._admit(epoch)
            prepared = await self._prepare(epoch, allocation)
        except PoolError as problem:
            self._actor.learn(epoch, cause=problem)
            self._actor.post(ev.StagingFailed(epoch, *failure(problem)))
            return
        if isinstance(prepared, AttachedEngine):
            self._actor.learn(epoch, prepared=prepared, step="attach", measured=self._s.baselines.all_of(baseline_key(prepared)))
            self._actor.post(ev.Staged(epoch, external=True))
            return
        self._actor.learn(epoch, prepared=prepared, step="starting", measured=self._s.baselines.all_of(baseline_key(prepared)))
        for notice in (*prepared.warnings, *(allocation.notices if allocation is not None else ())):
            self._actor.emit("notice", notice, level="warn")
        self._actor.post(ev.Staged(epoch, uses_gpus=allocation is not None, **prepared.abilities))

    async def _admit(self, epoch: int) -> Allocation | None:
        """May it run here, and on which GPUs. Raises PoolError."""
        pool = self._pool
        if pool.definition.external:
            return None
        for finding in (await self._s.preflight(pool.pool_id)).overridden:
            self._actor.emit("preflight", f"Overridden by the configuration: {finding.message}", level="warn", code=finding.code)
        if pool.config is None and pool.submitted is None:
            return None
        self._actor.learn(epoch, step="memory")
        allocation, sizing = await self._s.admission.admit(pool, epoch)
        self._actor.learn(epoch, allocation=allocation, sizing=sizing)
        return allocation

    async def _prepare(self, epoch: int, allocation: Allocation | None) -> AnyEngine:
        """Model, then engine (SPEC §2.4). Raises PoolError."""
        pool, config, submitted = self._pool, self._pool.config, self._pool.submitted
        if submitted is not None:
            return _shown_its_devices(submitted, allocation)
        if pool.definition.barred is not None:
            raise copy(pool.definition.barred)
        if config is None:
            why = "cannot start a pool that has neither a configuration nor a submitted engine"
            raise SpecError(why, code="POOL_NOT_CONFIGURED", status=409)
        if pool.definition.external:
            return self._s.engines.attach(config)
        self._actor.learn(epoch, step="model")
        progress = partial(self._model_progress, epoch)
        model = await self._s.models.ensure_present(config.model, config.checksums, progress=progress)
        if not model.verified:
            self._actor.emit("notice", f"Model of pool '{pool.pool_id}' is used unverified: no checksum is configured")
        self._actor.learn(epoch, step="engine")
        return await self._s.engines.prepare(config, model, allocation, pool.instance.id.replica_id)

    def _model_progress(self, epoch: int, done: int, total: int) -> None:
        before = self._pool.launch.progress[0]
        self._actor.learn(epoch, progress=(done, total))
        self._actor.post(ev.StagingProgress(epoch))
        if total and done * 10 // total > before * 10 // total:
            human = f"Verifying the model of pool '{self._pool.pool_id}': {done * 100 // total} %"
            self._actor.emit("staging", human, level="debug", bytes_done=done, bytes_total=total)

    # --- the process ---

    async def spawn(self, epoch: int) -> None:
        """Run the prepared engine and watch it from its first moment."""
        pool, prepared = self._pool, self._pool.launch.prepared
        if not isinstance(prepared, PreparedEngine):
            return
        mark, now_ms = pool.launch.log_mark, self._s.clock.wall_ms()
        allocation, decided_s = pool.launch.allocation, pool.instance.launched_at or self._s.clock.monotonic()
        try:
            process = await self._s.launcher.launch(
                prepared, epoch=epoch, grace_ms=pool.definition.policy.stop_grace_ms,
                reserved_bytes=allocation.bytes_by_device if allocation is not None else {},
                exclusive=pool.config is not None and pool.config.exclusive,
                decided_at_ms=now_ms - round((self._s.clock.monotonic() - decided_s) * 1000),
            )  # fmt: skip
        except PoolError as problem:
            self._actor.learn(epoch, cause=problem)
            self._actor.post(ev.SpawnFailed(epoch, failure(problem)[0]))
            return
        current = self._actor.learn(epoch, process=process)
        if pool.current:
            keep_configuration(pool, self._s.records)
        # Its own context: a death in an hour has nothing to do with the request that asked for this launch.
        watch = self._watch(epoch, process, prepared, mark)
        self._keep(asyncio.create_task(watch, name=f"watch:{pool.pool_id}:{epoch}", context=Context()))
        if not current:
            process.kill()  # a newer launch has begun: nobody else knows of this process
            return
        if process.notice:
            self._actor.emit("notice", process.notice, level="warn")
        self._actor.post(ev.Spawned(epoch, process.pid))

    async def adopt(self, epoch: int) -> None:
        """Take hold of the engine that an earlier daemon has left, or hear how it ended."""
        pool_id = self._pool.pool_id
        left = self._s.adoption.left().get(self._pool.instance.id)
        if left is None:
            self._actor.post(ev.NotAdopted(epoch, "it is gone"))
            return
        try:
            process = self._s.adoption.adopt(self._pool.instance.id)
        except PoolError as problem:
            self._actor.post(ev.NotAdopted(epoch, problem.message))
            return
        launch, prepared = left.launch, left.launch.engine_as_shown()
        self._actor.learn(epoch, process=process, prepared=prepared, log_mark=launch.log_mark)  # first: who else would end it
        shows_secrets = learn_secrets_of(self._s.events.redactor, self._pool, *process.given())
        allocation = await self._s.admission.adopt(launch)
        self._actor.learn(epoch, allocation=allocation)
        files = changed_files(pool_id, self._s.adoption.changed(launch))
        outdated = (*files, *changed_configuration(self._pool, self._s.records))
        self._actor.learn(epoch, outdated=outdated)
        for human in outdated:
            self._actor.emit("notice", human, level="warn")
        self._actor.learn(epoch, measured=self._s.baselines.all_of(baseline_key(prepared)))
        since, deadline, requests = kept_drain(self._pool, epoch, self._s.records)
        if since is not None:  # its clients may have no lease; one that is too busy to say has what it had
            self._actor.learn(epoch, requests=await requests_of(self._pool, self._s, unheard=requests))
        if not (asleep := await left_asleep(self._pool, self._s)):
            self._s.admission.sleepers.is_awake(self._pool)
        gave_way = self._s.admission.sleepers.has_left(self._pool)
        self._actor.post(ev.Adopted(
            epoch, left.started_at, was_ready=left.was_ready, uses_gpus=allocation is not None,
            **prepared.abilities, asleep=asleep, gave_way=gave_way, drain_since=since, drain_deadline=deadline,
        ))  # fmt: skip
        # Last, so that its end is not told before it is the pool's.
        watch = self._watch(epoch, process, prepared, launch.log_mark, was_ready=left.was_ready, quote=shows_secrets)
        self._keep(asyncio.create_task(watch, name=f"watch:{pool_id}:{epoch}", context=Context()))

    async def _watch(
        self, epoch: int, process: Process, prepared: PreparedEngine, log_mark: Mapping[int, int], *, was_ready: bool = False,
        quote: bool = True,
    ) -> None:  # fmt: skip
        """Until it has ended and is explained; without ``quote`` its log may hold secrets that nobody knows to mask any more."""
        await process.wait_dead()
        self._actor.post(ev.Died(epoch))
        record = await process.wait()
        was_ready = was_ready or self._pool.instance.ready_since is not None
        launch = self._pool.launch
        incidents = self._s.gpus.incidents(launch.device_uuids) if launch.epoch == epoch else []

        ready_at = launch.ready_at if launch.epoch == epoch else 0

        def explained(ruled_out: CrashClass | None = None) -> tuple[LaunchLog, Diagnosis]:
            log = launch_log(self._s, prepared.instance_id, log_mark) if quote else LaunchLog()
            return log, ending(
                record, log, prepared, was_ready=was_ready, ready_at=ready_at, incidents=incidents, ruled_out=ruled_out
            )

        much = written(self._s, prepared.instance_id, log_mark) > LONG_LOG_BYTES  # reading it takes time that others would notice
        log, why = await asyncio.to_thread(explained) if much else explained()
        if record.code and self._pool.instance.last_good_at is None:
            why = await self._with_its_port(process, prepared, why, lambda: explained(CrashClass.PORT_CONFLICT)[1])
        self._actor.learn(epoch, log_tail=log.lines[-LOG_TAIL_LINES:], diagnosis=why)
        self._actor.post(exit_event(epoch, record, why))

    async def _with_its_port(
        self, process: Process, prepared: PreparedEngine, why: Diagnosis, otherwise: Callable[[], Diagnosis]
    ) -> Diagnosis:
        """Who holds its port tells more than its log: an engine may end without a word, or speak of another port than this."""
        if why.crash not in (CrashClass.PROCESS_EXIT, CrashClass.PORT_CONFLICT):
            return why
        found = await self._s.listener(process.pid, prepared.host, prepared.port)
        if why.crash is CrashClass.PROCESS_EXIT:
            return why.port_taken(prepared.port, found.who) if found.owner == "other" else why
        if found.owner != "nobody":
            return why
        other = otherwise()
        return other if any(e.source is Source.LOG for e in other.evidence) else why

    # --- requests to the engine ---

    async def probe(self, epoch: int) -> None:
        """Ask once; the answer is an event."""
        failpoints.reach("loop.health")
        pool, silent = self._pool, self._s.silent
        result, conclusive = await self._health.ask()
        seen = await self._activity.look(result)
        self._actor.learn(epoch, activity=seen)
        self._s.events.emit("probe", result.reason, pool_id=pool.pool_id, journal=False, outcome=result.outcome.value)
        failed = result.outcome in (ProbeOutcome.ERROR, ProbeOutcome.TIMEOUT)
        if failed and isinstance(pool.launch.prepared, AttachedEngine):
            silent.add(pool.pool_id)
        else:
            silent.discard(pool.pool_id)
        if failed:
            timed_out = result.outcome is ProbeOutcome.TIMEOUT
            told = ev.ProbeFailed(epoch, result.reason, conclusive, max(1, len(silent)), timed_out, seen)
            self._actor.post(told)
        elif result.outcome is ProbeOutcome.DISCARDED:
            self._actor.post(ev.ProbeDiscarded(epoch))
        else:
            self._actor.post(ev.ProbeSucceeded(epoch, seen))

    async def warm_up(self, epoch: int) -> None:
        """Measure the first token and the rate, and fold them into the baseline (EWMA)."""
        self._actor.learn(epoch, step="warm-up")
        engine, timeout_s = self._pool.launch.prepared, self._pool.definition.policy.warmup_timeout_s
        if engine is None:
            return self._actor.post(ev.WarmupFailed(epoch, "there is no engine"))
        try:
            first_ms, rate = await self._s.prober.warm_up(engine, timeout_s)
        except TimeoutError:
            return self._actor.post(ev.WarmupFailed(epoch, f"no answer within {timeout_s:g} s"))
        except (aiohttp.ClientError, OSError, ValueError) as problem:
            return self._actor.post(ev.WarmupFailed(epoch, str(problem) or type(problem).__name__))
        self._actor.learn(epoch, measured=warmed_up(self._s, engine, first_ms, rate))
        what = "first token after" if engine.warmup == "completion" else f"{engine.warmup} after"
        human = f"Pool '{engine.pool_id}' answered its warm-up: {what} {first_ms:.0f} ms, {rate:.1f} tokens/s"
        measured: dict[str, Any] = {"first_token_ms": round(first_ms, 1), "tokens_per_s": round(rate, 2)}
        self._actor.emit("warmup", human, **measured)
        return self._actor.post(ev.WarmedUp(epoch))

    # --- tasks ---

    def run(self, work: Coroutine[Any, Any, None], epoch: int, what: str) -> None:
        """Run ``work`` beside the loop; when it ends in an exception the pool is told that its helper died."""
        task = asyncio.create_task(work)
        mine = self._cancellable.setdefault(epoch, set())
        mine.add(task)
        self._keep(task)

        def ended(finished: asyncio.Task[None]) -> None:
            mine.discard(finished)
            if not mine:
                self._cancellable.pop(epoch, None)
            if not finished.cancelled() and (problem := finished.exception()) is not None:
                self._actor.post(ev.HelperDied(epoch, f"{what} ended unexpectedly: {problem!r}"))

        task.add_done_callback(ended)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def cancel(self, epoch: int) -> None:
        """Nobody wants the outcome of launch ``epoch`` any more."""
        for task in tuple(self._cancellable.get(epoch, ())):
            task.cancel()


def _shown_its_devices(submitted: AnyEngine, allocation: Allocation | None) -> AnyEngine:
    """A submitted engine runs verbatim, but sees the GPUs that it was given and no others (SPEC §6.1)."""
    if isinstance(submitted, AttachedEngine):
        return submitted
    submitted = replace(submitted, verbatim=True)
    if allocation is not None:
        shown, given = allocation.environment(), submitted.env.get("CUDA_VISIBLE_DEVICES")
        replaced = f"CUDA_VISIBLE_DEVICES={given} was replaced: the engine sees the GPUs that were reserved for it"
        return replace(
            submitted, env={**submitted.env, **shown}, device_uuids=tuple(d.uuid for d in allocation.devices),
            warnings=(*submitted.warnings, *((replaced,) if given else ())),
        )  # fmt: skip
    if submitted.device_mask is None:
        return submitted
    shown = cuda_environment(DeviceMask.parse(submitted.device_mask).to_cuda_visible_devices())
    return replace(submitted, env={**submitted.env, **shown})
