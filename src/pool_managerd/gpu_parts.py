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
FACTS_FRESH_S, FACTS_USABLE_S = 30.0, 600.0
"""So long the facts of the machine are believed by anybody, and by a start that they do not bar: a restart does not wait
for a tour of the machine. The GPUs are looked at anew for each.
"""


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

    async def preflight(self) -> Report:
        """The judgement over this machine for the whole configuration."""
        return self._judge(await self._machine(0.0), None)

    async def _machine(self, usable_s: float) -> HostFacts:
        now = self._clock.monotonic()
        if self._facts is None or now - self._facts[0] > usable_s:
            self._facts = now, await asyncio.to_thread(surveying.facts_of, self._config, os.environ)
        return self._facts[1]

    def _judge(self, facts: HostFacts, pools: tuple[str, ...] | None) -> Report:
        return surveying.judged(self._config, replace(facts, scan=self.watch.scan), pools=pools, own_ports=self._own_ports())

    async def announce(self) -> None:
        """Every finding that is not ok, as an event with its remedy. Beside the start of the pools: a driver may take seconds."""
        await self.watch.look()
        levels = {"fail": "error", "overridden": "warn", "warn": "info"}
        for finding in (await self.preflight()).findings:
            if finding.level in levels:
                self._events.emit(
                    "preflight", finding.message, level=levels[finding.level], code=finding.code, subject=finding.subject,
                    outcome=finding.level, remedy=list(finding.remedy),
                )  # fmt: skip

    async def require(self, pool_id: str) -> Report:
        """What was overridden for the pool. Raises NodeError (GPU_REQUIRED, PREFLIGHT_FAILED) when it cannot run here."""
        barring = self._barring(await self._machine(FACTS_USABLE_S), pool_id)
        if not barring.ok:  # perhaps no longer: look at the machine again before refusing
            barring = self._barring(await self._machine(FACTS_FRESH_S), pool_id)
        assert_passed(barring, pool_id)
        return barring

    def _barring(self, facts: HostFacts, pool_id: str) -> Report:
        report = self._judge(facts, (pool_id,))
        return Report(report.profile, tuple(f for f in report.findings if f.code in BARS_A_START))

    def _tell_notes(self) -> None:
        """What the monitor cannot see though the scan went well, such as a kernel log that is not readable: each once."""
        for note in self.monitor.notes:
            if note not in self._told:
                self._told.add(note)
                self._events.emit("notice", note, level="info")

    def _on_incident(self, incident: DeviceIncident) -> None:
        self.watch.on_incident(incident)
