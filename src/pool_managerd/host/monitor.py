"""Sees the GPUs through a worker process that may hang, crash or be killed; the daemon never does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pool_managerd.core.gpu.devices import NOT_SCANNED, DeviceIncident, DeviceScan, ScanProblem
from pool_managerd.core.gpu.visibility import Restriction, visible
from pool_managerd.errors import NodeError
from pool_managerd.host.scan_reply import IncidentFilter, incident_of, problem_of, scan_of, wants_renewal
from pool_managerd.host.worker_process import Worker, WorkerDied, Workers

_SEE_DMESG = "see dmesg | grep -i nvrm and run nvidia-smi; devices release releases the driver"
_NO_PROCESS = "see that the limits on processes, files and memory (ulimit -a) leave room for one more process"
_RELEASED = ScanProblem(
    "released", "the GPU driver's library was released on request", "pool-managerd devices resume reinitialises it"
)
_MAX_NOTES = 20
_FORGET, _TIMES_WHAT_IT_TAKES = 0.99, 3.0


@dataclass(frozen=True, slots=True)
class MonitorLimits:
    """Seconds. The first answer of a worker loads and initialises the driver, which takes long without persistence mode.

    ``first_s`` and ``later_s`` are least limits: after a hang the next answer gets twice the time, up to ``longest_s``, and
    the limit stays several times what answers take (eight GPUs in MIG mode need seconds for each). ``death_s`` is how
    long a killed worker may take to be gone.
    """

    first_s: float = 5.0
    later_s: float = 2.0
    longest_s: float = 60.0
    death_s: float = 2.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    most_wedged: int = 2


class NvmlMonitor:
    """The GPUs of this machine (SPEC §5.1), as a DeviceMonitor.

    ``on_incident`` is called in the loop for every Xid and ECC event, once a first scan was made. GPUs that
    ``only`` leaves out are not there for anybody.
    """

    def __init__(
        self,
        *,
        on_incident: Callable[[DeviceIncident], None],
        workers: Workers,
        clock: Callable[[], float] = time.monotonic,
        limits: MonitorLimits | None = None,
        only: tuple[Restriction, ...] = (),
    ) -> None:
        self._workers, self._on_incident, self._clock, self._limits = workers, on_incident, clock, limits or MonitorLimits()
        self._only = only
        self._filter = IncidentFilter()
        self._last = replace(NOT_SCANNED, problem=None)
        self._problem: ScanProblem = NOT_SCANNED.problem or _RELEASED
        self._worker: Worker | None = None
        self._fresh, self._renew = True, False
        self._failures, self._not_before = 0, 0.0
        self._patience_s = self._limits.later_s
        self._dying: dict[Worker, asyncio.Task[None]] = {}
        self._wedged: list[Worker] = []
        self._released = self._closed = False
        self._asking = asyncio.Lock()
        self._next: asyncio.Task[DeviceScan] | None = None
        self._notes: list[str] = []

    @property
    def pid(self) -> int | None:
        """The worker's, for accounting."""
        return self._worker.pid if self._worker is not None else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the worker said of itself that is no failure: a kernel log that cannot be read, and the like."""
        return tuple(self._notes)

    async def scan(self) -> DeviceScan:
        """What the GPUs are now. Never raises: with a ``problem`` the devices are the last known ones, and ``taken_at``
        is theirs. Callers that come while the worker is busy share the next answer, which is no older than their call.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._scan(), name="gpu-scan")
        return await asyncio.shield(self._next)

    async def release(self) -> None:
        """Release the driver, so that it can be replaced. Raises NodeError when a worker is stuck inside it: then the GPUs
        are scanned as before.
        """
        self._released = True
        await self._end_workers()
        stuck = [str(w.pid) for w in self._left_behind()]
        if stuck:
            self._released = False
            raise NodeError(
                f"cannot release the GPU driver: process {', '.join(stuck)} is stuck in it and cannot be killed",
                hint="only a reboot ends a process that the driver does not give back",
            )  # fmt: skip

    async def resume(self) -> None:
        """Scan the GPUs again, with a new worker and so with the library that is installed now."""
        self._released = False
        self._failures, self._not_before = 0, 0.0

    async def close(self) -> None:
        """End the worker. One that cannot be killed is left behind: it ends by itself when the driver lets it."""
        self._closed = True
        await self._end_workers()
        self._workers.close()

    # --- one scan ---

    async def _scan(self) -> DeviceScan:
        async with self._asking:
            self._next = None  # who comes from now on gets a later answer
            try:
                problem = await self._ask()
            except Exception as error:  # noqa: BLE001 - the boundary: a scan never raises
                problem = self._failed("nvml_error", f"scanning the GPUs failed: {error!r}"[:400], _SEE_DMESG)
            if self._released or self._closed:
                problem = _RELEASED
            if problem is None:
                return self._last
            self._problem = problem
            return replace(self._last, problem=problem)

    async def _ask(self) -> ScanProblem | None:
        if self._released or self._closed:
            return _RELEASED
        if self._worker is not None and (self._renew or self._worker.has_ended):
            self._discard()
        if self._dying:
            await asyncio.wait(list(self._dying.values()))  # bounded: after ``death_s`` they count as wedged
        taken_at = self._clock()
        if self._worker is None:
            refusal = self._refusal(taken_at) or await self._start()
            if refusal is not None:
                return refusal
        worker, limit_s = self._worker, self._patience_s
        assert worker is not None  # noqa: S101 - _start made it
        if self._fresh:
            limit_s = max(limit_s, self._limits.first_s)
        asked_at = self._clock()
        try:
            reply = await worker.scan(limit_s)
            self._learn(self._clock() - asked_at)
            return self._take(reply, taken_at)
        except TimeoutError:
            self._patience_s = min(2 * limit_s, max(self._limits.longest_s, self._limits.later_s))
            self._discard()
            return self._failed("nvml_hung", f"the GPU driver did not answer within {limit_s:g} s", _SEE_DMESG)
        except (WorkerDied, KeyError, TypeError, ValueError) as error:
            self._discard()
            return self._failed("nvml_crashed", f"the process that asks the GPU driver failed: {error}", _SEE_DMESG)

    def _learn(self, took_s: float) -> None:
        """An answer came after ``took_s``. Patience is lost slowly: a driver that is slow now will be so again."""
        self._patience_s = max(self._limits.later_s, self._patience_s * _FORGET, _TIMES_WHAT_IT_TAKES * took_s)

    def _take(self, reply: dict[str, Any], taken_at: float) -> ScanProblem | None:
        self._renew = wants_renewal(reply)
        self._note(reply)
        if not reply["ok"]:
            if self._renew:
                self._not_before = taken_at + self._limits.backoff_s
            return problem_of(reply)
        found = scan_of(reply, taken_at, self._last.devices)
        self._last = replace(found, devices=visible(found.devices, self._only)) if self._only else found
        self._fresh = False
        self._failures = 0
        return None

    def _failed(self, code: str, message: str, hint: str) -> ScanProblem:
        backoff_s = min(self._limits.backoff_s * 2 ** min(self._failures, 16), self._limits.longest_backoff_s)
        self._failures += 1
        self._not_before = self._clock() + backoff_s
        return ScanProblem(code, message, hint)

    def _refusal(self, now: float) -> ScanProblem | None:
        """Why no worker may be started now."""
        wedged = self._left_behind()
        if len(wedged) >= self._limits.most_wedged:
            pids = ", ".join(str(w.pid) for w in wedged)
            return ScanProblem(
                "nvml_hung", f"the GPU driver holds {len(wedged)} processes that cannot be killed (pid {pids})",
                "reboot the machine: only that ends a process that the driver does not give back",
            )  # fmt: skip
        return self._problem if now < self._not_before else None

    async def _start(self) -> ScanProblem | None:
        try:
            worker = await self._workers.start(self._heard)
        except OSError as error:
            return self._failed("nvml_error", f"the process that asks the GPU driver cannot be started: {error}", _NO_PROCESS)
        self._worker, self._fresh, self._renew = worker, True, False
        if self._released or self._closed:  # meanwhile
            self._discard()
            return _RELEASED
        return None

    def _heard(self, raw: Mapping[str, Any]) -> None:
        incident = incident_of(raw)
        if not self._closed and self._filter.is_news(incident, self._clock()):
            asyncio.get_running_loop().call_soon(self._on_incident, incident)  # its errors are not the worker's

    def _note(self, reply: Mapping[str, Any]) -> None:
        new = [str(note)[:300] for note in reply.get("notes", ()) if note not in self._notes]
        self._notes = (self._notes + new)[-_MAX_NOTES:]

    # --- the end of workers ---

    def _discard(self) -> None:
        """Kill the worker; a task sees that it dies, or that it does not."""
        worker, self._worker = self._worker, None
        if worker is None or worker in self._dying:
            return
        worker.kill()
        self._dying[worker] = asyncio.create_task(self._bury(worker), name="gpu-worker-end")

    async def _bury(self, worker: Worker) -> None:
        try:
            if not await worker.ended(self._limits.death_s):
                self._wedged.append(worker)  # stuck in the kernel: nothing can be done but wait, elsewhere
        finally:
            del self._dying[worker]

    def _left_behind(self) -> list[Worker]:
        self._wedged = [w for w in self._wedged if not w.has_ended]
        return self._wedged

    async def _end_workers(self) -> None:
        """Also one that is being started right now."""
        self._discard()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.death_s), self._asking:
                self._discard()
        if self._dying:
            await asyncio.wait(list(self._dying.values()))
