"""The saved caches of engines' slots: ``cache/{pool_id}/slots`` in the runtime directory.

Engines write there, as their own users, and could put anything in a file's place: no link is followed, and only a regular file
of the directory's own user is taken for one.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from pool_managerd.config import is_pool_id
from pool_managerd.core.slot_cache import SlotFile, directory_of
from pool_managerd.errors import NodeError
from pool_managerd.runtime.directory import ConfinedDirectory, cannot
from pool_managerd.runtime.removal import remove_tree


class SlotFiles:
    """Of all pools under one runtime directory. Everything blocks. What the disk forbids is raised as NodeError."""

    def __init__(self, runtime_dir: Path) -> None:
        self._root = Path(os.path.abspath(runtime_dir))

    def make(self, pool_id: str, uid: int, gid: int) -> None:
        """The pool's directory, mode 0700, owned by the user its engine runs as; what else has its place is removed."""
        path = self._path(pool_id)
        with ConfinedDirectory(path.parent, 0o700, owned=False).opened() as parent:
            try:
                with suppress(FileNotFoundError):
                    info = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
                    if stat.S_ISDIR(info.st_mode) and (info.st_uid, stat.S_IMODE(info.st_mode)) == (uid, 0o700):
                        return
                    remove_tree(parent, path.name)
                os.mkdir(path.name, 0o700, dir_fd=parent)
                fd = os.open(path.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
                try:
                    if os.fstat(fd).st_uid != os.geteuid():
                        raise PermissionError("something else was put in its place")
                    os.fchown(fd, uid, gid)
                finally:
                    os.close(fd)
            except OSError as error:
                raise cannot("make", path, error) from error

    def all(self) -> list[SlotFile]:
        """Every file of every pool, whatever it is called."""
        try:
            pools = [name for name in os.listdir(self._root / "cache") if is_pool_id(name)]
        except OSError:  # nothing was launched here yet
            return []
        return [file for pool_id in sorted(pools) for file in self.of(pool_id)]

    def of(self, pool_id: str) -> list[SlotFile]:
        """The pool's own; none where it has no directory."""
        path, found = self._path(pool_id), list[SlotFile]()
        if not path.is_dir():
            return found
        with ConfinedDirectory(path, 0o700, owned=False).opened() as fd:
            for name in sorted(os.listdir(fd)):
                with suppress(OSError):
                    info = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    found.append(SlotFile(pool_id, name, info.st_size, info.st_mtime))
        return found

    def complete(self, pool_id: str, name: str, final: str, size_bytes: int) -> None:
        """Give a file that was just written its name, and close it to everybody else. Raises NodeError, also when it is not
        ``size_bytes`` long.
        """
        path = self._path(pool_id)
        with ConfinedDirectory(path, 0o700, owned=False).opened() as directory:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
                try:
                    info = os.fstat(fd)
                    if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1 or info.st_uid != os.fstat(directory).st_uid:
                        raise PermissionError("it is no file of the engine's own")
                    if info.st_size != size_bytes:
                        raise OSError(f"it has {info.st_size} bytes, and the engine said {size_bytes}")
                    os.fchmod(fd, 0o600)
                finally:
                    os.close(fd)
                os.rename(name, final, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError as error:
                raise cannot("keep", path / name, error) from error

    def head(self, pool_id: str, name: str, count: int) -> bytes:
        """The first bytes of a file; b"" where there is none."""
        return ConfinedDirectory(self._path(pool_id), 0o700, owned=False).read_part(name, 0, count)

    def remove(self, file: SlotFile) -> None:
        """Remove it, if it is there still. Raises NodeError with the first path that stays, when all else of it is gone."""
        path, stays = self._path(file.pool_id), list[tuple[str, OSError]]()
        if path.is_dir():
            with ConfinedDirectory(path, 0o700, owned=False).opened() as fd:
                remove_tree(fd, file.name, lambda at, error: stays.append((at, error)))
        if stays:
            at, error = stays[0]
            raise cannot("remove", path / at, error) from error

    def free_bytes(self) -> int:
        """On the disk, for whoever is not root."""
        try:
            found = os.statvfs(self._root)
        except OSError as error:
            raise cannot("use", self._root, error) from error
        return found.f_bavail * found.f_frsize

    def _path(self, pool_id: str) -> Path:
        if not is_pool_id(pool_id):
            raise NodeError(f"cannot use {pool_id[:80]!r} in a file name")
        return Path(directory_of(str(self._root), pool_id))
