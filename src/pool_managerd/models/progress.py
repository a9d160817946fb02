"""How far something is, as it is told to whoever waits."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called in the event loop with (bytes that are done, bytes in all; 0 where that is not known)."""


def beyond(progress: Progress, done: int, total: int) -> Progress:
    """That of one file among several: ``done`` bytes were there before it, of ``total``."""
    return lambda more, of: progress(done + more, total or of)


def untold(_done: int, _total: int) -> None:
    """Nobody wants to know."""
