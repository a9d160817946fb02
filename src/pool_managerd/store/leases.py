"""Leases that outlive the daemon, as long as the machine is not started anew: the engines that they are on end then, too.

A database of its own, ``leases.db``: it is written far more often than the intent, and nothing in it is worth a wait for the
disk. Writes go to the kernel and are not synced (``synchronous=OFF``): that survives SIGKILL, which is all it is for. One
thread writes whatever is there in one commit; whoever acknowledges a lease waits for that commit and not for the disk.

What is written is kept in memory as well. A file that somebody removed, replaced or damaged is begun anew from there.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd.core.registry import KeptLeases, Lease, LeaseChange
from pool_managerd.errors import NodeError
from pool_managerd.store.place import is_damage, parts_of, rename_database

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS boot (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), boot_id TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS leases (
    lease_id TEXT PRIMARY KEY, pool_id TEXT NOT NULL, epoch INTEGER NOT NULL, holder TEXT, given_at_ms INTEGER NOT NULL,
    expires_at REAL, key TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS newest (pool_id TEXT PRIMARY KEY, lease_id TEXT NOT NULL) STRICT;
"""
_LEASE_ID = re.compile(r"[0-9a-f]{12}-[0-9a-f]{1,16}")
_Done = Callable[[str | None], None]


class LeaseStore:
    """``put`` is called in the node's loop and never waits; ``kept`` returns when all that was put before is written."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        self._path = state_dir / "leases.db"
        self._boot_id = boot_id
        self._rows: dict[str, tuple[str, int, Lease]] = {}
        self._newest: dict[str, str] = {}
        self._orders: deque[LeaseChange | _Done] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        # The thread's own, once it runs.
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._unwritten: set[str] = set()
        self._unwritten_pools: set[str] = set()

    def open(self) -> list[KeptLeases]:
        """What an earlier daemon of this boot kept; nothing of another boot's.

        Raises NodeError STATE_TOO_NEW for a file that a newer version wrote, which stays untouched.
        """
        try:
            self._connect()
            found = self._read()
        except (sqlite3.Error, OSError, ValueError):
            found = []
            with suppress(sqlite3.Error, OSError, ValueError):  # it is tried again with the first lease
                self._begin_anew()
        self._rows = {lease.lease_id: (kept.pool_id, epoch, lease) for kept in found for epoch, lease in kept.leases}
        self._newest = {kept.pool_id: kept.newest_id for kept in found}
        self._thread = threading.Thread(target=self._run, name="lease-writer", daemon=True)
        self._thread.start()
        return found

    def put(self, change: LeaseChange) -> None:
        """A lease was given or renewed, or is over."""
        self._orders.append(change)
        self._wake.set()

    async def kept(self) -> None:
        """Raises NodeError STATE_UNWRITABLE when what was put before could not be written; it is tried again with the next."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[str | None] = loop.create_future()

        def settle(trouble: str | None) -> None:
            if not written.done():
                written.set_result(trouble)

        def done(trouble: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, trouble)

        self._orders.append(done)
        self._wake.set()
        if (trouble := await written) is not None:
            raise NodeError(
                f"cannot keep leases in {self._path}: {trouble}", code="STATE_UNWRITABLE", status=507,
                hint="free space there, or make the directory writable; leases are refused until then",
            )  # fmt: skip

    async def close(self) -> None:
        """All that was put is written when this returns, if it can be."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 10)
            self._thread = None

    # --- the writer's thread ---

    def _run(self) -> None:
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            self._write()
        self._write()
        self._disconnect()

    def _write(self) -> None:
        waiting = list(self._take_up())
        trouble: str | None = None
        try:
            self._make_sure_of_the_file()
            self._commit()
        except (sqlite3.Error, OSError, ValueError) as problem:
            trouble = str(problem)
            if not isinstance(problem, OSError) and is_damage(problem):
                with suppress(OSError, sqlite3.Error):
                    self._begin_anew()
        for done in waiting:
            done(trouble)

    def _take_up(self) -> Iterable[_Done]:
        with suppress(IndexError):
            while True:
                order = self._orders.popleft()
                if not isinstance(order, LeaseChange):
                    yield order
                    continue
                if order.lease is None:
                    self._rows.pop(order.lease_id, None)
                else:
                    self._rows[order.lease_id] = (order.pool_id, order.epoch, order.lease)
                    if order.new:
                        self._newest[order.pool_id] = order.lease_id
                        self._unwritten_pools.add(order.pool_id)
                self._unwritten.add(order.lease_id)

    def _commit(self) -> None:
        """What was not written yet, in one transaction. Raises sqlite3.Error; nothing is written then."""
        if self._db is None or not self._unwritten:
            return
        gone = [(lease_id,) for lease_id in self._unwritten if lease_id not in self._rows]
        rows = [_row(lease_id, *self._rows[lease_id]) for lease_id in self._unwritten if lease_id in self._rows]
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

    # --- the file ---

    def _make_sure_of_the_file(self) -> None:
        """The file that is open still has its name, or a new one has it now. Raises OSError or sqlite3.Error."""
        with suppress(OSError):
            if self._db is not None and self._path.stat(follow_symlinks=False).st_ino == self._inode:
                return
        self._begin_anew()

    def _connect(self) -> None:
        for part in parts_of(self._path):
            if part.is_symlink():
                raise ValueError(f"{part.name} is a symbolic link")
        self._disconnect()
        db = self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5)
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            self._disconnect()
            raise NodeError(
                f"cannot open {self._path}: a newer version wrote it (schema {version}, this one knows {SCHEMA_VERSION})",
                code="STATE_TOO_NEW", retriable=False, hint="run the newer version, or choose another --state-dir",
            )  # fmt: skip
        self._path.chmod(0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        db.executescript(f"{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};")
        self._inode = self._path.stat().st_ino

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
        return [KeptLeases(pool_id, lease_id, tuple(given.get(pool_id, ()))) for pool_id, lease_id in newest]

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()


def _ids(given: Mapping[str, list[tuple[int, Lease]]]) -> Iterable[str]:
    return (lease.lease_id for leases in given.values() for _, lease in leases)


def _row(lease_id: str, pool_id: str, epoch: int, lease: Lease) -> tuple[Any, ...]:
    return (lease_id, pool_id, epoch, lease.holder, lease.given_at_ms, lease.expires_at, lease.key)
