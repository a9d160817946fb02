"""What a router has to know: which pool answers to which names, where, and whether it may be asked there now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from pool_managerd.core.engines import ENGINES
from pool_managerd.core.lifecycle import view
from pool_managerd.core.lifecycle.phase import RISING
from pool_managerd.core.redaction import masked_text
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.names import Names
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import Clock

Row = Mapping[str, Any]
_RECALL_S, _LOOK_S = 0.5, 0.02


class Routes:
    """``waiting`` tells whether anybody waits for a slot or for room: leases that are not in use are to come back then."""

    def __init__(self, pools: Pools, names: Names, events: EventLog, waiting: Callable[[], bool]) -> None:
        self._pools, self._names, self._somebody_waits = pools, names, waiting
        self._recalls = 0
        self._watchers: set[asyncio.Event] = set()
        events.listen(lambda _: self.changed())

    def changed(self) -> None:
        """Whoever watches looks again."""
        for bell in self._watchers:
            bell.set()

    def _waiting(self) -> bool:
        return self._recalls > 0 or self._somebody_waits()

    async def recall(self, returned: Callable[[], bool], clock: Clock) -> None:
        """Have leases come back that routers only keep for their next request; a moment is enough for that."""
        self._recalls += 1
        self.changed()
        try:
            until = clock.monotonic() + _RECALL_S
            while not returned() and clock.monotonic() < until:
                await pause(clock, _LOOK_S)
        finally:
            self._recalls -= 1
            self.changed()

    def now(self) -> dict[str, Any]:
        """``{"pools": [a row of each], "gone": [], "waiting": bool}``."""
        return {"pools": [self._row(pool) for pool in self._pools.all()], "gone": [], "waiting": self._waiting()}

    async def watch(self) -> AsyncIterator[dict[str, Any]]:
        """As ``now`` at first, then what has changed since: rows that are new or different, and the ids that are gone."""
        bell, told, waiting = asyncio.Event(), dict[str, Row](), None
        self._watchers.add(bell)
        try:
            while True:
                bell.clear()
                rows = {row["pool_id"]: row for row in self.now()["pools"]}
                changed = [row for pool_id, row in rows.items() if told.get(pool_id) != row]
                gone = [pool_id for pool_id in told if pool_id not in rows]
                if changed or gone or waiting is not self._waiting():
                    told, waiting = rows, self._waiting()
                    yield {"pools": changed, "gone": gone, "waiting": waiting}
                await bell.wait()
        finally:
            self._watchers.discard(bell)

    def _row(self, pool: Pool) -> dict[str, Any]:
        state, launch, config = view(pool.state), pool.launch, pool.config
        engine, held_back = launch.prepared, pool.state.desired.stays_down or pool.state.held
        kind = ENGINES.get("" if config is None else config.engine)
        return {
            "pool_id": pool.pool_id, "name": (config and config.served_name) or pool.pool_id,
            "names": list(self._names.of(pool)), "state": state.state, "ready": state.ready,
            "draining": state.draining, "loading": pool.instance.phase in RISING, "stays_down": held_back and not state.live,
            "epoch": pool.instance.epoch, "url": masked_text(engine.url) if engine is not None and state.live else None,
            "engine": config.engine if config is not None else None if engine is None else engine.engine,
            "model_id": None if engine is None else engine.model_id,
            "engine_names": self._names.of_engine(pool) if kind is not None and kind.knows_its_name else None,
            "ctx": config.ctx if config is not None else None if engine is None else engine.ctx,
            "slots": config.slots if config is not None else 1 if engine is None else engine.slots_total,
            "rules": None if config is None or config.requests is None else config.requests.model_dump(mode="json"),
            "card": None if config is None or config.card is None else config.card.model_dump(mode="json"),
            "last_error": pool.state.last_error,
        }  # fmt: skip
