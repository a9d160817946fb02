"""What the state holds, in memory as well as in the file: each can be made from the other."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pool_managerd.core.intent import StoredPool

SCHEMA = """
CREATE TABLE IF NOT EXISTS pools (
    pool_id TEXT PRIMARY KEY, desired TEXT NOT NULL, held INTEGER NOT NULL DEFAULT 0, submitted TEXT,
    crash_count INTEGER NOT NULL DEFAULT 0, restart_count INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS facts (kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (kind, key)) STRICT;
CREATE TABLE IF NOT EXISTS generation (only_one INTEGER PRIMARY KEY CHECK (only_one = 1), number INTEGER NOT NULL) STRICT;
"""
_COLUMNS = "pool_id, desired, held, submitted, crash_count, restart_count"

Facts = dict[tuple[str, str], dict[str, Any]]


@dataclass
class Contents:
    """``generation`` counts the commits. ``touched`` are the pools, and the kinds and keys of facts, to be written."""

    pools: dict[str, StoredPool] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    generation: int = 0
    touched: set[str | tuple[str, str]] = field(default_factory=set)

    def copy(self) -> Contents:
        return Contents(dict(self.pools), dict(self.facts), self.generation, set(self.touched))

    # --- changes ---

    def put_pool(self, pool: StoredPool) -> None:
        """The counters stay what they were."""
        old = self.pools.get(pool.pool_id, StoredPool(pool.pool_id))
        self.pools[pool.pool_id] = replace(pool, crash_count=old.crash_count, restart_count=old.restart_count)
        self.touched.add(pool.pool_id)

    def remove_pool(self, pool_id: str) -> None:
        self.pools.pop(pool_id, None)
        self.touched.add(pool_id)

    def put_counters(self, pool_id: str, crash_count: int, restart_count: int) -> None:
        old = self.pools.get(pool_id, StoredPool(pool_id))
        self.pools[pool_id] = replace(old, crash_count=crash_count, restart_count=restart_count)
        self.touched.add(pool_id)

    def put_down(self, pool_id: str) -> None:
        if (old := self.pools.get(pool_id)) is not None:
            self.pools[pool_id] = replace(old, desired="down")
            self.touched.add(pool_id)

    def put_fact(self, kind: str, key: str, value: Mapping[str, Any] | None) -> None:
        if value is None:
            self.facts.pop((kind, key), None)
        else:
            self.facts[kind, key] = dict(value)
        self.touched.add((kind, key))

    # --- the file ---

    def write(self, db: sqlite3.Connection) -> None:
        """Everything that was touched, and the next generation, in one commit. Raises sqlite3.Error; nothing is written then."""
        db.execute("BEGIN IMMEDIATE")
        try:
            for key in self.touched:
                if isinstance(key, str):
                    self._write_pool(db, key)
                else:
                    self._write_fact(db, *key)
            db.execute("INSERT OR REPLACE INTO generation VALUES (1, ?)", (self.generation + 1,))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                with suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise
        self.generation += 1
        self.touched.clear()

    def touch_all(self) -> None:
        self.touched.update(self.pools, self.facts)

    def _write_pool(self, db: sqlite3.Connection, pool_id: str) -> None:
        pool = self.pools.get(pool_id)
        if pool is None:
            db.execute("DELETE FROM pools WHERE pool_id = ?", (pool_id,))
            return
        submitted = json.dumps(pool.submitted) if pool.submitted else None
        row = (pool_id, pool.desired, int(pool.held), submitted, pool.crash_count, pool.restart_count)
        db.execute(f"INSERT OR REPLACE INTO pools ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)  # noqa: S608

    def _write_fact(self, db: sqlite3.Connection, kind: str, key: str) -> None:
        value = self.facts.get((kind, key))
        if value is None:
            db.execute("DELETE FROM facts WHERE kind = ? AND key = ?", (kind, key))
        else:
            db.execute("INSERT OR REPLACE INTO facts (kind, key, value) VALUES (?, ?, ?)", (kind, key, json.dumps(value)))


def read_contents(db: sqlite3.Connection) -> Contents:
    """Raises sqlite3.Error, and ValueError for content that is not ours."""
    pools = {row[0]: _stored(row) for row in db.execute(f"SELECT {_COLUMNS} FROM pools")}  # noqa: S608
    facts: Facts = {}
    for kind, key, text in db.execute("SELECT kind, key, value FROM facts"):
        with suppress(ValueError):  # what was learnt can be learnt again; it must not cost the intent beside it
            value = json.loads(text)
            if isinstance(value, dict):
                facts[kind, key] = value
    return Contents(pools, facts, read_generation(db))


def read_generation(db: sqlite3.Connection) -> int:
    """0 for a file that was never written since generations are counted."""
    row = db.execute("SELECT number FROM generation").fetchone()
    return 0 if row is None else int(row[0])


def _stored(row: tuple[Any, ...]) -> StoredPool:
    submitted = json.loads(row[3]) if row[3] else None
    if submitted is not None and not isinstance(submitted, dict):
        raise ValueError(f"the engine of pool {row[0]!r} is no object")
    return StoredPool(row[0], row[1], bool(row[2]), submitted, row[4], row[5])
