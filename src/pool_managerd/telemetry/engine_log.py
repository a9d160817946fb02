"""An engine's log, read from its file in small pieces: what a slow reader does not take costs no memory.

Blocking: each call is for a thread. No link is followed; of the file only what had been written when it was asked for.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.core.narration import printable

CHUNK_BYTES = 64 * 1024
MAX_TAIL_BYTES = 16 << 20
_ALL_LINES = 1 << 40


Place = tuple[int, int]
"""A file by its inode, and an offset in it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """An open file of the log, from ``start`` up to ``end``."""

    fd: int
    inode: int
    start: int
    end: int


class EngineLog:
    """Lines are shown through ``redact``. ``past`` comes first; ``appended`` goes on where it ended.

    ``place`` is behind what was given last: another one that begins there goes on without a gap or a repetition.
    """

    def __init__(self, path: Path, redact: Callable[[str], str]) -> None:
        self._path = path
        self._redact = redact
        self._inode = self._offset = 0
        self._rest = b""
        self.place: Place = (0, 0)

    def past(self, lines: int, begin: Place | None = None, end: Place | None = None) -> Generator[bytes]:
        """The last ``lines`` lines as chunks, control characters escaped; those of the part before, if need be.

        ``begin`` and ``end`` are where to read from and to; one that is no more in the log bounds nothing.
        """
        with ExitStack() as stack:
            parts = self._parts(stack, lines, begin, end)
            rest = b""
            for part in parts:
                at = part.start
                while at < part.end and (block := os.pread(part.fd, min(CHUNK_BYTES, part.end - at), at)):
                    at += len(block)
                    whole, rest = _lines(rest + block)
                    if whole:
                        self.place = (part.inode, max(part.start, at - len(rest)))
                        yield self._shown(whole)
            self.place = (self._inode, self._offset)
            if rest:
                yield self._shown(rest)

    def behind(self, place: Place) -> Generator[bytes]:
        """All that is behind ``place``, and all there is where that is no more in the log.

        A line that it lies in is given from its start: half a secret would not be known as one.
        """
        with ExitStack() as stack:
            for fd in (self._open(stack, path) for path in self._names()):
                if fd is not None and (found := os.fstat(fd)).st_ino == place[0]:
                    place = (found.st_ino, _start_of_line(fd, place[1]) if place[1] <= found.st_size else 0)
        yield from self.past(_ALL_LINES, place)

    def appended(self) -> bytes:
        """What was appended since, raw, up to the end of a line; a rotated or truncated log is read from its start."""
        with ExitStack() as stack:
            fd = self._open(stack, self._path)
            if fd is None:
                return b""
            found = os.fstat(fd)
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
            block = os.pread(fd, CHUNK_BYTES, self._offset)
        self._offset += len(block)
        whole, self._rest = _lines(self._rest + block)
        self.place = (self._inode, max(0, self._offset - len(self._rest)))
        return self._redact(whole.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def _parts(self, stack: ExitStack, lines: int, begin: Place | None, end: Place | None) -> list[_Part]:
        """Where the lines are, oldest first. The newest part's end is where ``appended`` goes on."""
        parts: list[_Part] = []
        budget = MAX_TAIL_BYTES
        files = [(path, fd, os.fstat(fd)) for path in self._names() if (fd := self._open(stack, path)) is not None]
        ends_in = next((found.st_ino for _, _, found in files if end is not None and found.st_ino == end[0]), None)
        for path, fd, found in files:
            if path == self._path:
                self._inode, self._offset = found.st_ino, found.st_size
            stop = found.st_size
            if end is not None and ends_in is not None:
                stop, ends_in = (min(stop, end[1]), None) if found.st_ino == ends_in else (0, ends_in)
            first = begin[1] if begin is not None and found.st_ino == begin[0] else None
            start, missing = _start_of_last(fd, stop, lines, budget)
            start = max(start, min(first or 0, stop))
            parts.insert(0, _Part(fd, found.st_ino, start, stop))
            lines, budget = missing, budget - (stop - start)
            if first is not None or lines <= 0 or budget <= 0:
                break
        return parts

    def _names(self) -> tuple[Path, Path]:
        """The newest part, and the one before."""
        return self._path, self._path.with_name(self._path.name + ".1")

    def _open(self, stack: ExitStack, path: Path) -> int | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        stack.callback(os.close, fd)
        return fd if stat.S_ISREG(os.fstat(fd).st_mode) else None

    def _shown(self, data: bytes) -> bytes:
        lines = self._redact(data.decode("utf-8", "replace")).split("\n")
        return "".join(f"{printable(line)}\n" for line in lines if line.strip()).encode()


def _lines(data: bytes) -> tuple[bytes, bytes]:
    """Whole lines, so that no secret is cut in two, and the rest; a line that does not end is cut all the same."""
    at = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    if at == 0 and len(data) > CHUNK_BYTES:
        at = len(data)
    return data[:at], data[at:]


def _start_of_line(fd: int, at: int) -> int:
    """Where the line begins that ``at`` lies in; ``at`` where that is too far before."""
    begin = max(0, at - CHUNK_BYTES)
    block = os.pread(fd, at - begin, begin)
    found = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1
    return begin + found if found or begin == 0 else at


def _start_of_last(fd: int, size: int, lines: int, budget: int) -> tuple[int, int]:
    """The offset where the last ``lines`` lines begin, and how many are missing; at most ``budget`` bytes from the end."""
    if lines <= 0:
        return size, 0
    at, floor = size, max(0, size - budget)
    wanted = lines
    if size and os.pread(fd, 1, size - 1) == b"\n":
        wanted += 1  # the last line's own end
    while at > floor:
        begin = max(floor, at - CHUNK_BYTES)
        block = os.pread(fd, at - begin, begin)
        count = block.count(b"\n")
        if count >= wanted:
            found = len(block)
            for _ in range(wanted):
                found = block.rfind(b"\n", 0, found)
            return begin + found + 1, 0
        wanted -= count
        at = begin
    return at, wanted - 1 if at == 0 else 0
