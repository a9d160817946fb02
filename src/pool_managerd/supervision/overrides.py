"""What reloads have changed of configured pools, over the daemon's end; and which reload was not done when it ended.

Both are one fact per pool, so that a reload is committed in one write. The file has the last word: where it says something
else of a pool than it did when that was reloaded, what the reload changed is forgotten, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pool_managerd.config import PoolConfig
from pool_managerd.config.changes import digest_of, merged, with_changes
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.protocols import Facts

OVERRIDE = "override"


class Overrides:
    """By pool id. ``restore`` once the state is open."""

    def __init__(self, facts: Facts, events: EventLog) -> None:
        self._facts, self._events = facts, events
        self._known: dict[str, dict[str, Any]] = {}

    def restore(self) -> None:
        self._known = {pool_id: dict(fact) for pool_id, fact in self._facts.facts(OVERRIDE).items()}

    def in_force(self, pool: PoolConfig, base_dir: Path) -> PoolConfig:
        """``pool``, which the file configures, as it was reloaded last."""
        known = self._known.get(pool.id, {})
        if not known.get("changes"):
            return pool
        try:
            if known.get("base") != digest_of(pool):
                raise SpecError("the file says something else of it now")
            return with_changes(pool, known["changes"], base_dir)
        except SpecError as problem:
            keys = ", ".join(sorted(known["changes"]))
            human = f"What pool '{pool.id}' was reloaded with ({keys}) is not in force any more: {problem.message}"
            self._events.emit("notice", human, level="warn", pool_id=pool.id)
            self._known[pool.id] = {key: value for key, value in known.items() if key not in ("base", "changes")}
            self._facts.note_fact(OVERRIDE, pool.id, self._known[pool.id] or None)
            return pool

    def changes(self, pool_id: str, more: Mapping[str, Any]) -> dict[str, Any]:
        """What is changed of the pool when ``more`` is, too."""
        return merged(self._known.get(pool_id, {}).get("changes", {}), more)

    def pending(self) -> dict[str, dict[str, Any]]:
        """By pool id, the reloads that were not done: ``epoch`` is the last launch of what was to be replaced."""
        return {pool_id: fact["pending"] for pool_id, fact in self._known.items() if isinstance(fact.get("pending"), dict)}

    async def begin(self, pool_id: str, pending: Mapping[str, Any]) -> None:
        """From here on the next daemon undoes it. Durable when this returns; raises NodeError."""
        await self._put(pool_id, {**self._known.get(pool_id, {}), "pending": dict(pending)})

    def committed(self) -> set[str]:
        """The operations of the latest reloads that are done: one may not have told so before its daemon ended."""
        return {str(fact["operation"]) for fact in self._known.values() if "operation" in fact}

    def replaced(self) -> dict[str, int]:
        """By pool id, the epoch of the launch that the latest reload has replaced while it ran: it may still have leases."""
        return {pool_id: fact["replaced"] for pool_id, fact in self._known.items() if isinstance(fact.get("replaced"), int)}

    async def commit(
        self, pool_id: str, operation_id: str, base: PoolConfig | None, changes: Mapping[str, Any], replaced: int | None = None
    ) -> None:
        """It is done. ``base`` is what the file says, ``replaced`` the epoch of a launch that has yet to end. Durable when this
        returns; raises NodeError.
        """
        changed = {} if base is None or not changes else {"base": digest_of(base), "changes": dict(changes)}
        left = {} if replaced is None else {"replaced": replaced}
        await self._put(pool_id, {"operation": operation_id, **changed, **left})

    async def give_up(self, pool_id: str) -> None:
        """It is undone, or was never begun. What cannot be written now is written as soon as it can be."""
        kept = {key: value for key, value in self._known.get(pool_id, {}).items() if key != "pending"}
        if kept == self._known.get(pool_id, {}):
            return
        try:
            await self._put(pool_id, kept)
        except NodeError:
            self._facts.note_fact(OVERRIDE, pool_id, kept or None)
            self._keep(pool_id, kept)

    def forget(self, pool_id: str) -> None:
        """The pool is gone."""
        if self._known.pop(pool_id, None) is not None:
            self._facts.note_fact(OVERRIDE, pool_id, None)

    async def _put(self, pool_id: str, fact: dict[str, Any]) -> None:
        await self._facts.put_fact(OVERRIDE, pool_id, fact or None)
        self._keep(pool_id, fact)

    def _keep(self, pool_id: str, fact: dict[str, Any]) -> None:
        if fact:
            self._known[pool_id] = fact
        else:
            self._known.pop(pool_id, None)
