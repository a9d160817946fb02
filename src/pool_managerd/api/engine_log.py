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


@dataclass(frozen=True, slots=True)
class _Part:
    """An open file of the log, from ``start`` up to ``end``."""

    fd: int
    start: int
    end: int


class EngineLog:
    """Lines are shown through ``redact``. ``past`` comes first; ``appended`` goes on where it ended."""

    def __init__(self, path: Path, redact: Callable[[str], str]) -> None:
        self._path = path
        self._redact = redact
        self._inode = self._offset = 0
        self._rest = b""

    def past(self, lines: int) -> Generator[bytes]:
        """The last ``lines`` lines as chunks, control characters escaped; those of the part before, if need be."""
        with ExitStack() as stack:
            parts = self._parts(stack, lines)
            rest = b""
            for part in parts:
                at = part.start
                while at < part.end and (block := os.pread(part.fd, min(CHUNK_BYTES, part.end - at), at)):
                    at += len(block)
                    whole, rest = _lines(rest + block)
                    if whole:
                        yield self._shown(whole)
            if rest:
                yield self._shown(rest)

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
        return self._redact(whole.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")

    def _parts(self, stack: ExitStack, lines: int) -> list[_Part]:
        """Where the lines are, oldest first. The newest part's end is where ``appended`` goes on."""
        parts: list[_Part] = []
        budget = MAX_TAIL_BYTES
        for path in (self._path, self._path.with_name(self._path.name + ".1")):
            fd = self._open(stack, path)
            if fd is None:
                continue
            found = os.fstat(fd)
            if path == self._path:
                self._inode, self._offset = found.st_ino, found.st_size
            start, missing = _start_of_last(fd, found.st_size, lines, budget)
            parts.insert(0, _Part(fd, start, found.st_size))
            lines, budget = missing, budget - (found.st_size - start)
            if lines <= 0 or budget <= 0:
                break
        return parts

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
