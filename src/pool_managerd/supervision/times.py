"""How long loads and stops of each pool took, and falling asleep, the last few: what a reload's forecast rests on."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from pool_managerd.core.event import Event
from pool_managerd.core.reload import SAMPLES
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.protocols import Records

_UNMEASURED_S = 10.0
TIMES = "times"
"""The kind of the facts about them, by pool id."""


class Times:
    """Listens to ``events``; kept for the next daemon."""

    def __init__(self, events: EventLog, records: Records) -> None:
        self._records = records
        self._known: dict[str, dict[str, list[float]]] = {}
        self._stopping: dict[str, int] = {}
        events.listen(self._hear)

    def restore(self) -> None:
        """What earlier daemons measured, once the state is open."""
        self._known = {pool_id: {kind: _numbers(fact.get(kind)) for kind in fact} for pool_id, fact in self._facts().items()}

    def _facts(self) -> Mapping[str, Mapping[str, Any]]:
        return self._records.facts(TIMES)

    def of(self, pool_id: str, kind: str) -> list[float]:
        """In ms; ``kind`` is ``load``, ``stop`` or ``sleep``."""
        return self._known.get(pool_id, {}).get(kind, [])

    def load_s(self, pool_id: str) -> float:
        """How long a load takes, as measured; of one that never was, a guess."""
        known = self.of(pool_id, "load")
        return median(known) / 1000 if known else _UNMEASURED_S

    def _hear(self, event: Event) -> None:
        pool_id = event.pool_id
        if pool_id is None:
            return
        if event.type == "preload_succeeded":
            self._note(pool_id, "load", event.fields.get("duration_ms"))
        elif event.type == "asleep":
            self._note(pool_id, "sleep", event.fields.get("duration_ms"))
        elif event.type == "pool_removed":
            self._known.pop(pool_id, None)
            self._records.note_fact(TIMES, pool_id, None)
        elif event.type == "transition":
            if event.fields.get("to_state") == "stopping" and event.fields.get("event") != "Died":
                self._stopping[pool_id] = event.ts_ms
            elif (since := self._stopping.pop(pool_id, None)) is not None:
                self._note(pool_id, "stop", event.ts_ms - since)

    def _note(self, pool_id: str, kind: str, took_ms: Any) -> None:
        if isinstance(took_ms, int | float) and took_ms >= 0:
            kept = self._known.setdefault(pool_id, {})
            kept[kind] = [*kept.get(kind, []), took_ms][-SAMPLES:]
            if kind == "load":  # the others are written with the next one
                self._records.note_fact(TIMES, pool_id, {kind: list(numbers) for kind, numbers in kept.items()})


def kept_times(records: Records, pool_id: str, kind: str) -> list[float]:
    """As ``Times.of``, without the stops since its last load."""
    return _numbers(records.facts(TIMES).get(pool_id, {}).get(kind))


def _numbers(value: Any) -> list[float]:
    return [number for number in value if isinstance(number, int | float)][-SAMPLES:] if isinstance(value, list) else []
