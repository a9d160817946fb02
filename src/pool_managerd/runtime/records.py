"""The records that shims keep: which engines run, and how those ended whose end nobody has read yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.launch_record import SCHEMA_VERSION as LAUNCH_VERSION
from pool_managerd.core.launch_record import LaunchRecord
from pool_managerd.errors import NodeError
from pool_managerd.runtime import wire
from pool_managerd.runtime.directory import ConfinedDirectory
from pool_managerd.runtime.identity import Identity

MAX_RECORD_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What a shim wrote down: who its engine is and, once it ended, how. ``exit`` is None while it runs.

    ``launch`` is what it was started as, None in records of the first version. ``descendants`` are the pids and start ticks of
    what the engine had started when the shim last looked. ``began_at`` is the monotonic second of its order, which its process
    may have waited for; None where an earlier release has written the record.
    """

    identity: Identity
    exit: ExitRecord | None = None
    launch: LaunchRecord | None = None
    descendants: frozenset[tuple[int, int]] = frozenset()
    began_at: float | None = None


class InstanceRecords:
    """The directory ``shims``: one file per launch, written by the shim, readable by the daemon's user alone.

    What another user owns or could have written is not believed: a record decides whom a signal goes to.
    """

    def __init__(self, path: Path) -> None:
        self._directory = ConfinedDirectory(path, 0o700, closed=0o077)
        self._doubtful = False

    def prepare(self) -> list[str]:
        """Create the directory; what was put right. Raises NodeError, also when it belongs to somebody else."""
        repaired = self._directory.claim()
        if repaired and self._directory.names(".json"):
            self._doubtful = True
            repaired.append(f"The records in {self._directory.path} are not believed: engines of an earlier daemon may still run")
        return repaired

    def path(self, instance: InstanceId, epoch: int, nonce: str) -> Path:
        """Where the record of one launch is; the names are the caller's to check."""
        return self._directory.path / f"{instance.pool_id}-{instance.replica_id}-{epoch}-{nonce[:12]}.json"

    def all(self) -> list[InstanceRecord]:
        """Every record that can be read and believed. Raises NodeError when the directory cannot be used."""
        found: list[InstanceRecord] = []
        for name in self._directory.names(".json") if not self._doubtful else ():
            try:
                found.append(self._read(name))
            except (ValueError, TypeError, OSError):
                continue  # not a shim's; it stays for whoever wants to look
        return found

    def of(self, identity: Identity) -> InstanceRecord:
        """What the shim of this instance wrote down: nothing but who it is when the record is missing or damaged."""
        with suppress(ValueError, TypeError, OSError, NodeError):
            record = self._read(Path(identity.record_path).name)
            if record.identity.nonce == identity.nonce:
                return record
        return InstanceRecord(identity)

    def forget(self, identity: Identity) -> None:
        """Remove the record of an instance whose end was read. Raises NodeError."""
        self._directory.remove(Path(identity.record_path).name)

    def remove_temporaries(self) -> None:
        """Remove what shims that were killed while writing left behind. Raises NodeError."""
        for name in self._directory.names(".tmp"):
            self._directory.remove(name)

    def _read(self, name: str) -> InstanceRecord:
        return parse_record(self._directory.read_object(name, MAX_RECORD_BYTES, ours=True), str(self._directory.path / name))


def parse_record(content: Mapping[str, Any], record_path: str) -> InstanceRecord:
    """Read a shim's record of any released version. Raises ValueError when it is none, or newer than this version knows.

    The path is where it was found, whatever the record says: it is used to delete it.
    """
    if not isinstance(content.get("identity"), dict):
        raise ValueError("cannot use an instance record: no identity in it")
    if content.get("schema_version") not in range(1, wire.RECORD_VERSION + 1):
        raise ValueError(f"cannot use an instance record of version {content.get('schema_version')!r}")
    identity = Identity.from_json({**content["identity"], "record_path": record_path})
    ending = content.get("exit")
    seen = content.get("descendants")
    pairs = (tuple(pair) for pair in (seen if isinstance(seen, list) else ()) if isinstance(pair, list) and len(pair) == 2)
    descendants = frozenset((pid, ticks) for pid, ticks in pairs if type(pid) is type(ticks) is int)
    ended = parse_exit(ending) if isinstance(ending, dict) else None
    began_at = content.get("began_at")
    return InstanceRecord(
        identity, ended, _parse_launch(content.get("launch")), descendants, began_at if isinstance(began_at, float) else None
    )


def _parse_launch(data: Any) -> LaunchRecord | None:
    """None when it is not there or damaged: its engine can be stopped all the same. Raises ValueError for a newer version."""
    if not isinstance(data, dict):
        return None
    try:
        return LaunchRecord.from_json(data)
    except ValueError:
        version = data.get("schema_version")
        if isinstance(version, int) and version > LAUNCH_VERSION:
            raise
        return None


def parse_exit(data: Mapping[str, Any]) -> ExitRecord:
    """The ending part of a record; what a later version added is left out. Raises TypeError when it is none."""
    known = {field.name for field in fields(ExitRecord)}
    return ExitRecord(**{key: value for key, value in data.items() if key in known})
