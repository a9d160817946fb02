"""The work of one pool's launches: started by effects beside the loop; its outcome returns as events."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pool_managerd.core.lifecycle import events as ev
from pool_managerd.errors import PoolError
from pool_managerd.supervision import workers
from pool_managerd.supervision.log_places import place_of
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.workers import Launch

if TYPE_CHECKING:
    from pool_managerd.supervision.driver import PoolDriver


class LaunchWork:
    """Tasks of a driver. They read the driver's state and post events to it; they change nothing else of it."""

    def __init__(self, driver: PoolDriver, services: Services) -> None:
        self._driver = driver
        self._s = services
        self.tasks: set[asyncio.Task[None]] = set()

    async def stage(self, epoch: int, *, queue: bool) -> None:
        """Model to disk, engine prepared; ``queue``: after its turn among the pools that load at boot."""
        launch = self._driver.launch
        if queue:
            launch.step = "queue"
            await self._s.gate.queue(
                self._driver.pool_id,
                self._driver.policy.staging_stall_s / 3,
                partial(self._driver.post, ev.StagingProgress(epoch)),
            )

        def progress(done: int, total: int) -> None:
            before, launch.progress = launch.progress, (done, total)
            self._driver.post(ev.StagingProgress(epoch))
            if total and done * 10 // total > before[0] * 10 // total:
                human = f"Verifying the model of pool '{self._driver.pool_id}': {done * 100 // total} %"
                self._driver.emit("staging", human, level="debug", bytes_done=done, bytes_total=total)

        try:
            prepared, model = await workers.stage(self._driver, epoch, launch, self._s, progress)
        except PoolError as problem:
            launch.cause = problem
            text, retriable, reason = workers.failure(problem)
            self._driver.post(ev.StagingFailed(epoch, text, retriable, reason))
            return
        launch.prepared = prepared
        launch.step = "starting" if prepared.attach_url is None else "attach"
        if model is not None and not model.verified:
            self._driver.emit("notice", f"Model of pool '{self._driver.pool_id}' is used unverified: no checksum is configured")
        for warning in prepared.warnings:
            self._driver.emit("notice", warning, level="warn")
        for notice in launch.assignment.notices if launch.assignment else ():
            self._driver.emit("notice", notice, level="warn")
        staged = ev.Staged(
            epoch, external=prepared.attach_url is not None, uses_gpus=launch.assignment is not None,
            warmable=not prepared.verbatim and prepared.warmup != "none",
        )  # fmt: skip
        self._driver.post(staged)

    async def spawn(self, epoch: int) -> None:
        """Run the prepared engine and watch it from its first moment."""
        launch = self._driver.launch
        if launch.prepared is None:
            return
        launch.log_mark = self._s.files.log_mark(self._driver.instance_id)
        self._driver.log_places.launched(self._s.clock.wall_ms(), place_of(launch.log_mark))
        try:
            process = await self._s.launcher.launch(launch.prepared, epoch=epoch, grace_ms=self._driver.policy.stop_grace_ms)
        except PoolError as problem:
            launch.cause = problem
            self._driver.post(ev.SpawnFailed(epoch, workers.failure(problem)[0]))
            return
        launch.process = process
        # Its own context: a death in an hour has nothing to do with the request that asked for this launch.
        watcher = asyncio.create_task(self._watch(launch, epoch), name=f"watch:{self._driver.pool_id}:{epoch}", context=Context())
        self._keep(watcher)
        if self._driver.instance.epoch != epoch:
            process.kill()  # a newer launch has begun: nobody else knows of this process
            return
        if process.notice:
            self._driver.emit("notice", process.notice, level="warn")
        self._driver.post(ev.Spawned(epoch, process.pid))

    async def _watch(self, launch: Launch, epoch: int) -> None:
        process = launch.process
        if process is None:
            return
        await process.wait_dead()
        self._driver.post(ev.Died(epoch))
        record = await process.wait()
        clean = self._s.events.clean
        lines = [clean(line) for line in self._s.files.launch_log(self._driver.instance_id, launch.log_mark)]
        launch.log_tail = lines[-workers.LOG_TAIL_LINES :]
        told = workers.exit_event(epoch, record, lines, launch.prepared)
        if record.code and not told.port_conflict and self._driver.instance.last_good_at is None:
            told = replace(told, port_conflict=await self._port_lost(launch, process.pid))
        self._driver.post(told)

    async def _port_lost(self, launch: Launch, pid: int) -> bool:
        """An engine that logs from a thread of its own may end without a word; who holds its port tells all the same."""
        if launch.prepared is None:
            return False
        return (await self._s.listener(pid, launch.prepared.host, launch.prepared.port)).owner == "other"

    async def probe(self, epoch: int) -> None:
        """Ask once; the answer is an event."""
        if not self._driver.external:
            mark = self._s.files.log_mark(self._driver.instance_id)
            self._driver.log_places.seen(self._s.clock.wall_ms(), place_of(mark))
        event, result = await workers.probe(self._driver.launch, epoch, self._driver.policy.probe_timeout_s, self._s)
        if self._driver.external and isinstance(event, ev.ProbeMissed):
            self._s.silent.add(self._driver.pool_id)
            event = replace(event, silent=len(self._s.silent))
        else:
            self._s.silent.discard(self._driver.pool_id)
        self._s.events.emit("probe", result.reason, pool_id=self._driver.pool_id, journal=False, outcome=result.outcome.value)
        self._driver.post(event)

    async def warm_up(self, epoch: int) -> None:
        """Send the first prompt and measure the answer."""
        self._driver.launch.step = "warm-up"
        self._driver.post(await workers.warm_up(self._driver.launch, epoch, self._driver.policy.warmup_timeout_s, self._s))

    def run(self, work: Coroutine[Any, Any, None], epoch: int, what: str) -> None:
        """Run ``work`` beside the loop; when it ends in an exception the instance is told that its helper died."""
        task = asyncio.create_task(work)
        self._driver.launch.tasks.add(task)
        self._keep(task)

        def ended(finished: asyncio.Task[None]) -> None:
            self._driver.launch.tasks.discard(finished)
            if not finished.cancelled() and (problem := finished.exception()) is not None:
                self._driver.post(ev.HelperDied(epoch, f"{what} ended unexpectedly: {problem!r}"))

        task.add_done_callback(ended)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def cancel(self, launch: Launch) -> None:
        """Nobody wants the outcome of ``launch`` any more."""
        for task in tuple(launch.tasks):
            task.cancel()
