"""The state's files on disk: whether they are still the ones that we wrote, and a new one in their place when not."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from pool_managerd.store.contents import SCHEMA, Contents, read_generation

PARTS = ("", "-wal", "-shm", "-journal")
_Seen = tuple[int, int, int, int]


class StatePlace:
    """``state.db`` and its journals. Nobody but this process writes them, so any other change of them was not ours.

    Beside them ``state.generation`` says how many commits were acknowledged, so that an older copy shows as one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._outside = path.with_name("state.generation")
        self._fresh = path.with_name(path.name + ".new")
        self._seen: list[_Seen | None] = []

    def parts(self) -> list[Path]:
        return [self.path.with_name(self.path.name + suffix) for suffix in PARTS]

    def remember(self) -> None:
        """The files as they are now are ours."""
        self._seen = self._look()

    def changed(self) -> str | None:
        """What somebody else did to the files since ``remember``; None for nothing."""
        before, now = self._seen, self._look()
        if now == before:
            return None
        if not self.path.parent.is_dir():
            return "the state directory was removed"
        if now[0] is None:
            return "the state file was removed"
        if before[0] is None or now[0][:2] != before[0][:2]:
            return "another file was put in the place of the state file"
        if now[0][2] < before[0][2]:
            return "the state file was cut short"
        return "the state file was written by somebody else" if now[0] != before[0] else "the state's journal was changed"

    def read_back(self) -> int:
        """The generation in the file that has the name, read as a newcomer reads it. Raises sqlite3.Error."""
        with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            return read_generation(db)

    def acknowledged(self) -> int:
        """How many commits were acknowledged to the end; 0 when that is not known."""
        with suppress(OSError, ValueError):
            return int(self._outside.read_bytes()[:20])
        return 0

    def acknowledge(self, generation: int) -> None:
        """Best effort: without it an older copy is noticed only while the daemon runs."""
        with suppress(OSError):
            fd = os.open(self._outside, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, b"%020d" % generation, 0)
            finally:
                os.close(fd)

    def finish_replacement(self) -> None:
        """Complete a ``replace`` that the daemon's death cut short. Raises OSError."""
        if not self.path.exists() and self._fresh.exists() and not self._journal_of_fresh():
            for part in self.parts()[1:]:
                part.unlink(missing_ok=True)
            self._fresh.replace(self.path)

    def write_fresh(self, contents: Contents) -> None:
        """A complete new file beside the old one, on disk when this returns. Raises sqlite3.Error or OSError."""
        if not self.path.parent.is_dir():
            raise FileNotFoundError(2, f"the state directory was removed; make it again: mkdir -m 700 {self.path.parent}")
        for path in (self._fresh, self._fresh.with_name(self._fresh.name + "-journal")):
            path.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(self._fresh, isolation_level=None, timeout=5)) as db:
                self._fresh.chmod(0o600)
                db.execute("PRAGMA synchronous=FULL")
                db.executescript(SCHEMA)
                contents.touch_all()
                contents.write(db)
        except BaseException:
            with suppress(OSError):
                self._fresh.unlink(missing_ok=True)
            raise

    def take_fresh(self) -> str | None:
        """Put the new file in the old one's place; what had the name is kept: its new name. Raises OSError."""
        kept = self.set_aside("replaced") if self.path.exists() else None
        for part in self.parts()[1:]:
            part.unlink(missing_ok=True)
        self._fresh.replace(self.path)
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return kept

    def set_aside(self, what: str) -> str:
        """Rename the files: kept for a post-mortem, never deleted, never overwritten by later ones. Raises OSError."""
        number = 1
        name = f"{self.path.name}.{what}"
        while (kept := self.path.with_name(name if number == 1 else f"{name}.{number}")).exists():
            number += 1
        for part, suffix in zip(self.parts(), PARTS, strict=True):
            if part.exists():
                part.replace(kept.with_name(kept.name + suffix))  # its journal keeps the name that SQLite looks for
        return kept.name

    def _journal_of_fresh(self) -> bool:
        """A fresh file that still has a journal was not finished."""
        return self._fresh.with_name(self._fresh.name + "-journal").exists()

    def _look(self) -> list[_Seen | None]:
        file, journal = (_stat(part) for part in self.parts()[:2])
        return [file, None if journal is None else (*journal[:3], 0)]


def _stat(path: Path) -> _Seen | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
