"""The node's own tasks, which must never be missing without a word: started again when they fail, a bounded number of times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from pool_managerd import failpoints
from pool_managerd.supervision.event_log import EventLog
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.protocols import Clock

MAX_FAILURES = 5
WINDOW_S = 600.0
FIRST_PAUSE_S = 0.5


async def keep_up(
    work: Callable[[], Coroutine[Any, Any, None]],
    what: str,
    clock: Clock,
    events: EventLog,
    on_fatal: Callable[[BaseException], None],
) -> None:
    """Run ``work`` to its end, if it has one. When it fails it is begun again after a pause that doubles.

    After ``MAX_FAILURES`` in ``WINDOW_S`` the node is not to be relied on any more: ``on_fatal`` is called, and it goes on.
    """
    failures: deque[float] = deque(maxlen=MAX_FAILURES)
    while True:
        try:
            failpoints.reach("loop.task")
            return await work()
        except Exception as caught:  # noqa: BLE001 - the task's boundary: whatever it is, it is told, and the work goes on
            problem = caught
        now = clock.monotonic()
        failures.append(now)
        recent = sum(now - at <= WINDOW_S for at in failures)
        human = f"Internal error in {what} ({recent} of {MAX_FAILURES} before the daemon ends itself): {problem!r}"
        events.emit("internal_error", human, level="critical", task=what, failures=recent)
        if recent == MAX_FAILURES:
            on_fatal(problem)
            failures.clear()
        await pause(clock, FIRST_PAUSE_S * 2 ** (recent - 1))
