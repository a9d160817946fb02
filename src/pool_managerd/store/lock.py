"""One daemon per state directory and per runtime directory, and what another user could write in them is not believed."""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
from pathlib import Path

from pool_managerd.errors import NodeError
from pool_managerd.store.place import parts_of

_LOOSE = 0o022
_TEMPORARY = frozenset({"/tmp", "/var/tmp", "/dev/shm"})  # noqa: S108 - where nothing of the daemon's belongs
_DATABASES = ("state.db", "state.db.new", "journal.db")
_OTHERS = ("state.generation", "journal.ids", "daemon.lock")


class DirectoryLock:
    """An exclusive lock that the kernel drops when its holder dies; the file names the holder's pid for people.

    The directory is made with ``mode`` where it is missing. One that is closed to others is locked itself, too: its file may be
    removed, by a cleaner of old files or by somebody who takes it for a stale one.
    """

    def __init__(self, directory: Path, what: str, mode: int = 0o700) -> None:
        self._mode = mode
        self._path = directory / "daemon.lock"
        self._what = what
        self._fd: int | None = None
        self._directory_fd: int | None = None
        self._told: str | None = None

    def acquire(self) -> list[str]:
        """What had to be closed to other users, a sentence each. Does nothing when it is held already.

        Raises NodeError: ALREADY_RUNNING with the holder's pid, DIRECTORY_NOT_OURS, or STATE_UNWRITABLE.
        """
        if self._fd is not None:
            return []
        try:
            repaired = claim_directory(self._path.parent, self._what, self._mode)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            os.fchmod(fd, 0o600)  # who may open it may lock it
        except OSError as problem:
            raise unwritable(self._path.parent, self._what, problem) from problem
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock_directory()
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise NodeError(
                f"cannot use {self._what} {self._path.parent}: another pool-managerd (pid {holder}) is using it",
                code="ALREADY_RUNNING", status=409, retriable=False, details={"pid": holder},
                hint=f"stop the daemon with pid {holder}, or give this one its own --state-dir and --runtime-dir",
            ) from None  # fmt: skip
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as problem:
            os.close(fd)
            raise unwritable(self._path.parent, self._what, problem) from problem
        self._fd = fd
        return repaired

    def _lock_directory(self) -> None:
        """Raises BlockingIOError. Other users could hold one that they may open, and some file systems lock no directories."""
        if self._mode & 0o077 or self._directory_fd is not None:
            return
        fd = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise
        except OSError:
            os.close(fd)
        else:
            self._directory_fd = fd

    def keep(self) -> str | None:
        """Put the file back where it was removed or replaced: the next daemon would find nobody here. What is new about that."""
        if self._fd is None or self._has_its_name(self._fd):
            return None
        before, self._fd = self._fd, None
        try:
            self.acquire()
        except NodeError as problem:
            self._fd = before
            told = f"{self._path} is not this daemon's any more: {problem.message}"
        else:
            os.close(before)
            told = f"{self._path} was removed while this daemon uses the directory; it is there again"
        new, self._told = told != self._told or self._fd is not before, told
        return told if new else None

    def _has_its_name(self, fd: int) -> bool:
        try:
            named, held = self._path.stat(follow_symlinks=False), os.fstat(fd)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        for fd in (self._fd, self._directory_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._directory_fd = None


def unwritable(directory: Path, what: str, problem: OSError) -> NodeError:
    room = "make the directory writable and leave some space, or choose another one with --state-dir / --runtime-dir"
    descriptors = "raise the limit of open files: LimitNOFILE in the systemd unit, or ulimit -n; of the machine, fs.file-max"
    return NodeError(
        f"cannot write to {what} {directory}: {problem.strerror or problem}",
        code="STATE_UNWRITABLE", status=507, retriable=False,
        hint=descriptors if problem.errno in (errno.EMFILE, errno.ENFILE) else room,
    )  # fmt: skip


def claim_directory(path: Path, what: str, mode: int) -> list[str]:
    """Make ``path`` with ``mode`` where it is missing (parents with 0755), whatever the umask, and make sure it is ours.

    What is ours but writable by others is closed to them. A sentence tells of each, and of parents in which everybody
    could put another directory in its place. Raises NodeError with the command to type for what belongs to another user,
    OSError for a directory that cannot be made.
    """
    _make(path, mode)
    repaired = []
    parts = (part for name in _DATABASES for part in parts_of(path / name))
    for place in (path, *parts, *(path / name for name in _OTHERS)):
        try:
            info = place.stat() if place == path else place.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(info.st_mode):
            continue  # refused where it is opened
        repaired += _keep_ours(place, info, what)
    return repaired + [_open_parent(path, parent) for parent in path.resolve().parents if _is_for_everybody(parent)]


def _make(path: Path, mode: int) -> None:
    missing = []
    place = Path.cwd() / path
    while not place.exists() and not place.is_symlink():
        missing.append(place)
        place = place.parent
    for directory in reversed(missing):
        try:
            directory.mkdir(0o700)
        except FileExistsError:
            continue
        directory.chmod(mode if directory == missing[0] else 0o755)
    if not missing:
        path.mkdir(exist_ok=True)  # something else may have its name


def _keep_ours(place: Path, info: os.stat_result, what: str) -> list[str]:
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid():
        reason = f"{place} belongs to uid {info.st_uid}, who could change what this daemon believes"
        raise _not_ours(what, reason, f"chown {os.geteuid()} {shlex.quote(str(place))}")
    if not mode & _LOOSE:
        return []
    if str(place.resolve()) in _TEMPORARY:
        raise _not_ours(what, f"{place} is a directory for everybody (mode {mode:04o})", "choose a directory of its own")
    try:
        place.chmod(mode & ~_LOOSE)
    except OSError as error:
        if error.errno == errno.EROFS:  # then nobody can
            return []
        reason = f"{place} can be written by other users (mode {mode:04o}), and closing it failed: {error.strerror}"
        raise _not_ours(what, reason, f"chmod go-w {shlex.quote(str(place))}") from error
    return [f"{place} could be written by other users (mode {mode:04o}); it has mode {mode & ~_LOOSE:04o} now"]


def _is_for_everybody(directory: Path) -> bool:
    """Everybody may rename what lies in it; a sticky one keeps it where it is."""
    mode = directory.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _open_parent(path: Path, parent: Path) -> str:
    quoted = shlex.quote(str(parent))
    return (
        f"Every user, and so every engine, can write to {parent} and put another directory in place of {path}: chmod o-w {quoted}"
    )


def _not_ours(what: str, reason: str, remedy: str) -> NodeError:
    return NodeError(
        f"cannot use {what}: {reason}", code="DIRECTORY_NOT_OURS", status=503, retriable=False,
        hint=f"{remedy}, or choose another one with --state-dir / --runtime-dir",
    )  # fmt: skip
