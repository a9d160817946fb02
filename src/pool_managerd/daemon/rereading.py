"""The file read again without a request: on SIGHUP, and with ``serve --watch`` when it has changed.

A file that cannot be used changes nothing. Pools that the file does not name any more are kept: taking them away is for somebody
to say (``apply --prune``).
"""

from __future__ import annotations

import asyncio

from pool_managerd.daemon.configuration import Configuration
from pool_managerd.errors import PoolError
from pool_managerd.supervision.event_log import EventLog

MAX_NAMED = 8
WATCH_S = 1.0
"""How often a watched file is looked at; it must look the same twice before it is read, as it may be in the middle of a write."""


class Rereading:
    """Call it to read again."""

    def __init__(self, configuration: Configuration, events: EventLog) -> None:
        self._configuration, self._events = configuration, events
        self._running: asyncio.Task[None] | None = None
        self._again = False

    def __call__(self) -> None:
        """Asked while one is under way, it is done once more after that."""
        if self._running is not None and not self._running.done():
            self._again = True
            return
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self._again = False
            await self.read("sighup")
            if not self._again:
                return

    async def read(self, origin: str) -> bool:
        """Read and apply the file, to the end; false where it should be tried again, as something was in the way for now."""
        try:
            operation = await self._configuration.apply(origin=origin)
        except PoolError as problem:
            if origin == "watch" and problem.code == "OPERATION_IN_PROGRESS":
                return False
            why = "; ".join(problem.message.splitlines())  # a file's problems stand one in a line
            human = f"The configuration cannot be read again, so everything stays as it was: {why}"
            self._events.emit("config_reread", human, level="error", outcome="error", hint=problem.hint)
            return not problem.retriable
        waiting = list((operation.progress or {}).get("waiting", ()))
        human = f"The configuration was read again: {(operation.progress or {}).get('summary')}"
        if waiting:
            more = f" and {len(waiting) - MAX_NAMED} more" if len(waiting) > MAX_NAMED else ""
            human += f". These wait for a restart of the daemon: {', '.join(waiting[:MAX_NAMED])}{more}"
        self._events.emit("config_reread", human, outcome="success", waiting=waiting, operation_id=operation.operation_id)
        try:
            await operation.wait()
        except PoolError:
            return True  # it is told as the end of the apply
        return True

    async def watch(self) -> None:
        """Read the file again each time that it has changed, until cancelled."""
        source = self._configuration.source
        applied = before = await asyncio.to_thread(source.seen)
        while True:
            await asyncio.sleep(WATCH_S)
            now = await asyncio.to_thread(source.seen)
            settled, before = now == before, now
            if now is not None and settled and now != applied and await self.read("watch"):
                applied = now
