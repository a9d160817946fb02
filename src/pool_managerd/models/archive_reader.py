"""Reading a tar archive that anybody may have made: from its beginning to its end, in bounded memory, writing nothing.

Headers are parsed by the standard library, which reads as much for one as the archive says; here it is told how much it may.
"""

from __future__ import annotations

import gzip
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

BLOCK_BYTES = 1 << 20
MAX_HEADER_BYTES = 1 << 20
"""Of one member; long names and the like are part of it."""
MAX_MEMBERS = 1_000_000
MAX_RATIO, FREE_BYTES = 200, 1 << 30
"""An archive that becomes more than so many times as large is not read to its end, unless it is small all the same."""
_TELL_BYTES = 8 << 20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
Kind = Literal["file", "folder", "symlink", "hardlink", "other"]
_KINDS: dict[bytes, Kind] = {tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "symlink", tarfile.LNKTYPE: "hardlink"}


class ArchiveError(Exception):
    """It is no archive that is read here. The message says why, of ``it``."""


class ZstdError(ArchiveError):
    """It is compressed with what this version cannot read."""


class StoppedError(Exception):
    """Nobody wants it any more."""


@dataclass(frozen=True, slots=True)
class Member:
    """What an archive has in place ``number``, as its header says; ``target`` is where a link leads. ``size`` is in bytes."""

    number: int
    path: str
    kind: Kind
    size: int = 0
    target: str = ""


Content = Callable[[], Iterator[bytes]]
"""That of a member, in blocks; to be read before the next member is."""


@contextmanager
def opened(path: Path, stop: threading.Event, tell: Callable[[int], None]) -> Iterator[Iterator[tuple[Member, Content]]]:
    """The members of the archive at ``path`` in their order, with their content. ``tell`` hears how many of its own bytes were
    read. Blocks. Raises ArchiveError, StoppedError and OSError.
    """
    with path.open("rb", buffering=0) as raw:
        head = raw.read(4)
        raw.seek(0)
        if head == _ZSTD:
            raise ZstdError("it is compressed with zstd")
        size = max(1, path.stat().st_size)
        if head[:2] != _GZIP:
            yield _members(_Source(raw, raw.tell, size, stop, tell))
            return
        with gzip.GzipFile(fileobj=raw) as plain:
            yield _members(_Source(plain, raw.tell, max(FREE_BYTES, size * MAX_RATIO), stop, tell))


class _Source:
    """What ``tarfile`` reads headers from, and goes forward in: ``file`` of no more than ``most`` bytes. ``read`` says how far
    the archive itself was read.
    """

    def __init__(
        self, file: IO[bytes] | gzip.GzipFile, read: Callable[[], int], most: int, stop: threading.Event,
        tell: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._file, self._read, self._most, self._stop, self._tell = file, read, most, stop, tell
        self._at, self._told, self._budget = 0, 0, MAX_HEADER_BYTES
        self.last = b""
        """What was read last of a header: zeros where the archive ends, if anything."""

    def next_header(self) -> None:
        self._budget = MAX_HEADER_BYTES

    def read(self, count: int) -> bytes:
        """For headers."""
        self._budget -= count
        if count < 0 or self._budget < 0:
            raise ArchiveError("one of its headers is longer than a header is")
        self.last = b"".join(self.blocks(count))
        return self.last

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise ArchiveError("one of its headers leads back")
        if position > self._most:
            raise ArchiveError("it ends in the middle of a file")
        if self._at < position and isinstance(self._file, gzip.GzipFile):
            for _ in self.blocks(position - self._at):
                pass
        elif self._at < position:
            self._file.seek(position)
            self._at = position

    def blocks(self, count: int) -> Iterator[bytes]:
        """The next ``count`` bytes, fewer where it ends."""
        while count > 0:
            if self._stop.is_set():
                raise StoppedError
            try:
                block = self._file.read(min(count, BLOCK_BYTES))
            except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
                raise ArchiveError(f"its compressed bytes are wrong ({problem})") from problem
            if not block:
                return
            self._at += len(block)
            count -= len(block)
            if self._at > self._most:
                raise ArchiveError(f"it becomes more than {MAX_RATIO} times as large as it is")
            if (now := self._read()) - self._told >= _TELL_BYTES:
                self._told = now
                self._tell(now)
            yield block


def _members(source: _Source) -> Iterator[tuple[Member, Content]]:
    number = 0
    try:
        with tarfile.TarFile(fileobj=source, mode="r", errors="surrogateescape") as tar:  # type: ignore[arg-type]
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if header.size < 0 or number >= MAX_MEMBERS:
                    raise ArchiveError(f"it has {'a file of no size' if header.size < 0 else f'more than {MAX_MEMBERS} files'}")
                yield _member(header, number), _content(source, header)
                number += 1
                source.next_header()
        if any(source.last):  # of a header that is none the library says nothing
            raise ArchiveError("one of its headers is damaged")
    except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as problem:
        raise ArchiveError(f"it is no tar archive, or is damaged ({problem})") from problem


def _content(source: _Source, header: tarfile.TarInfo) -> Content:
    def content() -> Iterator[bytes]:
        source.seek(header.offset_data)
        left = header.size
        for block in source.blocks(left):
            left -= len(block)
            yield block
        if left:
            raise ArchiveError("it ends in the middle of a file")

    return content


def _member(header: tarfile.TarInfo, number: int) -> Member:
    """Sparse files count as what nobody needs: what they would take on the disk is not what they take here."""
    sparse: Any = header.sparse
    is_file = header.isreg() and sparse is None
    kind = "file" if is_file else _KINDS.get(header.type, "other")
    return Member(number, header.name, kind, header.size if is_file else 0, header.linkname)
