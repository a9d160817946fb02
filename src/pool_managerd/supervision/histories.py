"""What pools have failed at, kept in the state: a crash loop is still known to the next daemon."""

from __future__ import annotations

from collections.abc import Collection

from pool_managerd.core.lifecycle.history import NOTHING_FAILED, FailureHistory, from_stored, to_stored
from pool_managerd.supervision.protocols import Facts

KIND = "history"


class Histories:
    """``note`` when one has changed, ``forget`` when the pool is gone. Writes are queued, never waited for."""

    def __init__(self, facts: Facts, boot_id: str) -> None:
        self._facts = facts
        self._boot_id = boot_id
        self._known: dict[str, FailureHistory] = {}

    def restore(self) -> None:
        """Those that earlier daemons left, once the state is open."""
        self._known = {pool_id: from_stored(raw, self._boot_id) for pool_id, raw in self._facts.facts(KIND).items()}

    def of(self, pool_id: str) -> FailureHistory:
        return self._known.get(pool_id, NOTHING_FAILED)

    def note(self, pool_id: str, history: FailureHistory) -> None:
        if history == self.of(pool_id):
            return
        self._facts.note_fact(KIND, pool_id, to_stored(history, self._boot_id))
        self._known[pool_id] = history

    def forget(self, pool_id: str) -> None:
        if self._known.pop(pool_id, NOTHING_FAILED) != NOTHING_FAILED:
            self._facts.note_fact(KIND, pool_id, None)

    def forget_others(self, pool_ids: Collection[str]) -> None:
        """Pools that are not configured any more, and that nobody asked for."""
        for pool_id in [known for known in self._known if known not in pool_ids]:
            self.forget(pool_id)
