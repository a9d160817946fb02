"""One directory of ours, and file operations that cannot leave it: no link is followed, every write is a rename."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pool_managerd.errors import NodeError
from pool_managerd.runtime.wire import write_atomically

MAX_READ_BYTES = 64 * 1024
CODE = "RUNTIME_DIR_UNUSABLE"


class ConfinedDirectory:
    """Files by plain name in ``path``, which is created with ``mode`` when it is missing.

    It must belong to the daemon's user; where it does, permissions in ``closed`` are taken away, which ``repaired``
    tells in a sentence. ``owned`` False is for the one that belongs to an engine. ``may_be_link`` is for the one
    that the operator names. What forbids an operation is raised as NodeError with the path and the remedy.
    """

    def __init__(self, path: Path, mode: int, *, closed: int = 0o022, owned: bool = True, may_be_link: bool = False) -> None:
        self.path = path
        self.repaired: list[str] = []
        self._mode = mode
        self._closed = closed
        self._owned = owned
        self._flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if may_be_link else os.O_NOFOLLOW)

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A descriptor of the directory. Raises NodeError."""
        try:
            try:
                fd = os.open(self.path, self._flags)
            except FileNotFoundError:
                make_directory(self.path, self._mode)
                fd = os.open(self.path, self._flags)
        except OSError as error:
            raise cannot("use", self.path, error) from error
        try:
            if self._owned:
                self._keep_ours(fd)
            yield fd
        finally:
            os.close(fd)

    def claim(self) -> list[str]:
        """Make it, and what had to be put right since it was last asked, a sentence each. Raises NodeError."""
        with self.opened():
            repaired, self.repaired = self.repaired, []
        return repaired

    def _keep_ours(self, fd: int) -> None:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise NodeError(
                f"cannot use {self.path}: it belongs to uid {info.st_uid}, who could forge what is in it",
                code=CODE,
                hint=f"chown -R {os.geteuid()} '{self.path}', or choose another runtime directory",
                retriable=False,
            )
        mode = stat.S_IMODE(info.st_mode)
        if mode & self._closed:
            try:
                os.fchmod(fd, mode & ~self._closed)
            except OSError as error:
                if error.errno == errno.EROFS:  # then nobody can write to it
                    return
                raise cannot("close to other users", self.path, error) from error
            self.repaired.append(
                f"{self.path} could be written by other users (mode {mode:04o}); it has mode {mode & ~self._closed:04o} now"
            )

    def names(self, suffix: str) -> list[str]:
        """The names that end so, sorted. Raises NodeError."""
        with self.opened() as fd:
            return sorted(name for name in os.listdir(fd) if name.endswith(suffix))

    def write(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Replace the file in one step. Raises NodeError, also when a link or a device has its place."""
        path = self.path / name
        with self.opened() as fd:
            try:
                if _is_planted(fd, name):
                    raise NodeError(
                        f"cannot write {path}: it is a link or no regular file, and nothing is written through it",
                        code=CODE,
                        hint=f"find out who put it there, then remove it: rm {path}",
                        retriable=False,
                    )
                write_atomically(fd, name, data, mode)
            except OSError as error:
                raise cannot("write", path, error) from error

    def remove(self, name: str) -> None:
        """Remove the file, or the link that has its place, if there is one. Raises NodeError."""
        with self.opened() as fd:
            try:
                os.unlink(name, dir_fd=fd)
            except FileNotFoundError:
                return
            except OSError as error:
                raise cannot("remove", self.path / name, error) from error

    def read(self, name: str, max_bytes: int, *, ours: bool = False) -> bytes:
        """The content of a regular file. Raises OSError, ValueError for a longer one, NodeError.

        ``ours``: ValueError too for one that another user owns or can write.
        """
        with self.opened() as directory, open_regular(name, os.O_NOFOLLOW, directory) as fd:
            info = os.fstat(fd)
            if ours and (info.st_uid != os.geteuid() or info.st_mode & 0o022 or info.st_nlink != 1):
                raise ValueError("another user could have written it")
            data = _read_fully(fd, max_bytes + 1)
        if len(data) > max_bytes:
            raise ValueError(f"it is longer than {max_bytes} bytes")
        return data

    def identities(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """(inode, size in bytes) of each that is a regular file, by name."""
        found: dict[str, tuple[int, int]] = {}
        with suppress(OSError, NodeError), self.opened() as directory:
            for name in names:
                with suppress(OSError):
                    info = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISREG(info.st_mode):
                        found[name] = (info.st_ino, info.st_size)
        return found

    def read_part(self, name: str, start: int, count: int) -> bytes:
        """``count`` bytes from ``start`` (negative: from the end), or as many as there are; b"" without a regular file."""
        try:
            with self.opened() as directory, open_regular(name, os.O_NOFOLLOW, directory) as fd:
                os.lseek(fd, start if start >= 0 else max(0, os.fstat(fd).st_size + start), os.SEEK_SET)
                return _read_fully(fd, count)
        except (OSError, NodeError):
            return b""

    def read_object(self, name: str, max_bytes: int = MAX_READ_BYTES, *, ours: bool = False) -> dict[str, Any]:
        """The JSON object in the file, as ``read``. Raises OSError, ValueError with what is wrong with it, NodeError."""
        try:
            content = json.loads(self.read(name, max_bytes, ours=ours))
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content


def make_directory(path: Path, mode: int) -> None:
    """Make ``path`` with ``mode`` and its missing parents with 0755, whatever the umask. Raises OSError."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            continue
        os.chmod(directory, mode if directory == path else 0o755)


def cannot(what: str, path: Path, error: OSError) -> NodeError:
    """A NodeError for an operation on ``path`` that the disk or the permissions refused."""
    return NodeError(
        f"cannot {what} {shown(path)}: {error.strerror or error}",
        code=CODE,
        hint="check that the runtime directory is on a writable disk with free space and belongs to the daemon's user",
    )


def shown(path: Path) -> str:
    """An engine may have given it a name that is no text."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def open_regular(path: str, flags: int = 0, directory: int | None = None) -> Iterator[int]:
    """A descriptor to read the regular file at ``path``, from the descriptor ``directory`` on. Never waits. Raises OSError."""
    # O_NONBLOCK: a planted FIFO must not hang the open.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        yield fd
    finally:
        os.close(fd)


def _read_fully(fd: int, count: int) -> bytes:
    chunks: list[bytes] = []
    while count > 0 and (chunk := os.read(fd, min(count, 65536))):
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


def _is_planted(directory: int, name: str) -> bool:
    try:
        return not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
