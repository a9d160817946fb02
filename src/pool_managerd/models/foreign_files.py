"""Files that other tools have put on the disk: what may be used of them at all."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.models.hub import MAX_FILES, HubFile, HubListing

_UNFINISHED = (".incomplete", ".partial", "-partial", ".part", ".downloadinprogress", ".tmp", ".lock", ".aria2", ".crdownload")
_MAX_DEPTH = 6
_NO_COMMIT = "0" * 40


@dataclass(frozen=True, slots=True)
class ForeignFile:
    """A file of a model: ``path`` in its repository, ``place`` on the disk as its tool has it, which may be a link into
    ``root``, the tool's directory; ``sha256`` (hex) is what the tool itself says that it is, if it does.
    """

    path: str
    place: Path
    root: Path
    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ForeignRepository:
    """What there is of a repository of the hub. ``commit`` is empty where the tool does not know it."""

    files: tuple[ForeignFile, ...]
    commit: str = ""

    def listing(self) -> HubListing:
        """As if the hub had listed it: models are chosen in both the same way."""
        return HubListing(self.commit or _NO_COMMIT, tuple(HubFile(one.path, one.size, one.sha256) for one in self.files))


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is being downloaded, or was given up."""
    return name.startswith((".", "downloading_")) or name.lower().endswith(_UNFINISHED)


def names_below(folder: Path) -> Iterator[str]:
    """The files below ``folder`` by their path in it, links included; hidden and unfinished ones are left out. Bounded."""
    count = 0
    for here, folders, names in os.walk(folder, followlinks=False):
        depth = len(Path(here).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _MAX_DEPTH else []
        for name in sorted(names):
            path = str((Path(here) / name).relative_to(folder))
            if not is_unfinished(name) and path.isprintable() and "\\" not in path:
                count += 1
                if count > MAX_FILES:
                    return
                yield path


def foreign_file(path: str, place: Path, root: Path, sha256: str | None = None) -> ForeignFile | None:
    """None for what is no file, or a link to nowhere."""
    try:
        found = place.stat()
    except (OSError, ValueError):
        return None
    return ForeignFile(path, place, root, found.st_size, sha256) if stat.S_ISREG(found.st_mode) and found.st_size else None


def real_path(path: Path) -> Path:
    """Without links. Raises OSError for what is not there, and for links in a circle."""
    return Path(os.path.realpath(path, strict=True))


def is_folder(path: Path) -> bool:
    """Whether it is one, and can be told to be."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def read_small(path: Path, limit: int) -> bytes:
    """The first ``limit`` bytes of a file. Never waits for a pipe. Raises OSError, also for what is no file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        return os.read(fd, limit)
    finally:
        os.close(fd)


def doubt(file: ForeignFile) -> str:
    """Why it must not be used, whatever it contains; empty where nothing speaks against it. Blocks.

    Its bytes are hashed once and then used for hours: only who may change the daemon's files anyway may change it, or the
    owner of the tool's directory, whom the configuration has named with it.
    """
    try:
        root, real = real_path(file.root), real_path(file.place)
        link = real_path(file.place.parent) / file.place.name
        if not (real.is_relative_to(root) and link.is_relative_to(root)):
            return f"{file.place} is a link that leads out of {file.root}, to {real}"
        keepers = {0, os.geteuid(), root.stat().st_uid}
        for one in sorted({one for end in (real, link) for one in (end, *end.parents)}):
            if reason := _changeable(one, keepers) if one.is_relative_to(root) else _replaceable(one, keepers):
                return reason
    except OSError as problem:
        return f"{file.place} cannot be read: {problem.strerror or problem}"
    return "" if os.access(real, os.R_OK) else f"{file.place} cannot be read by {_user(os.geteuid())}"


def _changeable(path: Path, keepers: set[int]) -> str:
    found = path.lstat()
    if found.st_uid not in keepers:
        return f"{path} belongs to {_user(found.st_uid)}, who could change it while it is used"
    if stat.S_ISLNK(found.st_mode):
        return ""
    if found.st_mode & stat.S_IWOTH:
        return f"{path} could be changed by every user: chmod o-w {path}"
    if found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid, found.st_uid):
        return f"{path} could be changed by its group: chmod g-w {path}"
    return ""


def _replaceable(folder: Path, keepers: set[int]) -> str:
    """The same, of a folder above the tool's own: who may rename what is in it could put another in its place."""
    found = folder.lstat()
    if found.st_uid not in keepers:
        return f"{folder} belongs to {_user(found.st_uid)}, who could replace what is in it"
    free = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    return f"what is in {folder} could be replaced by every user: chmod o-w {folder}" if free else ""


def _is_own_group(gid: int, uid: int) -> bool:
    """Whether the group is one that nobody but its user is in, as many systems give each user."""
    if gid == 0:
        return True
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(uid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
