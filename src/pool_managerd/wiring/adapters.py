"""The default adapters: the one place besides the daemon where concrete parts meet."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pool_managerd.config import Config, split_address
from pool_managerd.config.schema import not_in_force
from pool_managerd.core.baselines import Baselines
from pool_managerd.core.handoff import Handoff
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.redaction import Redactor
from pool_managerd.core.registry import KeptLeases, Registry
from pool_managerd.engines.ports import PortAllocator
from pool_managerd.engines.provisioner import EngineProvisioner
from pool_managerd.engines.submitted import prepared_from_json, prepared_to_json
from pool_managerd.errors import NodeError
from pool_managerd.models.buckets import BucketAccess
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.hub_access import HubAccess
from pool_managerd.models.importing import Importer
from pool_managerd.models.provisioner import ModelProvisioner
from pool_managerd.models.registry_access import logins_of
from pool_managerd.models.shelf import Shelf
from pool_managerd.models.web import Web, trusting
from pool_managerd.runtime import procfs
from pool_managerd.runtime.adoption import Adoption
from pool_managerd.runtime.confined import ConfinedRun
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.handoff import HandoffWatcher
from pool_managerd.runtime.launcher import Launcher, LaunchOptions
from pool_managerd.runtime.listener import Listeners
from pool_managerd.runtime.slot_files import SlotFiles
from pool_managerd.runtime.spawner import Spawner
from pool_managerd.runtime.survivors import stop_survivors
from pool_managerd.runtime.usage import EngineUsages
from pool_managerd.store.journal import Journal
from pool_managerd.store.leases import LeaseStore
from pool_managerd.store.lock import DirectoryLock
from pool_managerd.store.state import StateStore
from pool_managerd.supervision.boot_gate import BootGate
from pool_managerd.supervision.crash_log import CrashLog
from pool_managerd.supervision.epochs import Epochs
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.histories import Histories
from pool_managerd.supervision.prober import HttpProber
from pool_managerd.supervision.services import Services
from pool_managerd.supervision.slot_cache import SlotCaches
from pool_managerd.wiring.elsewhere import elsewhere_of
from pool_managerd.wiring.gpu_parts import GpuParts, PreflightMeans
from pool_managerd.wiring.model_events import telling
from pool_managerd.wiring.setups import user_rules

OnHandoff = Callable[[Handoff, float], None]
OnError = Callable[[str, str], None]


def ignore_fatal(problem: BaseException) -> None:
    """Embedded, a pool's broken task ends nothing else; the daemon ends itself instead (A11)."""


_HUB = "the hub of models"
"""Whose secret the hub's token is, for the redactor."""

_LOCKS_S = 5.0
_PLACE = "place"
"""The kind of the fact that says where the runtime directory was."""


class SystemClock:
    """The real time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def call_at(self, when: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), call)


class Adapters:
    """Concrete parts and their life. ``open`` takes the locks first: nothing is touched that another daemon uses."""

    def __init__(self, config: Config, redactor: Redactor | None = None) -> None:
        self.config = config
        self.clock = SystemClock()
        self.node_id = socket.gethostname()
        self.journal = Journal(config.daemon.state_dir)
        self.events = EventLog(self.clock.wall_ms, redactor, self.journal)
        self.leases = LeaseStore(config.daemon.state_dir, procfs.boot_id())
        self.kept_leases: list[KeptLeases] = []
        self.registry = Registry(self.clock.wall_ms, salt=secrets.token_hex(8), on_lease=self.leases.put)
        self.files = RuntimeFiles(config.daemon.runtime_dir)
        self.store = StateStore(config.daemon.state_dir)
        self._ports = PortAllocator(config.daemon.engine_ports, fixed_ports(config))
        self._spawner = Spawner()
        tell = partial(self.events.emit, "notice", level="warn")
        self._launcher = Launcher(self._spawner, self.files, launch_options(config), tell)
        self._adoption = Adoption(self.files, config.supervision.stop_grace_ms)
        hub, cache, digests = HubAccess.of(os.environ), ModelCache(config.model_cache), DigestCache()
        self.events.redactor.know(_HUB, () if hub.token is None else (hub.token,))
        how = config.models
        web = Web(
            lambda: self.models.policy, hub, tls=trusting(how.ca_file), proxy=how.proxy, bytes_per_s=how.bytes_per_s,
            logins=logins_of(os.environ), buckets=BucketAccess.of(os.environ),
        )  # fmt: skip
        self._fetcher = Fetcher(cache, web, how.keep_free_bytes, digests)
        self.models = ModelProvisioner(config.base_dir, config.policy, cache, self._fetcher, digests)
        told = partial(self.events.emit, "notice")
        self.models.elsewhere = elsewhere_of(config, cache, digests, user_rules(config), told)
        self._fetcher.room.max_bytes = config.models.max_bytes
        importer = Importer(cache, self._fetcher.room, digests)
        self.shelf = Shelf(cache, self._fetcher, lambda: self.models.policy, self.models.elsewhere, importer)
        self._fetcher.tell = self.models.tell = self.shelf.tell = telling(self.events)
        run = ConfinedRun(self._launcher.users)
        self.engines = EngineProvisioner(config, self._ports, check_model=self.models.shapes.of_gguf, run=run)
        self.prober = HttpProber()
        self.notices: list[str] = []
        self.fatal: Callable[[BaseException], None] = ignore_fatal
        self._locks = [
            DirectoryLock(config.daemon.state_dir, "state directory"),
            DirectoryLock(config.daemon.runtime_dir, "runtime directory", 0o755),
        ]
        means = PreflightMeans(self._own_ports, self.models, self.engines)
        self.gpu_parts = GpuParts(config, self.clock, self.events, self.store, means)
        self.gpus = self.gpu_parts.gpus(self.registry)
        self.services = Services(
            clock=self.clock, registry=self.registry, events=self.events, crashes=CrashLog(self.journal),
            epochs=Epochs(self.store), histories=Histories(self.store, procfs.boot_id()), baselines=Baselines(),
            launcher=self._launcher, adoption=self._adoption, models=self.models, engines=self.engines, files=self.files,
            prober=self.prober, usages=EngineUsages(), listener=Listeners(), records=self.store,
            gate=BootGate(config.daemon.preload_parallelism),
            preflight=self.gpu_parts.require, gpus=self.gpus, admission=self.gpu_parts.admission(self.gpus),
            sizer=self.gpu_parts.sizer(),
            slots=SlotCaches(SlotFiles(config.daemon.runtime_dir), self.engines, self.prober, self.clock, lambda: self.config),
            node_id=self.node_id, on_fatal=self._on_fatal,
        )  # fmt: skip

    def use_config(self, config: Config) -> None:
        """Other pools, and sections that a running daemon takes over; of the rest nothing may differ."""
        self.config = config
        self.gpu_parts.use_config(config)
        self.services.admission.together = config.together.rules
        self.models.policy = self.engines.policy = config.policy
        self._fetcher.room.keep_free, self._fetcher.room.max_bytes = config.models.keep_free_bytes, config.models.max_bytes
        self._ports.fixed = fixed_ports(config)

    def claim(self) -> None:
        """Take the locks, unless they are taken. Raises NodeError ALREADY_RUNNING with the holder's pid."""
        try:
            for lock in self._locks:
                self.notices += lock.acquire()
        except BaseException:
            self.unclaim()
            raise

    def unclaim(self) -> None:
        """Give the locks back; none held is no error."""
        for lock in self._locks:
            lock.release()

    async def open(self) -> dict[str, StoredPool]:
        """Locks, state, what an earlier daemon has left, the fork server. Raises NodeError; leaves nothing open then."""
        self.claim()
        try:
            loop = asyncio.get_running_loop()

            def told(trouble: str | None, done: str | None) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    loop.call_soon_threadsafe(self._tell_of_state, trouble, done)

            self.events.restore()
            self.services.crashes.restore()
            self.store.listener = told
            stored = self.store.open()
            self.kept_leases = self.leases.open(self.events.from_threads())
            self.notices += self.files.prepare()
            self.notices += await self._leave_earlier_place()
            self._adoption.find()
            await self.gpu_parts.open()
            await self._spawner.start()
        except BaseException:
            await self._close_stores()
            self.unclaim()
            raise
        self.notices += self.gpu_parts.notices
        self.notices += [f"{key} is set and has no effect in this version" for key in not_in_force(self.config)]
        if self.store.degraded:
            self.notices.append(self.store.degraded)
        return stored

    async def _leave_earlier_place(self) -> list[str]:
        """Where the runtime directory was another one: engines that still run there are ended, as nobody would know them again.

        A sentence for each.
        """
        now, known = str(self.config.daemon.runtime_dir.resolve()), self.store.facts(_PLACE).get("runtime_dir", {}).get("path")
        if known == now:
            return []
        told: list[str] = []
        if isinstance(known, str) and _had_engines(Path(known)):
            lock, records = DirectoryLock(Path(known), "runtime directory", 0o755), RuntimeFiles(Path(known)).records
            try:
                lock.acquire()
            except NodeError:  # another daemon's, by now
                return []
            try:
                left = [record.identity for record in records.all() if record.exit is None]
                ended = await stop_survivors(left, self.config.supervision.stop_grace_ms)
                told = [f"The runtime directory was {known}: {survivor.human}" for survivor in ended]
                for identity in left:
                    records.forget(identity)
            finally:
                lock.release()
        self.store.note_fact(_PLACE, "runtime_dir", {"path": now})
        return told

    def _tell_of_state(self, trouble: str | None, done: str | None) -> None:
        self.events.state_trouble = trouble
        if done is not None:
            self.events.emit("state_renewed", done, level="error")
        if trouble is not None:
            human = f"The state cannot be written: {trouble}; changes are refused until it can"
            self.events.emit("state_degraded", human, level="error", directory=str(self.config.daemon.state_dir))
        elif done is None:
            self.events.emit("state_recovered", "The state can be written again, and what was written was read back")

    async def close(self) -> None:
        await self.prober.close()
        await self.models.close()
        await self.gpu_parts.monitor.close()
        await self._spawner.close()
        await self._close_stores()
        self.unclaim()

    async def _close_stores(self) -> None:
        for store in (self.store, self.leases, self.journal):
            await store.close()

    def _on_fatal(self, problem: BaseException) -> None:
        self.fatal(problem)

    def _own_ports(self) -> frozenset[int]:
        return self._ports.all_claimed() | _bound(self.config)

    def own_tasks(self, on_handoff: OnHandoff, on_error: OnError) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
        """What the node does beside its pools, by what it is called."""
        return {
            "the watch of handoff files": self._watch_handoffs(on_handoff, on_error).run,
            "the watch of the GPUs": self.gpus.watch.run, "the report on this machine": self.gpu_parts.announce,
            "the watch of the locks": self._keep_locks,
        }  # fmt: skip

    async def _keep_locks(self) -> None:
        while True:
            await asyncio.sleep(_LOCKS_S)
            for told in filter(None, (lock.keep() for lock in self._locks)):
                self.events.emit("notice", told, level="error")

    def _watch_handoffs(self, on_handoff: OnHandoff, on_error: OnError) -> HandoffWatcher:
        own = _bound(self.config)

        def on_found(found: Handoff, duration_ms: float) -> None:
            parts = urlsplit(found.url)
            if parts.port in own and (parts.hostname in ("localhost", "::1") or (parts.hostname or "").startswith("127.")):
                on_error(found.path, f"cannot use the handoff file {found.path}: {found.url} is this daemon itself")
            else:
                on_handoff(found, duration_ms)

        return HandoffWatcher(self.files, on_found, on_error)

    def new_id(self) -> str:
        return uuid.uuid4().hex

    parse_prepared = staticmethod(prepared_from_json)
    prepared_to_json = staticmethod(prepared_to_json)


def fixed_ports(config: Config) -> frozenset[int]:
    """The ports that pools have asked for, and those of this node itself."""
    return frozenset(_bound(config).union(*(pool.provisioning.ports for pool in config.pools)))


def _bound(config: Config) -> frozenset[int]:
    """The ports that this node itself listens on."""
    binds = (config.daemon.bind, config.daemon.metrics_bind, config.gateway.bind)
    return frozenset(split_address(bind)[1] for bind in binds if bind is not None)


def launch_options(config: Config) -> LaunchOptions:
    """How the configuration wants engines to be run."""
    return LaunchOptions(user_rules(config), config.profile)


def default_adapters(config: Config, redactor: Redactor | None = None) -> Adapters:
    """The adapters of a real node. ``redactor`` learns the pools' secrets; a log may share it.

    Raises NodeError where /proc cannot be believed: engines could not be told from other programs.
    """
    if not procfs.is_ours():
        raise NodeError(
            "cannot run here: /proc is not mounted, or shows another pid namespace than this process is in",
            hint="mount -t proc proc /proc  # or unshare with --mount-proc", retriable=False,
        )  # fmt: skip
    return Adapters(config, redactor)


def _had_engines(runtime_dir: Path) -> bool:
    return (runtime_dir / "shims").is_dir()
