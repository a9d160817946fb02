"""Leases that outlive the daemon, as long as the machine is not started anew: the engines that they are on end then, too.

A database of its own, ``leases.db``: it is written far more often than the intent, and nothing in it is worth a wait for the
disk. Writes go to the kernel and are not synced (``synchronous=OFF``): that survives SIGKILL, which is all it is for. One
thread writes whatever is there in one commit; whoever acknowledges a lease waits for that commit and not for the disk.

Room for some thousand leases is taken while there is room, so that leases go on when the disk is full. What cannot be written
all the same is refused.

What is written is kept in memory as well. A file that somebody removed, replaced or damaged is begun anew from there.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd import failpoints
from pool_managerd.core.registry import KeptLeases, Lease, LeaseChange
from pool_managerd.errors import NodeError
from pool_managerd.store.place import is_damage, linked_part, parts_of, refuse_newer, rename_database
from pool_managerd.store.writer import Writer

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS boot (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), boot_id TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS leases (
    lease_id TEXT PRIMARY KEY, pool_id TEXT NOT NULL, epoch INTEGER NOT NULL, holder TEXT, given_at_ms INTEGER NOT NULL,
    expires_at REAL, key TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS newest (pool_id TEXT PRIMARY KEY, lease_id TEXT NOT NULL) STRICT;
"""
ROOM_BYTES = 512 << 10
SPARED_BYTES = 4 << 20
"""Of the disk, where less is free no room is taken in advance."""
_CHECKPOINT_PAGES = 64  # a quarter of the room; the journal is written over from its beginning then
_LEASE_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{1,16}")


class LeaseStore:
    """``put`` is called in the node's loop and never waits; ``kept`` returns when all that was put before is written."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self._path = state_dir / "leases.db"
        self._boot_id = boot_id
        self._rows: dict[str, tuple[str, int, Lease]] = {}
        self._newest: dict[str, str] = {}
        self._changes: deque[LeaseChange] = deque()
        self._tell: Callable[[str, str], None] = lambda human, level: None
        self._trouble: str | None = None
        self._writer = Writer("lease-writer", self._write, self._disconnect)
        # The thread's own, once it runs.
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._unwritten: set[str] = set()
        self._unwritten_pools: set[str] = set()

    def open(self, tell: Callable[[str, str], None] = lambda human, level: None) -> list[KeptLeases]:
        """What an earlier daemon of this boot kept; nothing of another boot's.

        ``tell`` gets a sentence and its level, from any thread, when writing fails and when it works again.
        Raises NodeError STATE_TOO_NEW for a file that a newer version wrote, which stays untouched.
        """
        self._tell = tell
        try:
            self._connect()
            found = self._read()
        except (sqlite3.Error, OSError, ValueError):
            found = []
            with suppress(sqlite3.Error, OSError, ValueError):  # it is tried again with the first lease
                self._begin_anew()
        self._rows = {lease.lease_id: (kept.pool_id, epoch, lease) for kept in found for epoch, lease in kept.leases}
        self._newest = {kept.pool_id: kept.newest_id for kept in found}
        self._writer.start()
        return found

    def put(self, change: LeaseChange) -> None:
        """A lease was given or renewed, or is over."""
        self._changes.append(change)
        self._writer.wake()

    async def kept(self) -> None:
        """Raises NodeError STATE_UNWRITABLE when what was put before could not be written; it is tried again with the next."""
        if (trouble := await self._writer.written()) is not None:
            raise NodeError(
                f"cannot keep leases in {self._path}: {trouble}", code="STATE_UNWRITABLE", status=507,
                hint="free space there, or make the directory writable; leases are refused until then",
            )  # fmt: skip

    async def close(self) -> None:
        """All that was put is written when this returns, if it can be."""
        await self._writer.close()

    # --- the writer's thread ---

    def _write(self) -> str | None:
        self._take_up()
        trouble = None
        try:
            self._make_sure_of_the_file()
            self._commit()
        except (sqlite3.Error, OSError, ValueError) as problem:
            trouble = str(problem)
            if is_damage(problem):
                with suppress(OSError, sqlite3.Error):
                    self._begin_anew()
        if (trouble is None) is not (self._trouble is None):
            human = f"Leases cannot be written to {self._path}: {trouble}; none is given until they can"
            self._tell(*((human, "error") if trouble is not None else ("Leases can be written again", "info")))
        self._trouble = trouble
        return trouble

    def _take_up(self) -> None:
        with suppress(IndexError):
            while True:
                change = self._changes.popleft()
                if change.lease is None:
                    self._rows.pop(change.lease_id, None)
                else:
                    self._rows[change.lease_id] = (change.pool_id, change.epoch, change.lease)
                if change.new:
                    self._newest[change.pool_id] = change.lease_id
                    self._unwritten_pools.add(change.pool_id)
                self._unwritten.add(change.lease_id)

    def _commit(self) -> None:
        """What was not written yet, in one transaction. Raises sqlite3.Error; nothing is written then."""
        if self._db is None or not self._unwritten:
            return
        gone = [(lease_id,) for lease_id in self._unwritten if lease_id not in self._rows]
        rows = [_row(lease_id, *self._rows[lease_id]) for lease_id in self._unwritten if lease_id in self._rows]
        failpoints.reach("leases.commit")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("DELETE FROM leases WHERE lease_id = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            newest = [(pool_id, self._newest[pool_id]) for pool_id in self._unwritten_pools]
            self._db.executemany("INSERT OR REPLACE INTO newest VALUES (?, ?)", newest)
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._unwritten.clear()
        self._unwritten_pools.clear()
        failpoints.reach("leases.committed")

    # --- the file ---

    def _make_sure_of_the_file(self) -> None:
        """The file that is open still has its name, or a new one has it now. Raises OSError or sqlite3.Error."""
        with suppress(OSError):
            if self._db is not None and self._path.stat(follow_symlinks=False).st_ino == self._inode:
                return
        self._begin_anew()

    def _connect(self) -> None:
        if (link := linked_part(self._path)) is not None:
            raise ValueError(link)
        self._disconnect()
        db = self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5)
        try:
            refuse_newer(self._path, db.execute("PRAGMA user_version").fetchone()[0], SCHEMA_VERSION)
        except NodeError:
            self._disconnect()
            raise
        self._path.chmod(0o600)
        db.execute("PRAGMA locking_mode=EXCLUSIVE")  # and no third file for the journal's index
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        db.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
        db.executescript(f"{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};")
        self._inode = self._path.stat().st_ino
        self._take_room(db)

    def _take_room(self, db: sqlite3.Connection) -> None:
        """The file and its journal have this size from now on; what is not used in them is written over."""
        free = os.statvfs(self._path.parent)
        if free.f_bavail * free.f_frsize < SPARED_BYTES:
            return
        db.execute("CREATE TABLE room (filler BLOB) STRICT")
        db.execute("INSERT INTO room VALUES (zeroblob(?))", (ROOM_BYTES,))
        db.execute("DROP TABLE room")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _begin_anew(self) -> None:
        """A new file with all that is known; one that is there is kept under another name. Raises OSError or sqlite3.Error."""
        self._disconnect()
        if any(part.is_symlink() or part.exists() for part in parts_of(self._path)):
            rename_database(self._path, self._path.with_name(f"{self._path.name}.damaged"))
        self._connect()
        if self._db is not None:
            self._db.execute("INSERT OR REPLACE INTO boot VALUES (1, ?)", (self._boot_id,))
        self._unwritten, self._unwritten_pools = set(self._rows), set(self._newest)

    def _read(self) -> list[KeptLeases]:
        """Raises sqlite3.Error or ValueError."""
        if self._db is None:
            return []
        boot = self._db.execute("SELECT boot_id FROM boot").fetchone()
        if boot is None or boot[0] != self._boot_id:
            for statement in ("DELETE FROM leases", "DELETE FROM newest"):
                self._db.execute(statement)
            self._db.execute("INSERT OR REPLACE INTO boot VALUES (1, ?)", (self._boot_id,))
            return []
        given: dict[str, list[tuple[int, Lease]]] = {}
        for lease_id, pool_id, epoch, holder, given_at_ms, expires_at, key in self._db.execute("SELECT * FROM leases"):
            given.setdefault(pool_id, []).append((epoch, Lease(lease_id, holder, given_at_ms, expires_at, key)))
        newest = self._db.execute("SELECT pool_id, lease_id FROM newest").fetchall()
        if not all(_LEASE_ID.fullmatch(lease_id) for lease_id in (*(lease_id for _, lease_id in newest), *_ids(given))):
            raise ValueError("there are ids in it that are none")
        return [KeptLeases(pool_id, lease_id, tuple(sorted(given.get(pool_id, ()), key=_number))) for pool_id, lease_id in newest]

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()


def _ids(given: Mapping[str, list[tuple[int, Lease]]]) -> Iterable[str]:
    return (lease.lease_id for leases in given.values() for _, lease in leases)


def _number(given: tuple[int, Lease]) -> int:
    """Leases are numbered in the order in which they were given."""
    return int(given[1].lease_id.rpartition("-")[2], 16)


def _row(lease_id: str, pool_id: str, epoch: int, lease: Lease) -> tuple[Any, ...]:
    return (lease_id, pool_id, epoch, lease.holder, lease.given_at_ms, lease.expires_at, lease.key)
