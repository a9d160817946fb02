"""What must survive the daemon: intent, counters, and facts learnt about the machine.

(Running instances are recorded by their shims, which know of them first: runtime/records.py.) SQLite in WAL mode with
one writer thread, and the same contents in memory.

A write that somebody waits for is on disk (``synchronous=FULL``), and was read back through the file's name, when the
wait ends; queued writes are grouped into one commit. Files that somebody else removed, replaced or changed meanwhile,
or whose disk failed, are written anew from memory before anything more is acknowledged; where that cannot be done,
changes are refused until it can, and it is tried again every few seconds.
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

from pool_managerd import failpoints
from pool_managerd.core.intent import StoredPool
from pool_managerd.errors import NodeError
from pool_managerd.store.contents import SCHEMA, Contents, read_contents
from pool_managerd.store.lock import unwritable
from pool_managerd.store.place import StatePlace, code_of, is_damage, linked_part, refuse_newer, require_descriptors

SCHEMA_VERSION = 2
CHECK_S = 5.0
# Room and locks come and go; after anything else the pages that SQLite remembers may not be on disk.
_PASSING = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)

Change = Callable[[Contents], None]
_Order = tuple[Change, Future[None] | None]


class StateStore:
    """``state.db`` in the state directory.

    ``degraded`` says what was wrong with it at the start, ``last_error`` why writes fail now; both are None when all is well.
    ``listener`` is told (from another thread) when ``last_error`` comes or goes, and what was done about it.
    """

    def __init__(self, state_dir: Path, check_s: float = CHECK_S) -> None:
        self._place = StatePlace(state_dir / "state.db")
        self._path = self._place.path
        self._check_s = check_s
        self.degraded: str | None = None
        self.last_error: str | None = None
        self.listener: Callable[[str | None, str | None], None] = lambda _trouble, _told: None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._contents = Contents()
        self._suspect = ""
        self._facts: dict[str, dict[str, dict[str, Any]]] = {}

    def open(self) -> dict[str, StoredPool]:
        """The stored pools by id.

        Raises NodeError: STATE_UNWRITABLE, or STATE_TOO_NEW for a state written by a newer version, which stays untouched.
        """
        try:
            self._refuse_what_is_not_ours()
            self._place.finish_replacement()
            try:
                self._db, self._contents = self._read()
            except (sqlite3.Error, ValueError) as problem:
                if isinstance(problem, sqlite3.Error) and not is_damage(problem):
                    raise
                kept = self._place.set_aside("corrupt")
                self.degraded = f"cannot read {self._path.name} ({problem}); it was set aside as {kept} and a new one begun"
                self._db, self._contents = self._read()
        except sqlite3.Error as problem:
            raise self._unwritable(str(problem)) from problem
        except OSError as problem:
            raise unwritable(self._path.parent, "state directory", problem) from problem
        self._notice_older_copy()
        for (kind, key), value in self._contents.facts.items():
            self._facts.setdefault(kind, {})[key] = value
        self._place.remember()
        self._thread = threading.Thread(target=self._write_loop, name="state-writer", daemon=True)
        self._thread.start()
        return dict(self._contents.pools)

    def _refuse_what_is_not_ours(self) -> None:
        """Links, and the state of a newer version: looked at without writing, its journal included."""
        if (link := linked_part(self._path)) is not None:
            raise self._unwritable(link)
        if not self._path.exists():
            return
        try:
            with closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
                version = db.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error:
            return  # damaged, or the place is: opening it for writing tells which
        refuse_newer(self._path, version, SCHEMA_VERSION)

    def _read(self) -> tuple[sqlite3.Connection, Contents]:
        """The open database and what it holds. Raises sqlite3.Error, and ValueError for content that is not ours."""
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=5)
        try:
            self._path.chmod(0o600)
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise ValueError("the quick check found damage")
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA secure_delete=ON")
            db.executescript(SCHEMA)
            if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # what was deleted does not live on in the journal
            return db, read_contents(db)
        except BaseException:
            db.close()
            raise

    def _notice_older_copy(self) -> None:
        """Fewer commits in the file than were acknowledged: it was put back, or begun anew, while nobody looked."""
        missing = self._place.acknowledged() - self._contents.generation
        if missing > 0:
            self._contents.generation += missing
            self.degraded = self.degraded or (
                f"the state in {self._path} is older than what was acknowledged: its last {missing} changes are not there;"
                " somebody removed it or put an earlier copy in its place"
            )

    def _unwritable(self, why: str) -> NodeError:
        return unwritable(self._path.parent, "state directory", OSError(0, why))

    # --- writes ---

    async def put_pool(self, pool: StoredPool) -> None:
        """Durable when this returns. Raises NodeError when the disk is full or read-only; nothing is acknowledged then."""
        json.dumps(pool.submitted)  # what cannot be written fails here, alone
        await self._durable(lambda contents: contents.put_pool(pool))

    async def remove_pool(self, pool_id: str) -> None:
        await self._durable(lambda contents: contents.remove_pool(pool_id))

    def note_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None:
        self._queue(lambda contents: contents.put_counters(pool_id, crash_count, restart_count))

    def note_down(self, pool_id: str) -> None:
        """A submitted engine that failed is not started again by the next daemon."""
        self._queue(lambda contents: contents.put_down(pool_id))

    def facts(self, kind: str) -> dict[str, dict[str, Any]]:
        """Everything of ``kind`` as it was when the state was opened, by key."""
        return self._facts.get(kind, {})

    async def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        """Durable when this returns; None forgets. Raises NodeError as ``put_pool``."""
        json.dumps(value)
        await self._durable(lambda contents: contents.put_fact(kind, key, value))

    def note_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        """As ``put_fact``, without waiting."""
        json.dumps(value)
        self._queue(lambda contents: contents.put_fact(kind, key, value))

    async def noted(self) -> None:
        """Return when all that was noted so far is on the disk, or cannot be written, which ``listener`` is told of."""
        with suppress(NodeError):
            await self._durable(lambda contents: None)

    def _queue(self, change: Change) -> None:
        if not self._closed:
            self._orders.put((change, None))

    async def _durable(self, change: Change) -> None:
        if self._closed:
            raise self._unwritable("the state is closed: the daemon is shutting down")
        done: Future[None] = Future()
        self._orders.put((change, done))
        try:
            await asyncio.shield(asyncio.wrap_future(done))
        except sqlite3.Error as problem:
            raise self._unwritable(str(problem)) from problem
        except OSError as problem:
            raise unwritable(self._path.parent, "state directory", problem) from problem

    # --- the writer's thread ---

    def _write_loop(self) -> None:
        ended = False
        while not ended:
            orders: list[_Order | None] = []
            with suppress(queue.Empty):
                orders.append(self._orders.get(timeout=self._check_s))
                while True:
                    orders.append(self._orders.get_nowait())
            ended = None in orders
            batch = [order for order in orders if order is not None]
            if batch or self.last_error or self._contents.touched or self._place.changed():
                self._commit(batch)

    def _commit(self, batch: list[_Order]) -> None:
        """Write ``batch``, and before it whatever the file still lacks; everybody who waits is told how it ended."""
        wanted = self._contents.copy()
        problem: Exception | None = None
        told: str | None = None
        try:
            for change, _ in batch:
                change(wanted)
            told = self._write(wanted)
            self._contents = wanted
        except Exception as error:  # noqa: BLE001 - the thread's boundary: whoever waits must be told
            problem = error
            for change, done in batch:
                if done is None:  # nobody can be told that these failed, so they are written when it is possible
                    change(self._contents)
            if self._suspect:
                told = self._take_back()
        before, self.last_error = self.last_error, None if problem is None else _words(problem)
        if told is not None or (before is None) is not (self.last_error is None):
            self.listener(self.last_error, told)
        for _, done in batch:
            if done is not None and problem is not None:
                done.set_exception(problem)
            elif done is not None:
                done.set_result(None)

    def _write(self, wanted: Contents) -> str | None:
        """Make the file hold ``wanted``, and read it back; what had to be done for it. Raises sqlite3.Error or OSError."""
        failpoints.reach("state.commit")
        require_descriptors()  # first: what is written must be read back
        why = self._place.changed() or self._suspect
        told = self._renew(wanted, why) if why else None
        if not why and self._db is not None:
            try:
                wanted.write(self._db)
            except sqlite3.Error as problem:
                if code_of(problem) not in _PASSING:
                    self._suspect = f"the disk failed ({problem})"
                else:
                    self._place.remember()  # a write that was broken off leaves its marks in the journal: they are ours
                raise
        self._place.remember()  # the marks are ours, whether they can be read back or not
        self._suspect = "what was written could not be read back"  # until it was
        try:
            found = self._place.read_back()
        except sqlite3.Error:
            require_descriptors()
            raise
        if found != wanted.generation:
            raise sqlite3.OperationalError(f"generation {wanted.generation} was written and {found} read back")
        self._suspect = ""
        self._place.remember()
        self._place.acknowledge(found)
        failpoints.reach("state.committed")
        return told

    def _take_back(self) -> str | None:
        """What could not be written may be in the file all the same, for the next daemon to find: the file is written anew before
        the change is refused. Where that fails, too, the next commit begins with it.
        """
        again = self._contents.copy()
        with suppress(sqlite3.Error, OSError):
            told = self._write(again)
            self._contents = again
            return told
        return None

    def _renew(self, wanted: Contents, why: str) -> str:
        """A new file from memory in the place of one that is not ours any more, or that is not to be relied on."""
        self._place.write_fresh(wanted)
        kept = self._place.take_fresh()
        if self._db is not None:  # only now: closing it removes the journal that has the name
            with suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        self._db, _ = self._read()
        rest = f"; what was there is kept as {kept}" if kept else ""
        return f"Wrote the state anew from memory, because {why}{rest}"

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


def _words(problem: Exception) -> str:
    """What is told of it, without numbers and paths."""
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem) or type(problem).__name__
