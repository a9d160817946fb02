"""The GPU side of a node, wired: monitor, watch, admission and preflight."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace

from pool_managerd import surveying
from pool_managerd.config import Config
from pool_managerd.core.devices import DeviceIncident
from pool_managerd.core.preflight import HostFacts, Report, assert_passed
from pool_managerd.core.registry import Registry
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.host.memory import available_ram_bytes, total_ram_bytes
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.runtime.procfs import boot_id
from pool_managerd.start_sizing import StartSizer
from pool_managerd.store.state import StateStore
from pool_managerd.supervision.admission import Admission, AdmissionRules
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu_watch import GpuWatch, WatchSettings
from pool_managerd.supervision.gpus import Gpus
from pool_managerd.supervision.protocols import Clock

BARS_A_START = frozenset({
    "gpu_required", "missing_tool", "container_gpu", "port_taken", "driver_too_old", "compute_capability", "nvidia_uvm",
    "fabric_manager",
})  # fmt: skip
"""Findings that make a start impossible. Others are for the operator: a disk that is low must not keep an engine down, and
the GPUs themselves are for the admission to judge, which looks at them anew and knows what a mask is bound to.
"""
PREFLIGHT_FRESH_S = 30.0
"""So long the facts of the machine are believed for another start; the GPUs are looked at anew for each."""


class GpuParts:
    """Made once per node, inside its event loop. ``own_ports`` are those that this daemon and its engines may hold."""

    def __init__(
        self, config: Config, clock: Clock, events: EventLog, store: StateStore, own_ports: Callable[[], frozenset[int]]
    ) -> None:
        self._config, self._clock, self._events, self._store, self._own_ports = config, clock, events, store, own_ports
        self.monitor = NvmlMonitor(
            on_incident=self._on_incident,
            workers=surveying.worker_options(config, config.daemon.state_dir),
            clock=clock.monotonic,
        )
        settings = WatchSettings(config.gpu.rescan_interval_ms / 1000, boot_id())
        self.watch = GpuWatch(self.monitor, clock, events, store, settings)
        self._facts: tuple[float, HostFacts] | None = None
        self._told: set[str] = set()
        self.watch.listen(self._tell_notes)

    def gpus(self, registry: Registry) -> Gpus:
        return Gpus(self.watch, registry, self._clock)

    def admission(self, gpus: Gpus, models: ModelProvisioner, engines: EngineProvisioner) -> Admission:
        rules = AdmissionRules(cpu_allowed=self._config.profile == "dev", fit=self._config.gpu.fit)
        return Admission(gpus, StartSizer(self._config, models, engines), available_ram_bytes, self._store, rules)

    def ram(self) -> tuple[int, int]:
        """Available and total main memory of this daemon, in bytes."""
        return available_ram_bytes(), total_ram_bytes()

    async def preflight(self, pool_id: str | None = None) -> Report:
        """The judgement over this machine for the configuration, or for one of its pools."""
        now = self._clock.monotonic()
        if pool_id is None or self._facts is None or now - self._facts[0] > PREFLIGHT_FRESH_S:
            self._facts = now, await asyncio.to_thread(surveying.facts_of, self._config, os.environ)
        facts = replace(self._facts[1], scan=self.watch.scan)
        return surveying.judged(self._config, facts, pools=None if pool_id is None else (pool_id,), own_ports=self._own_ports())

    async def announce(self) -> None:
        """Every finding that is not ok, as an event with its remedy."""
        levels = {"fail": "error", "overridden": "warn", "warn": "info"}
        for finding in (await self.preflight()).findings:
            if finding.level in levels:
                self._events.emit(
                    "preflight", finding.message, level=levels[finding.level], code=finding.code, subject=finding.subject,
                    outcome=finding.level, remedy=list(finding.remedy),
                )  # fmt: skip

    async def require(self, pool_id: str) -> Report:
        """What was overridden for the pool. Raises NodeError (GPU_REQUIRED, PREFLIGHT_FAILED) when it cannot run here."""
        report = await self.preflight(pool_id)
        barring = Report(report.profile, tuple(f for f in report.findings if f.code in BARS_A_START))
        assert_passed(barring, pool_id)
        return barring

    def _tell_notes(self) -> None:
        """What the monitor cannot see though the scan went well, such as a kernel log that is not readable: each once."""
        for note in self.monitor.notes:
            if note not in self._told:
                self._told.add(note)
                self._events.emit("notice", note, level="info")

    def _on_incident(self, incident: DeviceIncident) -> None:
        self.watch.on_incident(incident)
