"""The runtime directory (SPEC §12): pid files, engine logs, handoff files, shims' records, working directories.

Every name is made from a checked pool id, every write is a new file renamed into place, and no link is followed
at a place where a file of ours belongs: what is planted there is refused, not written through.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pool_managerd import failpoints
from pool_managerd.config import is_pool_id
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.crash_diagnosis import LaunchLog
from pool_managerd.core.crash_evidence import pieces
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.core.narration import printable
from pool_managerd.core.redaction import masked_argv
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.runtime.directory import ConfinedDirectory, cannot
from pool_managerd.runtime.pool_places import swept
from pool_managerd.runtime.records import InstanceRecords
from pool_managerd.runtime.removal import TEMPORARY, remove_where, removed_name

LATEST_HANDOFF = "engine.json"
MANAGED_BY = "pool-managerd"
LOG_PARTS = 4
LAUNCH_HEAD_BYTES, LAUNCH_TAIL_BYTES = 64 << 10, 128 << 10
"""Of one launch's log: a cause may stand early, with pages of consequences behind it."""
NOTHING_KEPT: Mapping[InstanceId, str] = MappingProxyType({})
_REPLICA = "@"
"""No id has it, so what a replica's files are called is no other pool's name."""


class RuntimeFiles:
    """All files under one runtime directory. Methods raise NodeError when the disk or what lies there forbids it.

    ``records`` are the shims'; ``engines`` is the directory of handoff files. Nothing is synced to disk: all of
    it describes processes, which end with the boot.
    """

    def __init__(self, runtime_dir: Path) -> None:
        self.root = Path(os.path.abspath(runtime_dir))
        self.engines = ConfinedDirectory(self.root / "engines", 0o755, closed=0o002)  # a group may announce engines
        self.records = InstanceRecords(self.root / "shims")
        self._top = ConfinedDirectory(self.root, 0o755, may_be_link=True)
        self._work = ConfinedDirectory(self.root / "work", 0o755)
        self._cache = ConfinedDirectory(self.root / "cache", 0o755)
        self.unswept = False  # something was taken away, and its content is still there
        self._announced_last: InstanceId | None = None

    def prepare(self) -> list[str]:
        """Create what is missing (SPEC §6.1 no. 8): 0755, but 0700 for ``shims``, where exit records are.

        What was writable for others and is not any more is returned, a sentence each. Raises NodeError.
        """
        directories = (self._top, self.engines, self._work, self._cache)
        return [told for directory in directories for told in directory.claim()] + self.records.prepare()

    def prepare_launch(self) -> None:
        """What must be whole before a launch is judged in a thread; all else is made by its first use. Raises NodeError."""
        with self._work.opened():
            self.records.prepare()

    def pid_path(self, instance: InstanceId) -> Path:
        """``{pool_id}.pid``; of another replica than ``r0`` ``{pool_id}@{replica_id}.pid``."""
        return self.root / f"{_file_stem(instance)}.pid"

    def log_path(self, instance: InstanceId) -> Path:
        """``engine-{pool_id}.log``, or ``engine-{pool_id}@{replica_id}.log``; older parts have ``.1``, ``.2`` appended."""
        return self.root / log_name(instance)

    def handoff_path(self, instance: InstanceId) -> Path:
        """``engines/{pool_id}-{replica_id}.json``."""
        return self.engines.path / f"{_checked(instance.pool_id)}-{_checked(instance.replica_id)}.json"

    def write_pid(self, instance: InstanceId, pid: int) -> None:
        """Write the engine's own pid, in digits only."""
        failpoints.reach("pid.write")
        self._top.write(self.pid_path(instance).name, str(pid).encode())

    def remove_pid(self, instance: InstanceId) -> None:
        """Remove the pid file, if there is one."""
        self._top.remove(self.pid_path(instance).name)

    def write_handoff(self, engine: AnyEngine, pid: int, *, written_at_ms: int) -> Path:
        """Write the per-replica handoff file and its copy ``engine.json``; returns the copy's path (SPEC §20 no. 39)."""
        content = handoff_content(engine, pid, written_at_ms)
        data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        failpoints.reach("handoff.write")
        # For the daemon's own user: flags may say more than this file's masks know of.
        self.engines.write(self.handoff_path(engine.instance_id).name, data, 0o600)
        self.engines.write(LATEST_HANDOFF, data, 0o600)
        self._announced_last = engine.instance_id
        return self.engines.path / LATEST_HANDOFF

    def remove_handoff(self, instance: InstanceId) -> None:
        """Remove the replica's handoff file, and the copy when it is about this replica."""
        self.engines.remove(self.handoff_path(instance).name)
        if self._announced_last in (None, instance) and self._latest_instance() == instance:
            self.engines.remove(LATEST_HANDOFF)

    def are_there(self, instance: InstanceId) -> bool:
        """Whether the pid and handoff files of a ready engine still are: somebody may have cleared old files away."""
        return all(os.path.lexists(path) for path in (self.pid_path(instance), self.handoff_path(instance)))

    def _latest_instance(self) -> InstanceId:
        """Whom the copy is about; one without names when there is none."""
        latest = self._handoff(LATEST_HANDOFF)
        return InstanceId(str(latest.get("pool_id", "")), str(latest.get("replica_id", "")))

    def announced_pid(self, instance: InstanceId) -> int | None:
        """The pid that the replica's handoff file tells of: the one that was ready last; None without one."""
        pid = self._handoff(self.handoff_path(instance).name).get("pid")
        return pid if type(pid) is int else None

    def remove_stale(self, kept: Mapping[InstanceId, str] = NOTHING_KEPT) -> None:
        """Forget a dead predecessor: its handoff, pid and temporary files, before the first launch.

        No engine of this runtime directory runs then but those of ``kept``, which has their launches' nonces.
        """
        spared = {path(instance).name for instance in kept for path in (self.pid_path, self.handoff_path)}
        if self._latest_instance() in kept:
            spared.add(LATEST_HANDOFF)
        handoffs = [name for name in self.engines.names(".json") if is_own_handoff(name, self._handoff(name))]
        pids = [name for name in self._top.names(".pid") if is_pool_id(name.removesuffix(".pid").partition(_REPLICA)[0])]
        handoffs, pids = [[name for name in names if name not in spared] for names in (handoffs, pids)]
        for name in (*handoffs, *self.engines.names(".tmp")):
            self.engines.remove(name)
        for name in (*pids, *self._top.names(".tmp")):
            self._top.remove(name)
        self.records.remove_temporaries()
        in_use = {f"{TEMPORARY}{nonce[:8]}" for nonce in kept.values()}
        for pool_id in self.workdir_owners():
            remove_where(str(self._work.path / pool_id), lambda _, name: name.startswith(TEMPORARY) and name not in in_use)

    def workdir(self, pool_id: str, uid: int, gid: int) -> Path:
        """The engine's working directory ``work/{pool_id}``, mode 0700, owned by the user it runs as.

        One that another user filled is replaced: what lies there would run as this one.
        """
        return self._own(self._work, pool_id, uid, gid)

    def temporary(self, pool_id: str, nonce: str, uid: int, gid: int) -> Path:
        """A directory for the temporary files of one launch, inside the working directory; its shim removes it."""
        path = self._work.path / _checked(pool_id) / f"{TEMPORARY}{nonce[:8]}"
        with ConfinedDirectory(path.parent, 0o700, owned=False).opened() as fd:
            try:
                os.mkdir(path.name, 0o700, dir_fd=fd)
                _give_away(fd, path.name, uid, gid)
            except OSError as error:
                raise cannot("use", path, error) from error
        return path

    def cachedir(self, pool_id: str, uid: int, gid: int) -> Path:
        """``cache/{pool_id}``: as ``workdir``, for what a later launch may use again."""
        return self._own(self._cache, pool_id, uid, gid)

    def _own(self, parent: ConfinedDirectory, pool_id: str, uid: int, gid: int) -> Path:
        name = _checked(pool_id)
        path = parent.path / name
        with parent.opened() as fd:
            if _owner(fd, name) not in (uid, None):
                self._put_away(parent, fd, name)
        with ConfinedDirectory(path, 0o700, owned=False).opened() as fd:
            try:
                info = os.fstat(fd)
                if (info.st_uid, info.st_gid) != (uid, gid):
                    os.fchown(fd, uid, gid)
                if stat.S_IMODE(info.st_mode) != 0o700:
                    os.fchmod(fd, 0o700)
            except OSError as error:
                raise cannot("use", path, error) from error
        return path

    def forget_pool(self, pool_id: str) -> None:
        """Take away what is left of a pool that is gone: its directories, and all replicas' logs and pids. Raises NodeError.

        They have no name from the first moment on; ``sweep`` then removes their content, however much it is.
        """
        name = _checked(pool_id)
        for parent in (self._work, self._cache):
            with parent.opened() as fd:
                if _owner(fd, name) is not None:
                    self._put_away(parent, fd, name)
        replica = f"{re.escape(name)}(?:{_REPLICA}.+)?"
        own = re.compile(rf"engine-{replica}\.log(?:\.[0-9]+)?|{replica}\.pid")
        for old in filter(own.fullmatch, self._top.names("")):
            self._top.remove(old)

    def forget_others(self, pool_ids: Iterable[str]) -> None:
        """Forget every pool that left files here and is not among ``pool_ids``. Raises NodeError."""
        known = set(pool_ids)
        found = {name for parent in (self._work, self._cache) for name in parent.names("") if is_pool_id(name)}
        for pool_id in found - known:
            self.forget_pool(pool_id)

    def sweep(self) -> list[str]:
        """Remove what ``forget_pool`` and ``workdir`` took away; what stays of it, in words. Blocks; meant for a thread.

        Raises NodeError.
        """
        self.unswept = False
        return [*swept(self._work), *swept(self._cache)]

    def _put_away(self, parent: ConfinedDirectory, fd: int, name: str) -> None:
        self.unswept = True
        try:
            os.rename(name, removed_name(name), src_dir_fd=fd, dst_dir_fd=fd)
        except OSError as error:
            raise cannot("take away", parent.path / name, error) from error

    def workdir_owners(self) -> dict[str, int]:
        """Pool ids and the uids that their working directories belong to."""
        try:
            with os.scandir(self._work.path) as entries:
                return {entry.name: entry.stat(follow_symlinks=False).st_uid for entry in entries}
        except OSError:  # nothing was launched here yet
            return {}

    def tail_log(self, instance: InstanceId, max_bytes: int = 8192, max_lines: int = 20) -> list[str]:
        """The last lines of the engine's log, newest last, safe to show: control characters are escaped."""
        name = self.log_path(instance).name
        data = self._top.read_part(name, -max_bytes, max_bytes)
        if len(data) < max_bytes:  # just rotated, the newest lines may be in the previous part
            missing = max_bytes - len(data)
            data = self._top.read_part(f"{name}.1", -missing, missing) + data
        if len(data) >= max_bytes:
            cut, newline, rest = data.partition(b"\n")
            data = rest if newline and rest else cut  # a first line that is cut is left out, unless it is all there is
        return [printable(line) for line in data.decode("utf-8", "replace").split("\n") if line.strip()][-max_lines:]

    def log_mark(self, instance: InstanceId) -> dict[int, int]:
        """How long each part of the engine's log is now, by inode: what is there before a launch is not of that launch."""
        return dict(self._top.identities(self._log_parts(instance)).values())

    def launch_log(self, instance: InstanceId, mark: Mapping[int, int]) -> LaunchLog:
        """What the log was given since ``mark``: its first and last lines, as a terminal would leave them, safe to show."""
        written: list[tuple[str, int, int]] = []
        for name, (inode, size) in reversed(self._top.identities(self._log_parts(instance)).items()):
            start = mark.get(inode, 0)
            start = 0 if start > size else start  # cut by somebody, or another file that got the number
            if size > start:
                written.append((name, start, size))
        head, tail = b"", b""
        for name, start, size in written:
            head += self._top.read_part(name, start, min(LAUNCH_HEAD_BYTES - len(head), size - start))
        for name, start, size in reversed(written):
            count = min(LAUNCH_TAIL_BYTES - len(tail), size - start)
            tail = self._top.read_part(name, size - count, count) + tail
        whole = sum(size - start for _, start, size in written)
        if whole <= len(head) + len(tail):
            head, tail = head + tail[len(tail) - (whole - len(head)) :] if whole > len(head) else head, b""
        found = [*_lines_of(head, 0), *(_lines_of(tail, whole - len(tail)) if tail else ())]
        return LaunchLog(tuple(line for line, _ in found), tuple(offset for _, offset in found))

    def _log_parts(self, instance: InstanceId) -> list[str]:
        name = self.log_path(instance).name
        return [name, *(f"{name}.{number}" for number in range(1, LOG_PARTS))]

    def _handoff(self, name: str) -> dict[str, Any]:
        try:
            return self.engines.read_object(name)
        except (OSError, ValueError, NodeError):
            return {}


def handoff_content(engine: AnyEngine, pid: int, written_at_ms: int) -> dict[str, Any]:
    """What a handoff file says (SPEC §12): the keys that readers know, plus who wrote it."""
    return {
        "schema_version": 1,
        "pool_id": engine.pool_id,
        "replica_id": engine.replica_id,
        "url": engine.url,
        "engine": engine.engine,
        "engine_version": engine.engine_version,
        "provisioning_mode": engine.provisioning_mode if isinstance(engine, PreparedEngine) else "external",
        "pid": pid,
        "model": {"id": engine.model_id, "path": engine.model_path},
        "flags": masked_argv(engine.argv)[1:] if isinstance(engine, PreparedEngine) else [],
        "device_mask": engine.device_mask,
        "slots_total": engine.slots_total,
        "slots_free": engine.slots_total,
        "engine_digest": None,
        "engine_catalog_id": None,
        "written_at_ms": written_at_ms,
        "managed_by": MANAGED_BY,
    }


def _lines_of(data: bytes, offset: int) -> Iterator[tuple[str, int]]:
    """The lines of ``data``, and where each begins; ``offset`` is where ``data`` does."""
    for line in data.split(b"\n"):
        for piece in pieces(line.decode("utf-8", "replace")):
            if piece.strip():
                yield printable(piece), offset
        offset += len(line) + 1


def log_name(instance: InstanceId) -> str:
    """What the log of the replica is called."""
    return f"engine-{_file_stem(instance)}.log"


def is_own_handoff(name: str, content: Mapping[str, Any]) -> bool:
    """True for a file that a daemon wrote about its own engine, rather than somebody about an external one."""
    expected = f"{content.get('pool_id')}-{content.get('replica_id')}.json"
    return content.get("managed_by") == MANAGED_BY and name in (expected, LATEST_HANDOFF)


def _give_away(directory: int, name: str, uid: int, gid: int) -> None:
    """Hand over a directory that we just made where its new owner may have put something else in its place."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "something else was put in its place")
        os.fchown(fd, uid, gid)
    finally:
        os.close(fd)


def _owner(directory: int, name: str) -> int | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_uid
    except OSError:
        return None


def _file_stem(instance: InstanceId) -> str:
    """The pool's name, which SPEC §12 gives to the files of ``r0``; other replicas have theirs behind it."""
    pool_id, replica_id = _checked(instance.pool_id), _checked(instance.replica_id)
    return pool_id if instance == InstanceId(pool_id) else f"{pool_id}{_REPLICA}{replica_id}"


def _checked(name: str) -> str:
    if not is_pool_id(name):
        raise SpecError(
            f"cannot use {name[:80]!r} in a file name", code="INVALID_POOL_ID", hint="use letters, digits, '.', '_' and '-'"
        )
    return name
