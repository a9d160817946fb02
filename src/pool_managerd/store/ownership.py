"""Whose the daemon's directories and files are: what another user could write is not believed."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from pathlib import Path

from pool_managerd.errors import NodeError

_LOOSE = 0o022
_TEMPORARY = frozenset({"/tmp", "/var/tmp", "/dev/shm"})  # noqa: S108 - where nothing of the daemon's belongs
_PARTS = (
    *(name + suffix for name in ("state.db", "journal.db") for suffix in ("", "-wal", "-shm", "-journal")),
    "journal.ids", "daemon.lock",
)  # fmt: skip


def claim_directory(path: Path, what: str, mode: int) -> list[str]:
    """Make ``path`` with ``mode`` where it is missing (parents with 0755), whatever the umask, and make sure it is ours.

    What is ours but writable by others is closed to them. A sentence tells of each, and of parents in which everybody
    could put another directory in its place. Raises NodeError with the command to type for what belongs to another user,
    OSError for a directory that cannot be made.
    """
    _make(path, mode)
    repaired = []
    for place in (path, *(path / name for name in _PARTS)):
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
