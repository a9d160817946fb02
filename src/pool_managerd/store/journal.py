"""What happened, crash reports, and what became of long operations, on disk: the next daemon tells of it as this one does.

A database of its own beside ``state.db``, so that the intent's file stays small and damage here costs no intent. Nobody waits
for it: what is to be kept is left in memory, and one thread writes whatever is there in one commit, which is not synced
(``synchronous=NORMAL``). SIGKILL costs what the thread had not taken up yet, a power cut the last seconds; neither harms the
file. What cannot be written stays in memory, up to a bound, and is tried again every few seconds.

What is on disk has no holes: where events were lost between those that are there and the next ones, the older ones go, so that
"newer than 43" is either all of it or known to be incomplete.

Ids. An event may be told to a client and never reach the disk; its id must not be given again. So ``journal.ids`` holds a number
that ids have not reached, and the next daemon goes on behind it; a clean end leaves the last id itself there. It is a file of
its own because it must outlive a damaged database.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.store import journal_tables as tables
from pool_managerd.store.place import is_damage, parts_of, read_number, rename_database, write_number
from pool_managerd.store.writer import Writer

ID_BLOCK = 10_000
_GATHER_S = 0.02
"""What is put within it is one write; so much of the newest may be missing after SIGKILL, where nobody waited for it."""
RETRY_S = 5.0
MAX_PENDING = 4_000
Key = int | tuple[str, str]
"""An event's id, or a table and the id of a body in it."""


class Journal:
    """``journal.db`` and ``journal.ids`` in the state directory. Nothing raises: a node without its journal works.

    ``last_id``: the ids up to here may have been given, once it is open.
    """

    def __init__(self, state_dir: Path, retry_s: float = RETRY_S) -> None:
        self._path = state_dir / "journal.db"
        self._ids = state_dir / "journal.ids"
        self._retry_s = retry_s
        self.last_id = 0
        self._events: list[Event] = []
        self._bodies: dict[str, list[dict[str, Any]]] = {}
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._trouble = False
        self._tell: Callable[[str, str], None] = lambda _human, _level: None
        # From the node's loop to the thread; what does not fit any more pushes out the oldest.
        self._orders: deque[tuple[Key, Any]] = deque(maxlen=MAX_PENDING)
        self._drop_to = 0
        self._writer = Writer("journal-writer", self._write, self._end, retry_s, _GATHER_S)
        # The thread's own.
        self._pending: dict[Key, Any] = {}
        self._next_id = 1  # continues what is on disk
        self._dropped = 0
        self._newest_id = 0
        self._reserved_id = 0
        self._ids_told = False

    def open(self, tell: Callable[[str, str], None]) -> None:
        """Read what earlier daemons left, and take a block of ids.

        ``tell`` gets a sentence and its level, from any thread, when writing fails, when it works again, and when a damaged
        file was replaced.
        """
        self._tell = tell
        try:
            self._read(self._connected())
        except (sqlite3.Error, OSError, ValueError) as problem:
            self._events, self._bodies = [], {}  # half of it would look like all of it
            if not self._set_aside(problem):
                self._failed(problem)
        newest = self._events[-1].id if self._events else 0
        self.last_id = found if (found := read_number(self._ids)) >= newest else newest + ID_BLOCK
        self._newest_id, self._next_id = self.last_id, self.last_id + 1
        self._reserve_ids()
        self._writer.start()

    def recall_events(self) -> list[Event]:
        """Those of earlier daemons, oldest first. They are given away: the next call gives none."""
        events, self._events = self._events, []
        return events

    def recall_operations(self) -> list[dict[str, Any]]:
        """Those of earlier daemons as they were put, in the order in which they began; given away, too."""
        return self._bodies.pop(tables.OPERATIONS, [])

    def recall_crashes(self) -> list[dict[str, Any]]:
        """The crash reports of earlier daemons as they were put, oldest first; given away, too."""
        return self._bodies.pop(tables.CRASHES, [])

    def put_event(self, event: Event) -> None:
        """Keep an event whose id follows the last one's."""
        self._put(event.id, event)

    def drop_events(self, up_to_id: int) -> None:
        """These are not kept any more; with the next write."""
        self._drop_to = up_to_id

    def put_operation(self, operation_id: str, body: Mapping[str, Any] | None) -> None:
        """Keep an operation as it is now; None forgets it."""
        self._put((tables.OPERATIONS, operation_id), body)

    def put_crash(self, crash_id: str, body: Mapping[str, Any] | None) -> None:
        """Keep a crash report as it is now; None forgets it."""
        self._put((tables.CRASHES, crash_id), body)

    def _put(self, key: Key, value: Any) -> None:
        if not self._writer.ending:
            self._orders.append((key, value))
            self._writer.wake()

    async def kept(self) -> None:
        """Return when what was put before is written, or when it turned out that it cannot be, which is told."""
        await self._writer.written()

    async def close(self) -> None:
        """What was put is written when this returns, if it can be; later events are not kept."""
        await self._writer.close()

    # --- the writer's thread ---

    def _end(self) -> None:
        with suppress(OSError):
            write_number(self._ids, self._newest_id, synced=True)
        self._disconnect()

    def _write(self) -> str | None:
        self._take_up()
        self._reserve_ids()
        if not self._pending and not self._trouble:
            return None
        try:
            try:
                self._commit(self._connected())
            except sqlite3.Error as problem:
                if not self._set_aside(problem):
                    raise
                self._commit(self._connected())
            self._recovered()
        except Exception as problem:  # noqa: BLE001 - the thread's boundary: whatever it is, the next write tries again
            self._failed(problem)
            return str(problem)
        return None

    def _take_up(self) -> None:
        """Take the orders over; of one thing only the last counts, and what is not kept any more need not be written."""
        with suppress(IndexError):
            while True:
                key, value = self._orders.popleft()
                self._pending[key] = value
                if isinstance(key, int):
                    self._newest_id = max(self._newest_id, key)
        if self._trouble:
            drop = self._drop_to
            self._pending = {key: value for key, value in self._pending.items() if not isinstance(key, int) or key > drop}
        while len(self._pending) > MAX_PENDING:
            del self._pending[next(iter(self._pending))]

    def _commit(self, db: sqlite3.Connection) -> None:
        """Everything that is pending, in one transaction. Raises sqlite3.Error; nothing is written then."""
        events = _unbroken([value for value in self._pending.values() if isinstance(value, Event)])
        bodies = [(key, value) for key, value in self._pending.items() if not isinstance(key, int)]
        drop = self._drop_to
        db.execute("BEGIN IMMEDIATE")
        try:
            if events and events[0].id != self._next_id:
                db.execute("DELETE FROM events")
            elif drop > self._dropped:
                db.execute("DELETE FROM events WHERE id <= ?", (drop,))
            tables.put_events(db, events)
            for (table, key), body in bodies:
                tables.put_body(db, table, key, body)
            db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise
        self._pending.clear()
        self._dropped = drop
        if events:
            self._next_id = events[-1].id + 1

    def _connected(self) -> sqlite3.Connection:
        """The open database, which still has its name. Raises sqlite3.Error, OSError or ValueError."""
        if self._db is not None:
            with suppress(OSError):
                if self._path.stat(follow_symlinks=False).st_ino == self._inode:
                    return self._db
            self._disconnect()
            self._next_id = 0  # whatever is there now is not what was written
        for part in parts_of(self._path):
            if part.is_symlink():
                raise ValueError(f"{part.name} is a symbolic link")
        db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None, timeout=1)
        try:
            self._path.chmod(0o600)
            tables.prepare(db)
            self._inode = self._path.stat().st_ino
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _read(self, db: sqlite3.Connection) -> None:
        for event in tables.events(db, MAX_PENDING):
            if event is None:
                self._events.clear()  # not ours: a hole
            else:
                self._events.append(event)
        self._bodies = {table: tables.bodies(db, table, MAX_PENDING) for table in tables.BODIES}

    # --- what goes wrong ---

    def _failed(self, problem: Exception) -> None:
        self._disconnect()
        if not self._trouble:
            self._trouble = True
            human = f"Events and operations cannot be written to {self._path}: {problem}; they are in memory alone until they can"
            self._tell(human, "warn")

    def _recovered(self) -> None:
        if self._trouble:
            self._trouble = False
            self._tell("Events and operations are written to disk again", "info")

    def _set_aside(self, problem: Exception) -> bool:
        """Make room for a new file where this one is damaged, which is kept until another one follows; false where it is not."""
        if not is_damage(problem):
            return False
        self._disconnect()
        try:
            rename_database(self._path, self._path.with_name(self._path.name + ".corrupt"))
        except OSError:
            return False
        if not self._trouble:
            human = f"{self._path} was damaged ({problem}) and is begun anew: what was before is in memory, or not kept any more"
            self._tell(human, "warn")
        return True

    # --- ids ---

    def _reserve_ids(self) -> None:
        if self._newest_id + ID_BLOCK // 2 <= self._reserved_id:
            return
        try:
            write_number(self._ids, self._newest_id + ID_BLOCK, synced=True)
            self._reserved_id, self._ids_told = self._newest_id + ID_BLOCK, False
        except OSError as problem:  # tried again with the next event
            if not self._ids_told:
                self._ids_told = True
                self._tell(f"Ids of events cannot be reserved in {self._ids}: {problem}; after a crash they may repeat", "warn")


def _unbroken(events: list[Event]) -> list[Event]:
    """Those behind the last hole."""
    start = max((at for at in range(1, len(events)) if events[at].id != events[at - 1].id + 1), default=0)
    return events[start:]
