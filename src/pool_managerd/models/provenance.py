"""Where every file of the cache has come from: a line of JSON each, appended and never changed (SPEC §6.3).

A crash in the middle of a line costs that line alone: the next one that is written cuts it off. Two files at most are kept, the
older one complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pool_managerd.models.note_file import sync_folder, turn

MAX_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Origin:
    """One file. ``path`` is below the cache; ``ref`` and ``source``, its address, are without what gives access; ``revision`` is
    the hub's commit, ``etag`` what the server called this version.
    """

    ts_ms: int
    ref: str
    path: str
    size_bytes: int
    digest: str
    source: str
    revision: str = ""
    etag: str = ""


class Provenance:
    """Kept in ``folder``. Everything blocks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "provenance.jsonl"
        self._older = folder / "provenance.1.jsonl"

    def append(self, origin: Origin) -> None:
        """On the disk when this returns. Raises OSError."""
        line = json.dumps(asdict(origin), ensure_ascii=False).encode()[: MAX_LINE_BYTES - 1] + b"\n"
        with turn(self.path.with_name("provenance.lock")):
            if self.path.exists() and self.path.stat().st_size + len(line) > MAX_BYTES:
                self.path.replace(self._older)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                end = _whole_bytes(fd)
                os.ftruncate(fd, end)
                while line:
                    written = os.pwrite(fd, line, end)
                    line, end = line[written:], end + written
                os.fsync(fd)
            finally:
                os.close(fd)
            sync_folder(self.path.parent)

    def all(self) -> Iterator[Origin]:
        """Oldest first; what is no such line is passed over."""
        for path in (self._older, self.path):
            try:
                with path.open("rb") as file:
                    yield from filter(None, map(_read, file))
            except OSError:
                continue


def _whole_bytes(fd: int) -> int:
    """How much of it are whole lines: the last one may be torn."""
    end = os.fstat(fd).st_size
    tail = os.pread(fd, MAX_LINE_BYTES, max(0, end - MAX_LINE_BYTES))
    return end - len(tail) + tail.rfind(b"\n") + 1


def _read(line: bytes) -> Origin | None:
    try:
        told: dict[str, Any] = json.loads(line)
        return Origin(**told)
    except (ValueError, TypeError):
        return None
