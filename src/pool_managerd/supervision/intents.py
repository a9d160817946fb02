"""What is wanted of each pool, as it survives the daemon: in memory and in the store, the store first."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from pool_managerd.config import PoolConfig
from pool_managerd.core.artifacts import AnyEngine, PreparedEngine
from pool_managerd.core.intent import StoredPool
from pool_managerd.core.lifecycle import Desired, PoolState
from pool_managerd.supervision.pool import Pool


class IntentStore(Protocol):
    """Durable intent: a write is on disk when its wait ends."""

    async def put_pool(self, pool: StoredPool) -> None: ...
    def note_down(self, pool_id: str) -> None: ...
    async def remove_pool(self, pool_id: str) -> None: ...


class SubmissionCodec(Protocol):
    """Submitted engines as JSON objects and back."""

    def parse_prepared(self, body: Mapping[str, Any], pool_id: str) -> PreparedEngine: ...
    def prepared_to_json(self, engine: AnyEngine) -> dict[str, Any] | None: ...


class Intents:
    """By pool id. Every write raises NodeError when the state cannot be written; nothing has changed then."""

    def __init__(self, store: IntentStore, codec: SubmissionCodec) -> None:
        self._store = store
        self.codec = codec
        self._known: dict[str, StoredPool] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    def restore(self, stored: Mapping[str, StoredPool]) -> None:
        """What an earlier daemon kept."""
        self._known = dict(stored)

    def get(self, pool_id: str) -> StoredPool | None:
        return self._known.get(pool_id)

    def digest_of(self, pool_id: str) -> str | None:
        """Of the submitted engine as it is stored; None without one."""
        stored = self._known.get(pool_id)
        if stored is None or stored.submitted is None:
            return None
        return hashlib.sha256(json.dumps(stored.submitted, sort_keys=True).encode()).hexdigest()

    async def keep(self, pool: Pool, engine: AnyEngine | None, desired: str | None = None, held: bool | None = None) -> None:
        """``engine`` is the submitted one that the pool is to have; None of the others leaves what is so.

        Written once more when a preload failed meanwhile, which is written down too: what is asked for last is what stays.
        """
        async with self._turn(pool.pool_id):
            while (new := self._intended(pool, engine, desired, held)) != self._known.get(pool.pool_id):
                await self._write(new)

    async def want(self, pool_id: str, desired: str) -> None:
        """What is wanted of it, whatever it is that it runs."""
        async with self._turn(pool_id):
            while (old := self._known.get(pool_id, StoredPool(pool_id))).desired != desired:
                await self._write(replace(old, desired=desired))

    def joined(self, pool_id: str, desired: str) -> str:
        """``desired``, where somebody wants that besides whatever is wanted of it already."""
        return _joined(self._known.get(pool_id, StoredPool(pool_id)).desired, desired)

    async def keep_reloaded(self, pool: Pool, engine: AnyEngine | None) -> None:
        """What a reload leads to: the pool is wanted up, unless it comes up by demand alone."""
        stored = self._known.get(pool.pool_id)
        by_demand = pool.config is not None and (stored is None or stored.desired == "auto")
        await self.keep(pool, engine, "auto" if by_demand else "up")

    async def put(self, new: StoredPool) -> None:
        """As it is. Two who change one pool do so one after the other, so that none writes what the other has replaced."""
        async with self._turn(new.pool_id):
            await self._write(new)

    def _turn(self, pool_id: str) -> asyncio.Lock:
        return self._turns.setdefault(pool_id, asyncio.Lock())

    async def _write(self, new: StoredPool) -> None:
        before = self._known.get(new.pool_id)
        await self._store.put_pool(new)
        if self._known.get(new.pool_id) is before:
            self._known[new.pool_id] = new

    def note_down(self, pool_id: str) -> None:
        """A submitted engine that failed is not started again by the next daemon. Not waited for."""
        self._store.note_down(pool_id)
        if (stored := self._known.get(pool_id)) is not None:
            self._known[pool_id] = replace(stored, desired="down")

    async def remove(self, pool_id: str) -> None:
        await self._store.remove_pool(pool_id)
        self._known.pop(pool_id, None)

    def _intended(self, pool: Pool, engine: AnyEngine | None, desired: str | None, held: bool | None) -> StoredPool:
        old = self._known.get(pool.pool_id, StoredPool(pool.pool_id))
        new = replace(old, desired=_joined(old.desired, desired), held=old.held if held is None else held, submitted=None)
        if pool.config is not None:
            return new
        if pool.definition.barred is not None and engine is None:
            return replace(new, submitted=old.submitted)
        if engine is None:
            return replace(new, desired="known")
        return replace(new, submitted=self.codec.prepared_to_json(engine))


def _joined(old: str, desired: str | None) -> str:
    """Demand joins what a person wants up, and leaves it wanted; None leaves what is so. What was evicted is wanted no more than
    its configuration says.
    """
    if desired == "evicted":
        return "auto" if old == "up" else old
    return old if desired is None or (desired == "auto" and old == "up") else desired


def state_of(new: PoolState, stored: StoredPool, config: PoolConfig | None, barred: str | None) -> PoolState:
    """``new`` as an earlier daemon left it. ``barred`` says why it must not start, where that is so."""
    desired = desired_of(stored, config)
    return replace(
        new, desired=desired, held=stored.held, pending_start=stored.held and desired is Desired.WANTED and barred is None,
        crash_count=stored.crash_count, restart_count=stored.restart_count, last_error=barred or new.history.error,
        has_run=stored.crash_count > 0 and new.history.failures > 0,
    )  # fmt: skip


def desired_of(stored: StoredPool, config: PoolConfig | None) -> Desired:
    """What was wanted last, or else what the configuration wants."""
    if stored.desired in ("auto", "known"):
        return Desired.WANTED if config is not None and config.preload else Desired.ON_DEMAND
    return {"up": Desired.WANTED, "drained": Desired.DRAINED}.get(stored.desired, Desired.STOPPED)
