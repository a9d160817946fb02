"""The files of a database. The state's: whether they are still the ones that we wrote, and a new one in their place when not."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from contextlib import closing, suppress
from pathlib import Path

from pool_managerd.errors import NodeError
from pool_managerd.store.contents import SCHEMA, Contents, read_generation

_PARTS = ("", "-wal", "-shm", "-journal")
# The file's content is at fault. Anything else, such as a full or read-only disk, is the place's.
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
_MOST = 1 << 52
_DESCRIPTORS = 4
"""A file, its journal, their index, and the directory."""
_Seen = tuple[int, int, int, int]


def parts_of(database: Path) -> list[Path]:
    """The database's file and the journals that it may have."""
    return [database.with_name(database.name + suffix) for suffix in _PARTS]


def linked_part(database: Path) -> str | None:
    """Why the database is not opened: one of its parts is a link, and what it leads to may not be ours. None when none is."""
    return next((f"{part.name} is a symbolic link" for part in parts_of(database) if part.is_symlink()), None)


def refuse_newer(database: Path, found: int, known: int) -> None:
    """Raises NodeError STATE_TOO_NEW for the schema of a newer version."""
    if found > known:
        raise NodeError(
            f"cannot open {database}: a newer version wrote it (schema {found}, this one knows {known})",
            code="STATE_TOO_NEW", retriable=False, hint="run the newer version, or choose another --state-dir",
        )  # fmt: skip


def rename_database(database: Path, to: Path) -> None:
    """With the journals, which keep the names that SQLite looks for. Raises OSError."""
    for part, renamed in zip(parts_of(database), parts_of(to), strict=True):
        if part.exists():
            part.replace(renamed)


def is_damage(problem: Exception) -> bool:
    """Whether the file itself is damaged."""
    return isinstance(problem, sqlite3.Error) and code_of(problem) in _DAMAGE


def code_of(problem: sqlite3.Error) -> int:
    """SQLite's primary code; 0 for what the binding raises itself."""
    return getattr(problem, "sqlite_errorcode", 0) & 0xFF


def require_descriptors() -> None:
    """Raises OSError, EMFILE or ENFILE, where SQLite could not open a database now: it says of that only that it cannot."""
    held: list[int] = []
    try:
        while len(held) < _DESCRIPTORS:
            held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as problem:
        raise OSError(problem.errno, f"no more files can be opened ({problem.strerror})") from problem
    finally:
        for fd in held:
            os.close(fd)


def read_number(path: Path) -> int:
    """What ``write_number`` wrote; 0 when that is not known, as of a file that is none or a number that nobody reaches."""
    with suppress(OSError, ValueError):
        fd = _open_number(path, os.O_RDONLY)
        try:
            number = int(os.read(fd, 20))
        finally:
            os.close(fd)
        return number if 0 <= number < _MOST else 0
    return 0


def write_number(path: Path, number: int, *, synced: bool) -> None:
    """Written in place, because that works on a full disk, too; on disk when this returns where ``synced``. Raises OSError."""
    fd = _open_number(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, b"%020d" % number, 0)
        if synced:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def _open_number(path: Path, flags: int) -> int:
    """Neither a link nor a pipe, which would wait for its other end. Raises OSError."""
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return fd


class StatePlace:
    """``state.db`` and its journals. Nobody but this process writes them, so any other change of them was not ours.

    Beside them ``state.generation`` says how many commits were acknowledged, so that an older copy shows as one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._outside = path.with_name("state.generation")
        self._fresh = path.with_name(path.name + ".new")
        self._seen: list[_Seen | None] = []

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
        return read_number(self._outside)

    def acknowledge(self, generation: int) -> None:
        """Best effort: without it an older copy is noticed only while the daemon runs."""
        with suppress(OSError):
            write_number(self._outside, generation, synced=False)

    def finish_replacement(self) -> None:
        """Complete a ``replace`` that the daemon's death cut short. Raises OSError."""
        unfinished = self._fresh.with_name(self._fresh.name + "-journal").exists()
        if not self.path.exists() and self._fresh.exists() and not unfinished:
            self.take_fresh()

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
        for part in parts_of(self.path)[1:]:
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
        rename_database(self.path, kept)
        return kept.name

    def _look(self) -> list[_Seen | None]:
        file, journal = (_stat(part) for part in parts_of(self.path)[:2])
        return [file, None if journal is None else (*journal[:3], 0)]


def _stat(path: Path) -> _Seen | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
