"""What must survive the daemon: intent and counters. (Running instances
are recorded by their shims, which know of them first: runtime/records.py.) SQLite in WAL mode with one writer thread.

A write that somebody waits for is on disk (``synchronous=FULL``) when the wait ends; queued writes are grouped into
one commit.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pool_managerd.core.intent import StoredPool
from pool_managerd.errors import NodeError
from pool_managerd.store.lock import unwritable

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pools (
    pool_id TEXT PRIMARY KEY, desired TEXT NOT NULL, held INTEGER NOT NULL DEFAULT 0, submitted TEXT,
    crash_count INTEGER NOT NULL DEFAULT 0, restart_count INTEGER NOT NULL DEFAULT 0
) STRICT;
"""

Write = Callable[[sqlite3.Connection], None]


class StateStore:
    """``state.db`` in the state directory. ``degraded`` says why the old state was set aside, None when it was not."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "state.db"
        self.degraded: str | None = None
        self._orders: queue.SimpleQueue[tuple[Write, Future[None] | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None
        self.last_error: str | None = None

    def open(self) -> dict[str, StoredPool]:
        """The stored pools by id.

        Raises NodeError: STATE_UNWRITABLE, or STATE_TOO_NEW for a state written by a newer version, which stays untouched.
        """
        try:
            self._db = self._connect()
        except sqlite3.DatabaseError as problem:
            if isinstance(problem, sqlite3.OperationalError):
                raise unwritable(self._path.parent, "state directory", OSError(0, str(problem))) from problem
            self._set_aside(str(problem))
            self._db = self._connect()
        pools = {row[0]: _stored(row) for row in self._db.execute("SELECT * FROM pools")}
        self._thread = threading.Thread(target=self._write_loop, name="state-writer", daemon=True)
        self._thread.start()
        return pools

    def _connect(self) -> sqlite3.Connection:
        if self._path.is_symlink():
            raise unwritable(self._path.parent, "state directory", OSError(0, "state.db is a symbolic link"))
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5)
        try:
            self._path.chmod(0o600)
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise NodeError(
                    f"cannot open {self._path}: a newer version wrote it (schema {version}, this one knows {SCHEMA_VERSION})",
                    code="STATE_TOO_NEW", retriable=False, hint="run the newer version, or choose another --state-dir",
                )  # fmt: skip
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("the quick check found damage")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except BaseException:
            db.close()
            raise
        return db

    def _set_aside(self, why: str) -> None:
        """Corrupt state is kept for a post-mortem, never deleted."""
        for suffix in ("", "-wal", "-shm"):
            part = self._path.with_name(self._path.name + suffix)
            if part.exists():
                part.replace(part.with_name(f"{part.name}.corrupt"))
        self.degraded = f"cannot read {self._path.name} ({why}); it was set aside as state.db.corrupt and a new one begun"

    # --- writes ---

    async def put_pool(self, pool: StoredPool) -> None:
        """Durable when this returns. Raises NodeError when the disk is full or read-only; nothing is acknowledged then."""
        await self._durable(
            lambda db: db.execute(
                "INSERT INTO pools (pool_id, desired, held, submitted) VALUES (?, ?, ?, ?) ON CONFLICT (pool_id) DO UPDATE SET"
                " desired = excluded.desired, held = excluded.held, submitted = excluded.submitted",
                (pool.pool_id, pool.desired, int(pool.held), json.dumps(pool.submitted) if pool.submitted else None),
            )
        )

    async def remove_pool(self, pool_id: str) -> None:
        await self._durable(lambda db: db.execute("DELETE FROM pools WHERE pool_id = ?", (pool_id,)))

    def note_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None:
        self._queue(
            lambda db: db.execute(
                "INSERT INTO pools (pool_id, desired, crash_count, restart_count) VALUES (?, 'auto', ?, ?) ON CONFLICT (pool_id)"
                " DO UPDATE SET crash_count = excluded.crash_count, restart_count = excluded.restart_count",
                (pool_id, crash_count, restart_count),
            )
        )

    def note_down(self, pool_id: str) -> None:
        """A submitted engine that failed is not started again by the next daemon."""
        self._queue(lambda db: db.execute("UPDATE pools SET desired = 'down' WHERE pool_id = ?", (pool_id,)))

    def _queue(self, write: Callable[[sqlite3.Connection], object]) -> None:
        self._orders.put((lambda db: (write(db), None)[1], None))

    async def _durable(self, write: Callable[[sqlite3.Connection], object]) -> None:
        done: Future[None] = Future()
        self._orders.put((lambda db: (write(db), None)[1], done))
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        except sqlite3.Error as problem:
            raise unwritable(self._path.parent, "state directory", OSError(0, str(problem))) from problem

    def _write_loop(self) -> None:
        while (order := self._orders.get()) is not None:
            batch = [order]
            while not self._orders.empty() and (more := self._orders.get()) is not None:
                batch.append(more)
            self._commit(batch)

    def _commit(self, batch: list[tuple[Write, Future[None] | None]]) -> None:
        db = self._db
        assert db is not None  # noqa: S101 - the thread starts after open()
        try:
            db.execute("BEGIN IMMEDIATE")
            for write, _ in batch:
                write(db)
            db.execute("COMMIT")
        except sqlite3.Error as problem:
            self.last_error = str(problem)
            if db.in_transaction:
                db.execute("ROLLBACK")
            for _, done in batch:
                if done is not None:
                    done.set_exception(problem)
            return
        self.last_error = None
        for _, done in batch:
            if done is not None:
                done.set_result(None)

    async def close(self) -> None:
        """Every queued write is on disk when this returns."""
        if self._thread is not None:
            self._orders.put(None)
            await asyncio.to_thread(self._thread.join, 10)
            self._thread = None
        if self._db is not None:
            self._db.close()
            self._db = None


def _stored(row: tuple[Any, ...]) -> StoredPool:
    submitted = json.loads(row[3]) if row[3] else None
    return StoredPool(row[0], row[1], bool(row[2]), submitted, row[4], row[5])
