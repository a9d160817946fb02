"""Whether there is room on the disk of the model cache: asked before bytes are fetched, and while they are."""

from __future__ import annotations

import os
from pathlib import Path

from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError
from pool_managerd.models.part import disk_error


class Room:
    """``keep_free`` bytes of the disk that ``root`` is on are for others."""

    CHECKED_BYTES = 256 << 20

    def __init__(self, root: Path, keep_free: int) -> None:
        self.root, self.keep_free = root, keep_free

    def require(self, more: int, what: str) -> None:
        """Raises NodeError (507) where ``more`` bytes do not fit. Blocks."""
        try:
            found = os.statvfs(self.root)
        except OSError as problem:
            raise disk_error(self.root, problem) from problem
        free = found.f_bavail * found.f_frsize
        if free - more < self.keep_free:
            raise NodeError(
                f"cannot fetch {what}: {size(more)} more are needed, {size(free)} are free where {self.root} is, and"
                f" {size(self.keep_free)} stay free (models.keep_free_bytes)",
                status=507, hint="free some space there, or have models.cache_dir on a larger disk",
            )  # fmt: skip
