"""The runtime directory (SPEC §12): pid files, engine logs, handoff files, shims' records, working directories.

Every name is made from a checked pool id, every write is a new file renamed into place, and no link is followed
at a place where a file of ours belongs: what is planted there is refused, not written through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pool_managerd.config import is_pool_id
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.narration import printable
from pool_managerd.core.redaction import masked_argv
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.runtime.directory import ConfinedDirectory, cannot
from pool_managerd.runtime.records import InstanceRecords

LATEST_HANDOFF = "engine.json"
MANAGED_BY = "pool-managerd"


class RuntimeFiles:
    """All files under one runtime directory. Methods raise NodeError when the disk or what lies there forbids it.

    ``records`` are the shims'; ``engines`` is the directory of handoff files. Nothing is synced to disk: all of
    it describes processes, which end with the boot.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self.root = Path(os.path.abspath(runtime_dir))
        self.engines = ConfinedDirectory(self.root / "engines", 0o755)
        self.records = InstanceRecords(self.root / "shims")
        self._top = ConfinedDirectory(self.root, 0o755, may_be_link=True)
        self._work = ConfinedDirectory(self.root / "work", 0o755)

    def prepare(self) -> None:
        """Create what is missing (SPEC §6.1 no. 8): 0755, but 0700 for ``shims``, where exit records are."""
        for directory in (self._top, self.engines, self._work):
            with directory.opened():
                pass
        self.records.prepare()

    def pid_path(self, pool_id: str) -> Path:
        """``{pool_id}.pid``."""
        return self.root / f"{_checked(pool_id)}.pid"

    def log_path(self, pool_id: str) -> Path:
        """``engine-{pool_id}.log``; older parts have ``.1``, ``.2`` appended."""
        return self.root / f"engine-{_checked(pool_id)}.log"

    def handoff_path(self, pool_id: str, replica_id: str) -> Path:
        """``engines/{pool_id}-{replica_id}.json``."""
        return self.engines.path / f"{_checked(pool_id)}-{_checked(replica_id)}.json"

    def write_pid(self, pool_id: str, pid: int) -> None:
        """Write the engine's own pid, in digits only."""
        self._top.write(self.pid_path(pool_id).name, str(pid).encode())

    def remove_pid(self, pool_id: str) -> None:
        """Remove the pid file, if there is one."""
        self._top.remove(self.pid_path(pool_id).name)

    def write_handoff(self, engine: PreparedEngine, pid: int, *, written_at_ms: int) -> Path:
        """Write the per-replica handoff file and its copy ``engine.json``; returns the copy's path (SPEC §20 no. 39)."""
        content = handoff_content(engine, pid, written_at_ms)
        data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        # For the daemon's own user: flags may say more than this file's masks know of.
        self.engines.write(self.handoff_path(engine.pool_id, engine.replica_id).name, data, 0o600)
        self.engines.write(LATEST_HANDOFF, data, 0o600)
        return self.engines.path / LATEST_HANDOFF

    def remove_handoff(self, pool_id: str, replica_id: str) -> None:
        """Remove the replica's handoff file, and the copy when it is about this replica."""
        self.engines.remove(self.handoff_path(pool_id, replica_id).name)
        latest = self._handoff(LATEST_HANDOFF)
        if latest.get("pool_id") == pool_id and latest.get("replica_id") == replica_id:
            self.engines.remove(LATEST_HANDOFF)

    def remove_stale(self) -> list[str]:
        """Forget a dead predecessor: its handoff, pid and temporary files. Returns the paths removed.

        Call it once no engine of this runtime directory runs any more, before the first launch.
        """
        handoffs = [name for name in self.engines.names(".json") if is_own_handoff(name, self._handoff(name))]
        pids = [name for name in self._top.names(".pid") if is_pool_id(name.removesuffix(".pid"))]
        stale = [(self.engines, name) for name in (*handoffs, *self.engines.names(".tmp"))]
        stale += [(self._top, name) for name in (*pids, *self._top.names(".tmp"))]
        self.records.remove_temporaries()
        return [str(directory.path / name) for directory, name in stale if directory.remove(name)]

    def workdir(self, pool_id: str, uid: int, gid: int) -> Path:
        """The engine's working directory ``work/{pool_id}``, mode 0700, owned by the user it runs as."""
        path = self._work.path / _checked(pool_id)
        with self._work.opened():
            pass
        with ConfinedDirectory(path, 0o700).opened() as fd:
            try:
                if (os.fstat(fd).st_uid, os.fstat(fd).st_gid) != (uid, gid):
                    os.fchown(fd, uid, gid)
                os.fchmod(fd, 0o700)
            except OSError as error:
                raise cannot("use", path, error) from error
        return path

    def tail_log(self, pool_id: str, max_bytes: int = 8192, max_lines: int = 20) -> list[str]:
        """The last lines of the engine's log, newest last, safe to show: control characters are escaped."""
        name = self.log_path(pool_id).name
        data = self._top.read_end(name, max_bytes)
        if len(data) < max_bytes:  # just rotated, the newest lines may be in the previous part
            data = self._top.read_end(f"{name}.1", max_bytes - len(data)) + data
        if len(data) >= max_bytes:
            cut, newline, rest = data.partition(b"\n")
            data = rest if newline and rest else cut  # a first line that is cut is left out, unless it is all there is
        return [printable(line) for line in data.decode("utf-8", "replace").split("\n") if line.strip()][-max_lines:]

    def _handoff(self, name: str) -> dict[str, Any]:
        try:
            return self.engines.read_object(name)
        except (OSError, ValueError, NodeError):
            return {}


def handoff_content(engine: PreparedEngine, pid: int, written_at_ms: int) -> dict[str, Any]:
    """What a handoff file says (SPEC §12): the keys that readers know, plus who wrote it."""
    return {
        "schema_version": 1,
        "pool_id": engine.pool_id,
        "replica_id": engine.replica_id,
        "url": engine.url,
        "engine": engine.engine,
        "engine_version": engine.engine_version,
        "provisioning_mode": engine.provisioning_mode,
        "pid": pid,
        "model": {"id": engine.model_id, "path": engine.model_path},
        "flags": masked_argv(engine.argv)[1:],
        "device_mask": engine.device_mask,
        "slots_total": engine.slots_total,
        "slots_free": engine.slots_total,
        "engine_digest": None,
        "engine_catalog_id": None,
        "written_at_ms": written_at_ms,
        "managed_by": MANAGED_BY,
    }


def is_own_handoff(name: str, content: Mapping[str, Any]) -> bool:
    """True for a file that a daemon wrote about its own engine, rather than somebody about an external one."""
    expected = f"{content.get('pool_id')}-{content.get('replica_id')}.json"
    return content.get("managed_by") == MANAGED_BY and name in (expected, LATEST_HANDOFF)


def _checked(name: str) -> str:
    if not is_pool_id(name):
        raise SpecError(
            f"cannot use {name[:80]!r} in a file name", code="INVALID_POOL_ID", hint="use letters, digits, '.', '_' and '-'"
        )
    return name
