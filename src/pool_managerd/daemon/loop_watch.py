"""Whether the daemon's event loop turns: how late it is, and where it stands when it does not.

A daemon whose loop stands sees nothing: no probe, no crash, no request. From inside nobody can say so, hence a thread. It
writes down once per standstill what the loop's thread is doing. It ends nothing: systemd's watchdog does that, where it is.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

BEAT_S = 1.0
STANDSTILL_S = 10.0
WINDOW_S = 60.0
MAX_STACK_CHARS = 8_000

Tell = Callable[[float, str], None]
"""How long it has stood, in seconds, and the stack of its thread. Called from the watching thread."""


class LoopWatch:
    """Beats in the running loop, and watches the beat. ``tell`` hears of a standstill."""

    def __init__(self, tell: Tell, *, beat_s: float = BEAT_S, standstill_s: float = STANDSTILL_S) -> None:
        self._tell, self._beat_s, self._standstill_s = tell, beat_s, standstill_s
        self._lags: deque[tuple[float, float]] = deque(maxlen=round(WINDOW_S / BEAT_S))
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._ending = threading.Event()
        self._watched = 0
        self._thread = threading.Thread(target=self._watch, name="loop-watch", daemon=True)

    def start(self) -> None:
        """Watch the loop that this is called in."""
        self._watched = threading.get_ident()
        self._due = time.monotonic()
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        if self._timer is not None:
            self._timer.cancel()

    def lag_seconds(self) -> float:
        """By how much the loop was late at most, in the last minute."""
        since = time.monotonic() - WINDOW_S
        return max((lag for at, lag in self._lags if at >= since), default=0.0)

    def _beat(self) -> None:
        now = time.monotonic()
        self._lags.append((now, max(0.0, now - self._due)))
        self._due = now + self._beat_s
        self._timer = asyncio.get_running_loop().call_later(self._beat_s, self._beat)

    def _watch(self) -> None:
        last, told_of = time.monotonic(), 0.0
        while not self._ending.wait(self._beat_s):
            now, due = time.monotonic(), self._due
            suspended = now - last > 2 * self._beat_s  # this thread stood, too: the whole process or machine did
            last = now
            if suspended or now - due < self._standstill_s or due == told_of:
                continue
            told_of = due
            frame = sys._current_frames().get(self._watched)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            self._tell(now - due + self._beat_s, stack[-MAX_STACK_CHARS:])
