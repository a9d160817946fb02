"""What an ELF file asks the loader for. Reads a few bounded pieces, whatever the file says of itself."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_MAX_SEGMENTS, _MAX_DYNAMIC_BYTES, _MAX_TEXT_BYTES, _MAX_NEEDED = 128, 65536, 4096, 256


@dataclass(frozen=True, slots=True)
class Loads:
    """The loader, the names of the libraries, and the folders that are searched before and after LD_LIBRARY_PATH."""

    interpreter: str | None = None
    needed: tuple[str, ...] = ()
    rpath: tuple[str, ...] = ()
    runpath: tuple[str, ...] = ()


def loads_of(path: str) -> Loads | None:
    """What ``path`` needs to be loaded; None for what is no ELF file, or none that can be read. Never waits."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except (OSError, struct.error, ValueError, OverflowError):
        return None
    finally:
        os.close(fd)


def _read(fd: int) -> Loads | None:
    head = os.pread(fd, 64, 0)
    if len(head) < 6 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    order, wide = "<" if head[5] == 1 else ">", head[4] == 2
    at = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    segments = [_segment(os.pread(fd, size, at + number * size), order, wide) for number in range(min(count, _MAX_SEGMENTS))]
    interpreter = next((_text(fd, offset, filesz) for kind, offset, _, filesz in segments if kind == _PT_INTERP), None)
    entries = [
        entry
        for kind, offset, _, filesz in segments
        if kind == _PT_DYNAMIC
        for entry in _entries(os.pread(fd, min(filesz, _MAX_DYNAMIC_BYTES), offset), order, wide)
    ]
    table = next((_offset(value, segments) for tag, value in entries if tag == _DT_STRTAB), None)
    if table is None:
        return Loads(interpreter)
    texts = {tag: [_text(fd, table + value) for found, value in entries if found == tag][:_MAX_NEEDED]
             for tag in (_DT_NEEDED, _DT_RPATH, _DT_RUNPATH)}  # fmt: skip
    folders = {tag: tuple(part for text in texts[tag] for part in text.split(":") if part) for tag in (_DT_RPATH, _DT_RUNPATH)}
    return Loads(interpreter, tuple(texts[_DT_NEEDED]), () if folders[_DT_RUNPATH] else folders[_DT_RPATH], folders[_DT_RUNPATH])


def _segment(raw: bytes, order: str, wide: bool) -> tuple[int, int, int, int]:
    """Kind, offset, address and size in the file."""
    if wide:
        kind, _, offset, address, _, size = struct.unpack_from(order + "IIQQQQ", raw)
    else:
        kind, offset, address, _, size = struct.unpack_from(order + "IIIII", raw)
    return kind, offset, address, size


def _entries(raw: bytes, order: str, wide: bool) -> Iterator[tuple[int, int]]:
    pair = struct.Struct(order + ("QQ" if wide else "II"))
    for at in range(0, len(raw) - pair.size + 1, pair.size):
        tag, value = pair.unpack_from(raw, at)
        if tag == 0:
            return
        yield tag, value


def _offset(address: int, segments: list[tuple[int, int, int, int]]) -> int | None:
    for kind, offset, start, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    return None


def _text(fd: int, at: int, size: int = _MAX_TEXT_BYTES) -> str:
    return os.fsdecode(os.pread(fd, min(size, _MAX_TEXT_BYTES), at).split(b"\0", 1)[0])
