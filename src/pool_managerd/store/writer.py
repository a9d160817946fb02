"""A thread that writes what was left for it, in one go whatever there is, and tells whoever waits when it has."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_END_S = 10.0


class Writer:
    """``write`` is called in the thread: it writes all that is there, and returns what kept it from doing so, or None.

    After a failure it is called again when there is more, and after ``retry_s`` where that is given. ``finish`` is called last.
    Where nobody waits it is called ``gather_s`` later: one write for all that came meanwhile, and no thread that competes with
    whoever has just left something and has more to do.
    """

    def __init__(
        self, name: str, write: Callable[[], str | None], finish: Callable[[], None], retry_s: float | None = None,
        gather_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._write, self._finish, self._retry_s, self._gather_s = write, finish, retry_s, gather_s
        self._hurry = threading.Event()
        self._waiting: deque[Callable[[str | None], None]] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    @property
    def ending(self) -> bool:
        """What is left from now on may not be written any more."""
        return self._ending.is_set()

    def start(self) -> None:
        self._started = True
        self._thread.start()

    def wake(self) -> None:
        """There is something to write."""
        if not self._wake.is_set():
            self._wake.set()

    async def written(self) -> str | None:
        """Return when all that was left before is written, or could not be: then why."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[str | None] = loop.create_future()

        def settle(trouble: str | None) -> None:
            if not told.done():
                told.set_result(trouble)

        def done(trouble: str | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, trouble)

        if not self._started or self.ending:
            return "it is closed"
        self._waiting.append(done)
        self._hurry.set()
        self._wake.set()
        return await told

    async def close(self) -> None:
        """All that was left is written when this returns, if it can be."""
        self._ending.set()
        self._hurry.set()
        self._wake.set()
        if self._started:
            await asyncio.to_thread(self._thread.join, _END_S)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._wake.wait(self._retry_s if self._trouble is not None else None)
            if self._gather_s > 0:
                self._hurry.wait(self._gather_s)
                self._hurry.clear()
            self._wake.clear()
            self._once()
        self._once()
        self._finish()

    def _once(self) -> None:
        waiting = []
        with suppress(IndexError):  # taken up first: what was left before them is there by now
            while True:
                waiting.append(self._waiting.popleft())
        self._trouble = self._write()
        for done in waiting:
            done(self._trouble)
