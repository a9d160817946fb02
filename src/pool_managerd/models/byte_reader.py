"""Reading a file's header forward in small blocks, every step bounded: the file may be made to harm its reader."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from pool_managerd.errors import SpecError

BLOCK_BYTES = 256 * 1024

Refuse = Callable[[str], SpecError]
"""Makes the error of a reason, naming the file."""


def identity(info: os.stat_result) -> tuple[int, ...]:
    """Equal as long as it is the same file: whoever replaces one can set its mtime, but not its ctime."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


@contextmanager
def regular_file(path: str, refuse: Refuse) -> Iterator[int]:
    """A descriptor of the regular file ``path``, never waiting for a pipe. Raises what ``refuse`` makes of the reason, also of
    an OSError within.

    Links are followed: model caches are made of them, and nothing but numbers is taken out of what they lead to.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise refuse(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise refuse("it is not a file")
        yield fd
    except OSError as error:
        raise refuse(f"it cannot be read ({error.strerror})") from error
    finally:
        os.close(fd)


class Source(Protocol):
    """Bytes by their place: a file, or what is known of one that lies elsewhere."""

    @property
    def size(self) -> int:
        """Of the whole."""
        ...

    def read(self, at: int, least: int, most: int) -> bytes:
        """Up to ``most`` bytes from ``at`` on, and not fewer than ``least`` where the whole has as many."""
        ...


class FileSource:
    """An open regular file. The caller closes ``fd``."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        self._fd = fd

    def read(self, at: int, least: int, most: int) -> bytes:
        return os.pread(self._fd, most, at)


class ByteReader:
    """Takes little-endian values from the start of ``source``. It never reads past ``limit`` bytes, nor keeps more than a block.

    Raises what ``refuse`` makes of the reason, and what the source raises.
    """

    def __init__(self, source: Source, limit: int, refuse: Refuse) -> None:
        self.size = source.size
        self._source, self._limit, self._refuse = source, limit, refuse
        self._block, self._block_at, self._next = b"", 0, 0

    @property
    def position(self) -> int:
        return self._block_at + self._next

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes, at most a block."""
        self._need(count)
        start = self._next
        self._next = start + count
        return self._block[start : start + count]

    def unpack(self, form: struct.Struct) -> int:
        """The next number."""
        self._need(form.size)
        value: int = form.unpack_from(self._block, self._next)[0]
        self._next += form.size
        return value

    def skip(self, count: int) -> None:
        """Go on ``count`` bytes without reading them."""
        self._check(count)
        position = self.position + count
        if position <= self._block_at + len(self._block):
            self._next += count
        else:
            self._block, self._block_at, self._next = b"", position, 0

    def skip_strings(self, count: int, form: struct.Struct) -> None:
        """Go on over ``count`` strings, each behind its length."""
        width = form.size
        while count:
            self._need(width)
            block, at, end = self._block, self._next, len(self._block)
            unpack = form.unpack_from
            while count and at + width <= end:
                after = at + width + unpack(block, at)[0]
                if after > end:
                    break
                at = after
                count -= 1
            self._next = at
            if count:
                self.skip(self.unpack(form))
                count -= 1

    def _need(self, count: int) -> None:
        if self._next + count <= len(self._block):
            return
        self._check(count)
        if count > BLOCK_BYTES:
            raise self._refuse(f"a part of its header is longer than {BLOCK_BYTES} bytes")
        at = self.position
        block = self._source.read(at, count, min(BLOCK_BYTES, self._limit - at))
        if len(block) < count:
            raise self._refuse("it ends within its header: the download is not complete")
        self._block, self._block_at, self._next = block, at, 0

    def _check(self, count: int) -> None:
        end = self.position + count
        if end > self.size:
            raise self._refuse("it ends within its header: the download is not complete, or a length in it is wrong")
        if end > self._limit:
            raise self._refuse(f"its header is longer than {self._limit} bytes")
