"""Those who only watch what goes on: bounded in number, and not waited for at the gateway's end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pool_managerd.errors import NodeError

MOST = 64


class Watchers:
    """Of one gateway; ``closing`` is set at its end."""

    def __init__(self) -> None:
        self._count = 0
        self.closing = asyncio.Event()

    @contextmanager
    def one(self) -> Iterator[None]:
        """While it watches. Raises NodeError TOO_MANY_REQUESTS."""
        if self._count >= MOST:
            raise NodeError(f"cannot be watched by more than {MOST} at once", code="TOO_MANY_REQUESTS", retry_after_ms=5000)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
