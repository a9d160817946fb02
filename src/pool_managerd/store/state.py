"""What must survive the daemon: intent, counters, and facts learnt about the machine.

(Running instances are recorded by their shims, which know of them first: runtime/records.py.) SQLite in WAL mode with
one writer thread.

A write that somebody waits for is on disk (``synchronous=FULL``) when the wait ends; queued writes are grouped into
one commit.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pool_managerd.core.intent import StoredPool
from pool_managerd.errors import NodeError
from pool_managerd.store.lock import unwritable

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pools (
    pool_id TEXT PRIMARY KEY, desired TEXT NOT NULL, held INTEGER NOT NULL DEFAULT 0, submitted TEXT,
    crash_count INTEGER NOT NULL DEFAULT 0, restart_count INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS facts (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key)) STRICT;
"""

_COLUMNS = "pool_id, desired, held, submitted, crash_count, restart_count"
_PARTS = ("", "-wal", "-shm", "-journal")
# The file's content is at fault. Anything else, such as a full or read-only disk, is the place's.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)

Write = Callable[[sqlite3.Connection], object]


class StateStore:
    """``state.db`` in the state directory. ``degraded`` says why the old state was set aside, None when it was not."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "state.db"
        self.degraded: str | None = None
        self._orders: queue.SimpleQueue[tuple[Write, Future[None] | None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._facts: dict[str, dict[str, dict[str, Any]]] = {}
        self.last_error: str | None = None

    def open(self) -> dict[str, StoredPool]:
        """The stored pools by id.

        Raises NodeError: STATE_UNWRITABLE, or STATE_TOO_NEW for a state written by a newer version, which stays untouched.
        """
        try:
            self._refuse_what_is_not_ours()
            try:
                self._db, pools = self._read()
            except (sqlite3.Error, ValueError) as problem:
                if isinstance(problem, sqlite3.Error) and (getattr(problem, "sqlite_errorcode", 0) & 0xFF) not in _DAMAGE:
                    raise
                self._set_aside(str(problem))
                self._db, pools = self._read()
        except sqlite3.Error as problem:
            raise self._unwritable(str(problem)) from problem
        except OSError as problem:
            raise unwritable(self._path.parent, "state directory", problem) from problem
        self._thread = threading.Thread(target=self._write_loop, name="state-writer", daemon=True)
        self._thread.start()
        return pools

    def _refuse_what_is_not_ours(self) -> None:
        """Links, and the state of a newer version: looked at without writing, its journal included."""
        for part in self._parts():
            if part.is_symlink():
                raise self._unwritable(f"{part.name} is a symbolic link")
        if not self._path.exists():
            return
        try:
            with closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error:
            return  # damaged, or the place is: opening it for writing tells which
        if version > SCHEMA_VERSION:
            raise NodeError(
                f"cannot open {self._path}: a newer version wrote it (schema {version}, this one knows {SCHEMA_VERSION})",
                code="STATE_TOO_NEW", retriable=False, hint="run the newer version, or choose another --state-dir",
            )  # fmt: skip

    def _read(self) -> tuple[sqlite3.Connection, dict[str, StoredPool]]:
        """The open database and what it holds. Raises sqlite3.Error, and ValueError for content that is not ours."""
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5)
        try:
            self._path.chmod(0o600)
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise ValueError("the quick check found damage")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA secure_delete=ON")
            db.executescript(_SCHEMA)
            if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            self._facts = _read_facts(db)
            return db, {row[0]: _stored(row) for row in db.execute(f"SELECT {_COLUMNS} FROM pools")}  # noqa: S608
        except BaseException:
            db.close()
            raise

    def _parts(self) -> list[Path]:
        return [self._path.with_name(self._path.name + suffix) for suffix in _PARTS]

    def _set_aside(self, why: str) -> None:
        """Corrupt state is kept for a post-mortem, never deleted, and never overwritten by a later one."""
        number = 1
        while (kept := self._path.with_name(f"{self._path.name}.corrupt{'' if number == 1 else f'.{number}'}")).exists():
            number += 1
        for part, suffix in zip(self._parts(), _PARTS, strict=True):
            if part.exists():
                part.replace(kept.with_name(kept.name + suffix))  # its journal keeps the name that SQLite looks for
        self.degraded = f"cannot read {self._path.name} ({why}); it was set aside as {kept.name} and a new one begun"

    def _unwritable(self, why: str) -> NodeError:
        return unwritable(self._path.parent, "state directory", OSError(0, why))

    # --- writes ---

    async def put_pool(self, pool: StoredPool) -> None:
        """Durable when this returns. Raises NodeError when the disk is full or read-only; nothing is acknowledged then."""
        submitted = json.dumps(pool.submitted) if pool.submitted else None
        await self._durable(
            lambda db: db.execute(
                "INSERT INTO pools (pool_id, desired, held, submitted) VALUES (?, ?, ?, ?) ON CONFLICT (pool_id) DO UPDATE SET"
                " desired = excluded.desired, held = excluded.held, submitted = excluded.submitted",
                (pool.pool_id, pool.desired, int(pool.held), submitted),
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

    def facts(self, kind: str) -> dict[str, dict[str, Any]]:
        """Everything of ``kind`` as it was when the state was opened, by key."""
        return self._facts.get(kind, {})

    async def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        """Durable when this returns; None forgets. Raises NodeError as ``put_pool``."""
        await self._durable(_write_fact(kind, key, value))

    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        """As ``put_fact``, without waiting."""
        self._queue(_write_fact(kind, key, value))

    def _queue(self, write: Write) -> None:
        if not self._closed:
            self._orders.put((write, None))

    async def _durable(self, write: Write) -> None:
        if self._closed:
            raise self._unwritable("the state is closed: the daemon is shutting down")
        done: Future[None] = Future()
        self._orders.put((write, done))
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        except sqlite3.Error as problem:
            raise self._unwritable(str(problem)) from problem

    def _write_loop(self) -> None:
        ended = False
        while not ended:
            orders = [self._orders.get()]
            while not self._orders.empty():
                orders.append(self._orders.get())
            ended = None in orders
            self._commit([order for order in orders if order is not None])

    def _commit(self, batch: list[tuple[Write, Future[None] | None]]) -> None:
        problem: Exception | None = None
        try:
            self._write(batch)
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever waits must be told
            problem = error
        self.last_error = None if problem is None else str(problem)
        for _, done in batch:
            if done is not None and problem is not None:
                done.set_exception(problem)
            elif done is not None:
                done.set_result(None)

    def _write(self, batch: list[tuple[Write, Future[None] | None]]) -> None:
        db = self._db
        if db is None or not batch:
            return
        try:
            db.execute("BEGIN IMMEDIATE")
            for write, _ in batch:
                write(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise

    async def close(self) -> None:
        """Every queued write is on disk when this returns; later ones are refused."""
        self._closed = True
        if self._thread is not None:
            self._orders.put(None)
            await asyncio.to_thread(self._thread.join, 10)
            self._thread = None
        if self._db is not None:
            self._db.close()
            self._db = None


def _write_fact(kind: str, key: str, value: Mapping[str, Any] | None) -> Write:
    if value is None:
        return lambda db: db.execute("DELETE FROM facts WHERE kind = ? AND key = ?", (kind, key))
    text = json.dumps(value)
    return lambda db: db.execute(
        "INSERT INTO facts (kind, key, value) VALUES (?, ?, ?) ON CONFLICT (kind, key) DO UPDATE SET value = excluded.value",
        (kind, key, text),
    )


def _read_facts(db: sqlite3.Connection) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, key, text in db.execute("SELECT kind, key, value FROM facts"):
        with suppress(ValueError):  # what was learnt can be learnt again; it must not cost the intent beside it
            value = json.loads(text)
            if isinstance(value, dict):
                found.setdefault(kind, {})[key] = value
    return found


def _stored(row: tuple[Any, ...]) -> StoredPool:
    submitted = json.loads(row[3]) if row[3] else None
    if submitted is not None and not isinstance(submitted, dict):
        raise ValueError(f"the engine of pool {row[0]!r} is no object")
    return StoredPool(row[0], row[1], bool(row[2]), submitted, row[4], row[5])
