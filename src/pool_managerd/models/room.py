"""Whether there is room in the model cache and on its disk: asked before bytes are fetched, and while they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pool_managerd.core.model_keeping import Limits, shortage
from pool_managerd.errors import NodeError
from pool_managerd.models.part import disk_error


class Room:
    """``keep_free`` bytes of the disk that ``root`` is on are for others; ``max_bytes`` is all that may be below ``root``, and
    ``used`` tells how much is. Everything blocks.
    """

    CHECKED_BYTES = 256 << 20

    def __init__(self, root: Path, keep_free: int, max_bytes: int | None = None, used: Callable[[], int] = lambda: 0) -> None:
        self.root, self.keep_free, self.max_bytes, self._used = root, keep_free, max_bytes, used

    def limits(self, more: int = 0) -> Limits:
        """As they are with ``more`` bytes to come. Raises NodeError."""
        try:
            found = os.statvfs(self.root)
        except OSError as problem:
            raise disk_error(self.root, problem) from problem
        used = 0 if self.max_bytes is None else self._used()
        return Limits(used, found.f_bavail * found.f_frsize, self.max_bytes, self.keep_free, more)

    def require(self, more: int, what: str, could_go: str = "") -> None:
        """Raises NodeError (507) where ``more`` bytes do not fit; ``could_go`` says what could be deleted."""
        limits = self.limits(more)
        if limits.short_bytes:
            message, hint = shortage(limits, what, str(self.root), could_go)
            raise NodeError(message, status=507, hint=hint)
