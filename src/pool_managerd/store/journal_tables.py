"""The tables of the journal, and the versions of them that there were.

1: events and operations. 2: crash reports, too. Every version only added tables, so that an older file becomes this one's
by making what it lacks.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from pool_managerd.core.event import Event

SCHEMA_VERSION = 2
EVENTS, OPERATIONS, CRASHES = "events", "operations", "crashes"
BODIES = (OPERATIONS, CRASHES)
"""The tables of whole bodies by an id of their own, in the order in which they began."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, ts_ms INTEGER NOT NULL, type TEXT NOT NULL, level TEXT NOT NULL, pool_id TEXT, human TEXT NOT NULL,
    fields TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS operations (begun INTEGER PRIMARY KEY, operation_id TEXT NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS crashes (begun INTEGER PRIMARY KEY, crash_id TEXT NOT NULL UNIQUE, body TEXT NOT NULL) STRICT;
"""
_PUT = {
    OPERATIONS: "INSERT INTO operations (operation_id, body) VALUES (?, ?) ON CONFLICT DO UPDATE SET body = excluded.body",
    CRASHES: "INSERT INTO crashes (crash_id, body) VALUES (?, ?) ON CONFLICT DO UPDATE SET body = excluded.body",
}
_DROP = {
    OPERATIONS: "DELETE FROM operations WHERE operation_id = ?",
    CRASHES: "DELETE FROM crashes WHERE crash_id = ?",
}
_READ = {
    OPERATIONS: "SELECT body FROM operations ORDER BY begun LIMIT ?",
    CRASHES: "SELECT body FROM crashes ORDER BY begun LIMIT ?",
}


def prepare(db: sqlite3.Connection) -> None:
    """Make what is not there yet. Raises sqlite3.Error, and ValueError for what a newer version wrote."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise ValueError(f"a newer version wrote it (schema {version}, this one knows {SCHEMA_VERSION})")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    db.executescript(SCHEMA)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def put_events(db: sqlite3.Connection, events: Iterable[Event]) -> None:
    db.executemany("INSERT OR REPLACE INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", map(_row, events))


def put_body(db: sqlite3.Connection, table: str, key: str, body: Mapping[str, Any] | None) -> None:
    """As it is now; None forgets it."""
    if body is None:
        db.execute(_DROP[table], (key,))
    else:
        db.execute(_PUT[table], (key, _json(body)))


def events(db: sqlite3.Connection, most: int) -> Iterator[Event | None]:
    """The newest, oldest first; None for one that cannot be read."""
    rows = db.execute("SELECT * FROM (SELECT * FROM events ORDER BY id DESC LIMIT ?) ORDER BY id", (most,))
    for row in rows:
        fields = _object(row[6])
        yield None if fields is None else Event(row[0], row[1], row[2], row[3], row[4], row[5], fields)


def bodies(db: sqlite3.Connection, table: str, most: int) -> list[dict[str, Any]]:
    """Those that can be read, in the order in which they began."""
    return [body for (text,) in db.execute(_READ[table], (most,)) if (body := _object(text)) is not None]


def _row(event: Event) -> tuple[Any, ...]:
    return (event.id, event.ts_ms, event.type, event.level, event.pool_id, event.human, _json(event.fields))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, default=str, ensure_ascii=False, separators=(",", ":"))


def _object(text: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    return None
