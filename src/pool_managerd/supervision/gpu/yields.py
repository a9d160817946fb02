"""GPUs that a person has left to others, for a while or until told otherwise; and what is always to stay free on each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.kept_free import FreeRules, KeptFree, kept_free
from pool_managerd.errors import RequestError
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.gpu.watch import GpuWatch
from pool_managerd.supervision.protocols import Clock, Facts, Timer

FACT = "yield"
_BACK = "`pool-managerd yield --end` takes it back"


@dataclass(frozen=True, slots=True)
class Yielded:
    """One GPU, since and until a unix millisecond; None: until a person says so."""

    uuid: str
    label: str
    since_ms: int
    until_ms: int | None

    @property
    def why(self) -> str:
        if self.until_ms is None:
            return "yielded"
        return f"yielded until {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.until_ms / 1000))}"


class Yields:
    """Of one node. ``rules`` are those in force; ``version`` counts what a person has changed. ``on_change`` is called then."""

    def __init__(self, watch: GpuWatch, clock: Clock, events: EventLog, facts: Facts, rules: Callable[[], FreeRules]) -> None:
        self._watch, self._clock, self._events, self._facts, self.rules = watch, clock, events, facts, rules
        self._given: dict[str, Yielded] = {}
        self._timer: Timer | None = None
        self.version = 0
        self.on_change: Callable[[], None] = lambda: None

    def restore(self) -> None:
        """What an earlier daemon was told; after the state was opened."""
        for uuid, raw in self._facts.facts(FACT).items():
            until, since = raw.get("until_ms"), raw.get("since_ms")
            if (until is None or isinstance(until, int)) and isinstance(since, int):
                self._given[uuid] = Yielded(uuid, str(raw.get("label", "?")), since, until)
        self._changed()

    def kept_free(self, devices: Sequence[DeviceSnapshot], ours: Collection[int]) -> dict[str, KeptFree]:
        """What is to be free on each, by UUID."""
        yielded = {uuid: KeptFree(None, one.why, _BACK) for uuid, one in self._given.items()}
        return kept_free(devices, self.rules(), yielded, ours)

    def all(self) -> list[Yielded]:
        """Those of now, by UUID."""
        return [self._given[uuid] for uuid in sorted(self._given)]

    async def begin(self, names: Sequence[str], seconds: float | None) -> list[Yielded]:
        """Leave these GPUs (all, when empty) to others. Durable. Raises RequestError DEVICE_NOT_FOUND, NodeError."""
        now = self._clock.wall_ms()
        until = None if seconds is None else now + round(seconds * 1000)
        given = [Yielded(d.uuid, d.label, now, until) for d in await self._devices(names)]
        for one in given:
            raw = {"label": one.label, "since_ms": one.since_ms, "until_ms": one.until_ms}
            await self._facts.put_fact(FACT, one.uuid, raw)
            self._given[one.uuid] = one
            human = f"GPU {one.label} is {one.why}: nothing starts there, and what is idle goes"
            self._events.emit("yield", human, device=one.label, uuid=one.uuid, until_ms=one.until_ms)
        self._changed()
        return given

    async def end(self, names: Sequence[str]) -> list[Yielded]:
        """Use these GPUs (all, when empty) again. Durable. Raises RequestError DEVICE_NOT_FOUND, NodeError."""
        wanted = {d.uuid for d in await self._devices(names)} if names else set(self._given)
        over = [one for one in self.all() if one.uuid in wanted]
        for one in over:
            await self._facts.put_fact(FACT, one.uuid, None)
            self._forget(one, "a person says")
        self._changed()
        return over

    async def _devices(self, names: Sequence[str]) -> list[DeviceSnapshot]:
        if not self._watch.scan.devices:
            await self._watch.rescan()
        if names:
            return list({d.uuid: d for d in map(self._watch.find, names)}.values())
        found = [d for d in self._watch.scan.devices if d.parent_uuid is None]
        if not found:
            raise RequestError("cannot yield a GPU: this machine has none", code="DEVICE_NOT_FOUND", status=404)
        return found

    def _look(self) -> None:
        now = self._clock.wall_ms()
        for one in self.all():
            if one.until_ms is not None and one.until_ms <= now:
                self._facts.note_fact(FACT, one.uuid, None)
                self._forget(one, "its time is over")
        self._changed()

    def _forget(self, one: Yielded, why: str) -> None:
        self._given.pop(one.uuid, None)
        self._events.emit("yield_over", f"GPU {one.label} is used again: {why}", device=one.label, uuid=one.uuid)

    def _changed(self) -> None:
        self.version += 1
        if self._timer is not None:
            self._timer.cancel()
        due, self._timer = min((one.until_ms for one in self.all() if one.until_ms is not None), default=None), None
        if due is not None:
            left_s = max(0.0, (due - self._clock.wall_ms()) / 1000)
            self._timer = self._clock.call_at(self._clock.monotonic() + left_s, self._look)
        self.on_change()
