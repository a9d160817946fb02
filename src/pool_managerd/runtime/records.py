"""The records that shims keep: which engines run, and how those ended whose end nobody has read yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.errors import NodeError
from pool_managerd.runtime.directory import ConfinedDirectory
from pool_managerd.runtime.identity import Identity


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """What a shim wrote down: who its engine is and, once it ended, how. ``exit`` is None while it runs."""

    identity: Identity
    exit: ExitRecord | None = None


class InstanceRecords:
    """The directory ``shims``: one file per launch, written by the shim, readable by the daemon's user alone."""

    def __init__(self, path: Path) -> None:
        self._directory = ConfinedDirectory(path, 0o700, closed=0o077)

    def prepare(self) -> list[str]:
        """Create the directory; what was put right. Raises NodeError, also when it belongs to somebody else."""
        with self._directory.opened():
            repaired, self._directory.repaired = self._directory.repaired, []
        return repaired

    def path(self, pool_id: str, replica_id: str, epoch: int, nonce: str) -> Path:
        """Where the record of one launch is; the names are the caller's to check."""
        return self._directory.path / f"{pool_id}-{replica_id}-{epoch}-{nonce[:12]}.json"

    def all(self) -> list[InstanceRecord]:
        """Every readable record. Raises NodeError when the directory cannot be used."""
        found: list[InstanceRecord] = []
        for name in self._directory.names(".json"):
            try:
                found.append(self._read(name))
            except (ValueError, TypeError, OSError):
                continue  # not a shim's; it stays for whoever wants to look
        return found

    def exit_of(self, identity: Identity) -> ExitRecord | None:
        """How this instance ended; None while it runs, and when the record is missing or damaged."""
        try:
            record = self._read(Path(identity.record_path).name)
        except (ValueError, TypeError, OSError, NodeError):
            return None
        return record.exit if record.identity.nonce == identity.nonce else None

    def forget(self, identity: Identity) -> None:
        """Remove the record of an instance whose end was read. Raises NodeError."""
        self._directory.remove(Path(identity.record_path).name)

    def remove_temporaries(self) -> None:
        """Remove what shims that were killed while writing left behind. Raises NodeError."""
        for name in self._directory.names(".tmp"):
            self._directory.remove(name)

    def _read(self, name: str) -> InstanceRecord:
        return parse_record(self._directory.read(name), str(self._directory.path / name))


def parse_record(data: bytes, record_path: str) -> InstanceRecord:
    """Read a shim's record of any released version. Raises ValueError when it is none.

    The path is where it was found, whatever the record says: it is used to delete it.
    """
    content = json.loads(data)
    if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
        raise ValueError("cannot use an instance record: no identity in it")
    if content.get("schema_version") != 1:
        raise ValueError(f"cannot use an instance record of version {content.get('schema_version')!r}")
    identity = Identity.from_json({**content["identity"], "record_path": record_path})
    ending = content.get("exit")
    return InstanceRecord(identity, parse_exit(ending) if isinstance(ending, dict) else None)


def parse_exit(data: Mapping[str, Any]) -> ExitRecord:
    """The ending part of a record; what a later version added is left out. Raises TypeError when it is none."""
    known = {field.name for field in fields(ExitRecord)}
    return ExitRecord(**{key: value for key, value in data.items() if key in known})
