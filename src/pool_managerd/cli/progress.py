"""How far what is being waited for has come, on stderr."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

from pool_managerd.cli.output import Json, printable, span
from pool_managerd.cli.table import cut
from pool_managerd.core.narration import count, duration

POLL_S = 0.15
_STEPS_MS = (10_000, 1_000, 100, 1)
_FRAMES = "|/-\\"


class Progress:
    """On a terminal one line with the time that has passed; elsewhere each new sentence is a line."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._frame = 0
        self._last: list[str] = []

    def update(self, sentences: list[str]) -> None:
        if self._terminal:
            more = f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else ""
            self._draw(sentences[0] + more)
            return
        for sentence in sentences:
            if sentence not in self._last:
                sys.stderr.write(printable(sentence) + "\n")
        self._last = sentences

    def _draw(self, sentence: str) -> None:
        self._frame = (self._frame + 1) % len(_FRAMES)
        elapsed = span(round((time.monotonic() - self._began) * 1000))
        room = max(20, shutil.get_terminal_size().columns) - 1
        text = cut(" ".join(printable(f"{_FRAMES[self._frame]} {elapsed:>5}  {sentence}").split("\n")), room)
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._frame:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def wait_for(pending: Callable[[], list[str]], *, timeout_s: float | None = None) -> bool:
    """Poll until ``pending`` has no sentence left (what is still waited for); false when the time is over first."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with Progress() as progress:
        while sentences := pending():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            progress.update(sentences)
            time.sleep(POLL_S)
    return True


def sentence(pool: Json) -> str:
    """What a pool is doing now."""
    step = pool.get("preload") or {}
    done, total = step.get("bytes_done"), step.get("bytes_total")
    left_ms = step.get("eta_ms") if sys.stderr.isatty() else None  # elsewhere each change would be a line
    percent = f" ({100 * done // total} %{f', {span(left_ms)} left' if left_ms else ''})" if done and total else ""
    drain = pool.get("drain")
    left = ""
    if drain:  # in steps: elsewhere than on a terminal each new sentence is a line
        step_ms = next(step for step in _STEPS_MS if step <= max(drain["remaining_ms"], 1))
        about_s = round(drain["remaining_ms"] / step_ms) * step_ms / 1000
        left = f", {count(drain['left'], 'request')} left, about {duration(about_s)} to the deadline"
    return f"{pool['pool_id']}: {step.get('human') or pool['state']}{percent}{left}"
