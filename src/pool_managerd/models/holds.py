"""Which models this process needs, for other daemons with the same cache to see: a shared lock for each, which ends with it."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Collection
from pathlib import Path


class Holds:
    """Kept in ``folder``. Nothing blocks for longer than a look takes; the caller has the catalog's lock. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}

    def take(self, ref: str) -> None:
        """Others leave it alone from now on."""
        if ref not in self._held:
            fd = os.open(self._place(ref), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            self._held[ref] = fd

    def keep_only(self, refs: Collection[str]) -> None:
        """Take these, and let go of all others."""
        for ref in [ref for ref in self._held if ref not in refs]:
            os.close(self._held.pop(ref))
        for ref in refs:
            self.take(ref)

    def is_others(self, ref: str) -> bool:
        """Whether another process needs it, too."""
        try:
            fd = os.open(self._place(ref), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        mine = self._held.pop(ref, None)
        if mine is not None:
            os.close(mine)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
            if mine is not None:
                self.take(ref)
        return False

    def close(self) -> None:
        """This process needs nothing any more."""
        self.keep_only(())

    def forget(self, ref: str) -> None:
        """There is no such model any more."""
        if ref in self._held:
            os.close(self._held.pop(ref))
        self._place(ref).unlink(missing_ok=True)

    def _place(self, ref: str) -> Path:
        return self._folder / f"needed-{hashlib.sha256(ref.encode()).hexdigest()[:32]}.lock"
