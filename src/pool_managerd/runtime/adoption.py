"""The engines that an earlier daemon has left, and how another daemon takes hold of them (DESIGN §4).

Their shims looked after them meanwhile, and wrote down who they are, what they were started as and, of those that ended, how.
Which of them is whose is never asked of a pid alone: the record must be of this boot, and the process proved to be the one that
it speaks of, after a pidfd of it was opened. What is left over goes the way of all survivors: it is stopped, by its shim where
it has one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import LaunchRecord, LeftEngine
from pool_managerd.errors import EngineError
from pool_managerd.runtime import isolation, procfs
from pool_managerd.runtime.attestation import changed
from pool_managerd.runtime.files import RuntimeFiles
from pool_managerd.runtime.identity import open_proved
from pool_managerd.runtime.process import Connection, EngineProcess
from pool_managerd.runtime.records import InstanceRecord
from pool_managerd.runtime.survivors import Survivor, stop_survivors


class Adoption:
    """What was left in one runtime directory. ``find`` looks; then every instance's engine is adopted, or goes with ``clear``."""

    def __init__(self, files: RuntimeFiles, grace_ms: int) -> None:
        self._files = files
        self._grace_ms = grace_ms
        self._records: dict[InstanceId, InstanceRecord] = {}
        self._left: dict[InstanceId, LeftEngine] = {}
        self._nonces: dict[InstanceId, str] = {}
        self._others: list[InstanceRecord] = []

    def find(self) -> None:
        """Read the shims' records. Raises NodeError."""
        newest = sorted(self._files.records.all(), key=lambda record: record.identity.epoch)
        for record in newest:
            left = self._left_by(record)
            if left is None:
                self._others.append(record)
                continue
            instance = left.launch.instance
            if (older := self._records.get(instance)) is not None:
                self._others.append(older)  # an instance has one engine, the one that was started last
            self._records[instance], self._left[instance] = record, left
            self._nonces[instance] = record.identity.nonce

    def left(self) -> Mapping[InstanceId, LeftEngine]:
        """What can be adopted."""
        return self._left

    def adopt(self, instance: InstanceId) -> EngineProcess:
        """Take hold of what it has left; it is no longer left then. Raises EngineError when there is none any more."""
        record = self._records.pop(instance, None)
        self._left.pop(instance, None)
        if record is None:
            pool_id = instance.pool_id
            raise EngineError(f"cannot adopt an engine of pool {pool_id}: none was left", pool_id=pool_id)
        who = record.identity
        engine = open_proved(who.pid, who.engine_runs)
        shim = open_proved(who.shim_pid, who.shim_runs)
        seen = isolation.read_back(who.pid) if engine is not None else "none"
        return EngineProcess(who, Connection(None, engine, shim), self._files.records, isolation=seen)

    def changed(self, launch: LaunchRecord) -> list[str]:
        """Which of the files that the launch was started from are not any more what they were. Blocks for a moment."""
        return changed(launch.files)

    async def clear(self, kept: Collection[InstanceId]) -> list[Survivor]:
        """Stop what is left of instances that are not ``kept``, and all that cannot be adopted; forget the files that tell of it.

        Takes the grace of a stop and about ten seconds at most. Raises NodeError.
        """
        for instance in self._records.keys() - set(kept):
            self._others.append(self._records.pop(instance))
            del self._left[instance]
            del self._nonces[instance]
        others, self._others = self._others, []
        stopped = await stop_survivors([record.identity for record in others if record.exit is None], self._grace_ms)
        for record in others:
            self._files.records.forget(record.identity)
        self._files.remove_stale(dict(self._nonces))  # of those that were adopted meanwhile, too
        return stopped

    def _left_by(self, record: InstanceRecord) -> LeftEngine | None:
        """None for what cannot be adopted: of another boot, of a release that wrote no launch down, or alive without its shim."""
        who = record.identity
        if record.launch is None or not who.is_this_boot():
            return None
        if record.exit is None and not who.shim_runs() and who.engine_runs():
            return None  # nobody keeps its output or would collect it
        ready = self._files.announced_pid(record.launch.instance) == who.pid
        began_at = procfs.started_at(who.start_ticks) if record.began_at is None else record.began_at
        return LeftEngine(record.launch, began_at, ready, record.exit)
