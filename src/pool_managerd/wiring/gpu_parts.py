"""The GPU side of a node, wired: monitor, watch, admission and preflight."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pool_managerd.config import Config
from pool_managerd.core.gpu.devices import NOT_SCANNED, DeviceIncident
from pool_managerd.core.gpu.kept_free import FreeRules
from pool_managerd.core.gpu.visibility import restrictions
from pool_managerd.core.registry import Registry
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.errors import SpecError
from pool_managerd.host.memory import available_ram_bytes, total_ram_bytes
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.host.worker_process import WorkerOptions, Workers
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.runtime.procfs import boot_id
from pool_managerd.store.state import StateStore
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.foresight import LOOK_S
from pool_managerd.supervision.gpu.admission import Admission, AdmissionRules
from pool_managerd.supervision.gpu.mask_gpus import MaskGpus
from pool_managerd.supervision.gpu.pool_gpus import Gpus
from pool_managerd.supervision.gpu.watch import START_QUIET_S, GpuWatch, WatchSettings
from pool_managerd.supervision.gpu.yields import Yields
from pool_managerd.supervision.protocols import Clock
from pool_managerd.wiring.launch_sizer import StartSizer
from pool_managerd.wiring.setups import Setups

if TYPE_CHECKING:
    from pool_managerd.core.preflight import HostFacts, Report

BARS_A_START = frozenset({
    "gpu_required", "missing_tool", "container_gpu", "port_taken", "driver_too_old", "compute_capability", "nvidia_uvm",
    "fabric_manager",
})  # fmt: skip
"""Findings that make a start impossible. Others are for the operator: a disk that is low must not keep an engine down, and
the GPUs themselves are for the admission to check, which scans them anew and knows what a mask means.
"""
FACTS_FRESH_S = 30.0
"""Older facts of the machine are gathered again beside a start, which goes by what is known: a restart does not wait for a
tour of the machine. A start that they would bar waits for fresh ones. The GPUs are looked at anew for each.
"""


@dataclass(frozen=True, slots=True)
class PreflightMeans:
    """What preflight and admission use of the node: the ports that it and its engines hold, and its provisioners."""

    own_ports: Callable[[], frozenset[int]]
    models: ModelProvisioner
    engines: EngineProvisioner


def free_rules(config: Config) -> FreeRules:
    """What is to stay free on every GPU."""
    return FreeRules(config.gpu.keep_free_mib << 20, config.gpu.yield_to)


class GpuParts:
    """Made once per node, inside its event loop."""

    def __init__(self, config: Config, clock: Clock, events: EventLog, store: StateStore, means: PreflightMeans) -> None:
        self.config, self._clock, self._events, self._store, self._means = config, clock, events, store, means
        self._workers = Workers()
        only = restrictions(config.gpu.devices, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self.notices = tuple(f"Only some GPUs are used: {rule}" for rule in only)
        self.monitor = NvmlMonitor(on_incident=self._on_incident, workers=self._workers, clock=clock.monotonic, only=only)
        settings = WatchSettings(config.gpu.rescan_interval_ms / 1000, boot_id())
        self.watch = GpuWatch(self.monitor, clock, events, store, settings)
        self._facts: tuple[float, HostFacts] | None = None
        self._gathering: asyncio.Task[HostFacts] | None = None
        self._told: set[str] = set()
        tell = events.from_threads()
        self._setups = Setups(config, means.models, means.engines, lambda said: tell(f"Preflight: {said}", "info"))
        self._topology: tuple[object, tuple[str, ...]] = (None, ())
        self.watch.listen(self._tell_notes)

    def use_config(self, config: Config) -> None:
        """Other pools, and findings that are allowed to fail; of the GPUs nothing may differ."""
        self.config = config
        self._setups.use_config(config)

    async def open(self) -> None:
        """Build the simulated driver, if there is to be one. Raises NodeError without a C compiler, SpecError
        naming file and line when its topology file is wrong.
        """
        simulated = self.config.gpu.simulate is not None
        self._workers.options = await asyncio.to_thread(_simulated, self.config) if simulated else WorkerOptions()

    def gpus(self, registry: Registry) -> Gpus:
        yields = Yields(self.watch, self._clock, self._events, self._store, lambda: free_rules(self.config))
        return Gpus(self.watch, registry, self._clock, MaskGpus(self._store), yields)

    def sizer(self) -> StartSizer:
        return StartSizer(self.config, self._means.models, self._means.engines)

    def admission(self, gpus: Gpus) -> Admission:
        rules = AdmissionRules(cpu_allowed=self.config.profile == "dev", fit=self.config.gpu.fit)
        return Admission(gpus, self.sizer(), available_ram_bytes, self._store, rules, self.config.together.rules)

    def ram(self) -> tuple[int, int]:
        """Available and total RAM of this daemon, in bytes."""
        return available_ram_bytes(), total_ram_bytes()

    async def preflight(self) -> Report:
        """The report over this machine for the whole configuration."""
        facts = await self._gathered()
        await self._look_ahead()
        # Engines are loaded to see whether they can be: no start waits for that.
        return self._report(replace(facts, setup_problems=await asyncio.to_thread(self._setups.problems)), None)

    async def _look_ahead(self) -> None:
        """The headers of models that are to be fetched; what cannot be asked for is said where it is fetched."""
        pools = (pool for pool in self.config.pools if pool.provisioning.mode != "external")
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                asked = (self._means.models.foresee(pool.model, pool.checksums) for pool in pools)
                await asyncio.gather(*asked, return_exceptions=True)

    async def _gathered(self) -> HostFacts:
        """Fresh facts; who asks while they are gathered gets the same."""
        return await asyncio.shield(self._begin_gathering())

    def _begin_gathering(self) -> asyncio.Task[HostFacts]:
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._gather(), name="preflight")
        return self._gathering

    async def _gather(self) -> HostFacts:
        try:
            found = await asyncio.to_thread(self._facts_now)
            self._facts = self._clock.monotonic(), found
            return found
        finally:
            self._gathering = None

    def _facts_now(self) -> HostFacts:
        """Imports what it needs in its thread: the node answers a tenth of a second sooner."""
        from pool_managerd.wiring.preflight import machine_of

        return machine_of(self.config, os.environ)

    def _report(self, facts: HostFacts, pools: tuple[str, ...] | None) -> Report:
        from pool_managerd.wiring.preflight import report_of

        return report_of(self.config, replace(facts, scan=self.watch.scan), pools=pools, own_ports=self._means.own_ports())

    async def announce(self) -> None:
        """Every finding that is not ok, as an event with its remedy; beside the start of the pools, when the node answers."""
        await asyncio.sleep(START_QUIET_S)
        await self.watch.rescan()
        levels = {"fail": "error", "overridden": "warn", "warn": "info"}
        try:
            report = await self.preflight()
        except OSError as problem:  # no descriptors are left, or /proc cannot be read: nothing depends on this report
            self._events.emit("notice", f"Cannot report on this machine: {problem}; see `preflight`", level="warn")
            return
        for finding in report.findings:
            if finding.level in levels:
                self._events.emit(
                    "preflight", finding.message, level=levels[finding.level], code=finding.code, subject=finding.subject,
                    outcome=finding.level, remedy=list(finding.remedy),
                )  # fmt: skip

    async def require(self, pool_id: str) -> Report:
        """What was overridden for the pool. Raises NodeError (GPU_REQUIRED, PREFLIGHT_FAILED) when it cannot run here."""
        if self.watch.scan is NOT_SCANNED:  # nobody looked yet, and without GPUs nothing about them can be found wrong
            await self.watch.rescan()
        at, facts = self._facts or (self._clock.monotonic(), await self._gathered())
        barring = self._barring(facts, pool_id)
        if barring.ok:
            if self._clock.monotonic() - at > FACTS_FRESH_S:
                self._begin_gathering()
            return barring
        barring = self._barring(await self._gathered(), pool_id)  # perhaps the machine has changed
        if not barring.ok:
            from pool_managerd.core.preflight import assert_passed

            assert_passed(barring, pool_id)
        return barring

    def _barring(self, facts: HostFacts, pool_id: str) -> Report:
        report = self._report(facts, (pool_id,))
        return replace(report, findings=tuple(f for f in report.findings if f.code in BARS_A_START))

    def _tell_notes(self) -> None:
        """What the monitor cannot see though the scan went well, such as a kernel log that is not readable: each once."""
        notes = {*self.monitor.notes, *self._topology_mistake()}
        for note in sorted(notes - self._told):
            self._events.emit("notice", note, level="info")
        self._told = notes

    def _topology_mistake(self) -> tuple[str, ...]:
        """What is wrong with the file of the simulated GPUs; they stay as they were until it is right. Read when it changed."""
        if self.config.gpu.simulate is None:
            return ()
        seen = _changed_at(self.config.gpu.simulate)
        if seen != self._topology[0]:
            wrong: tuple[str, ...] = ()
            try:
                _simulated(self.config)
            except SpecError as error:
                wrong = (f"The simulated GPUs stay as they were: {error.message}",)
            self._topology = seen, wrong
        return self._topology[1]

    def _on_incident(self, incident: DeviceIncident) -> None:
        self.watch.on_incident(incident)


def _changed_at(path: Path) -> object:
    try:
        info = path.stat()
    except OSError:
        return "gone"
    return info.st_ino, info.st_mtime_ns, info.st_size


def _simulated(config: Config) -> WorkerOptions:
    """Imports what it needs when it is needed: the node answers a tenth of a second sooner."""
    from pool_managerd.wiring.preflight import worker_options

    return worker_options(config, config.daemon.state_dir)
