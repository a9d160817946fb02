"""An asyncio event loop on virtual time: nothing waits, nothing is read or written, and no thread takes part.

Time is whatever its owner says; the owner takes one turn after the other and moves time on to the next timer. What is ready at
the same time runs in an order that is drawn from a seed, so that another seed is another order, and the same seed the same one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context
from random import Random
from typing import Any, TypeVar, TypeVarTuple

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
AnyCoroutine = Generator[Any, None, _T] | Coroutine[Any, Any, _T]


class VirtualLoop(asyncio.AbstractEventLoop):
    """``after_each`` is called after every callback; when it says True the turn ends there, in the middle.

    ``problems`` are the exceptions that nobody took.
    """

    def __init__(self, now: Callable[[], float], order: Random) -> None:
        self._now, self._order = now, order
        self._ready: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self._running = self._ended = False
        self.after_each: Callable[[], bool] = lambda: False
        self.problems: list[str] = []

    # --- for its owner ---

    def turn(self) -> bool:
        """Run all that is ready now, what is due included, once. False when there was nothing."""
        now = self._now()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].cancelled()):
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled():
                self._ready.append(timer)
        batch, self._ready = self._ready, []
        if len(batch) > 1:
            self._order.shuffle(batch)
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        self._running = True
        try:
            for place, handle in enumerate(batch):
                if not handle.cancelled():
                    handle._run()
                    if self.after_each():
                        self._ready[:0] = batch[place + 1 :]
                        return True
        finally:
            self._running = False
            asyncio._set_running_loop(outer)
        return bool(batch)

    def next_at(self) -> float | None:
        """When there is something to do again: now, when the next timer is due, or None for never."""
        if self._ready:
            return self._now()
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def end(self) -> None:
        """Nothing runs here any more, from this moment on: as when its process is killed."""
        self._ended = True
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)  # what a task does on its way out is not heard any more, but it may try
        try:
            for task in asyncio.all_tasks(self):
                with suppress(BaseException):
                    task.get_coro().close()
        finally:
            asyncio._set_running_loop(outer)
        self._ready.clear()
        self._timers.clear()

    # --- for tasks ---

    def time(self) -> float:
        return self._now()

    def call_soon(self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        if not self._ended:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        if not self._ended:
            heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now() + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays where it is until its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: AnyCoroutine[_T], *, name: str | None = None, context: Context | None = None) -> asyncio.Task[_T]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        if self._ended:
            with suppress(RuntimeError):
                coro.close()
        return task

    def is_running(self) -> bool:
        return self._running

    def is_closed(self) -> bool:
        return self._ended

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._ended:
            self.problems.append(f"{context.get('message')}: {context.get('exception')!r}")
