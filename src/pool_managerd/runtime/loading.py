"""Whether the loader will find, as the engine's user, the libraries that a program names.

As ldd(1) would say it, without running anything. What is found nowhere here is no finding: the loader's own cache and
settings may know it. Nothing is looked at that the user does not reach, so that root's eyes tell nobody anything. Of an
ELF file a few bounded pieces are read, whatever the file says of itself.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pool_managerd.runtime.directory import open_regular
from pool_managerd.runtime.reach import ENTER, READ, Need, Obstacle, User, first_obstacle

_CACHE = Path("/etc/ld.so.cache")
_MAX_CACHE_BYTES = 8 << 20
_MAX_OBJECTS = 256
_MAX_FOLDERS = 64
_DEFAULTS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib",
             *(f"{top}/{os.uname().machine}-linux-gnu" for top in ("/lib", "/usr/lib")))  # fmt: skip
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


def loader_obstacle(program: str, user: User, library_path: str) -> Obstacle | None:
    """What keeps ``user`` from the loader or a library of ``program``; None when nothing is known to.

    ``library_path`` is the LD_LIBRARY_PATH that the engine will have.
    """
    given = tuple(library_path.split(":")) if library_path else ()
    cached = _cached_names()
    pending, seen = [program], {program}
    while pending and len(seen) <= _MAX_OBJECTS:
        path = os.path.realpath(pending.pop())
        loads = loads_of(path)
        if loads is None:
            continue
        if loads.interpreter and (obstacle := first_obstacle([Need(loads.interpreter, ENTER)], user)) is not None:
            return obstacle
        for name in loads.needed:
            found, obstacle = _find(name, _folders(loads, path, given), user)
            if found is None and obstacle is not None and os.fsencode(name) not in cached:
                return obstacle
            if found is not None and found not in seen:
                seen.add(found)
                pending.append(found)
    return None


def _folders(loads: Loads, path: str, given: tuple[str, ...]) -> Iterable[str]:
    origin = os.path.dirname(path)
    named = (*loads.rpath, *given, *loads.runpath)
    own = (folder.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for folder in named)
    return (*[folder for folder in own if folder.startswith("/") and "$" not in folder][:_MAX_FOLDERS], *_DEFAULTS)


def _find(name: str, folders: Iterable[str], user: User) -> tuple[str | None, Obstacle | None]:
    """The first file of that name that the user reaches, and the first place where it was turned away."""
    turned_away = None
    for candidate in [name] if "/" in name else [os.path.join(folder, name) for folder in folders]:
        obstacle = first_obstacle([Need(candidate, READ)], user)
        if obstacle is None and os.path.isfile(candidate):
            return candidate, None
        turned_away = turned_away or obstacle
    return None, turned_away


def _cached_names() -> frozenset[bytes]:
    """The names in the loader's cache: a list of strings at its end."""
    try:
        with _CACHE.open("rb") as file:
            return frozenset(file.read(_MAX_CACHE_BYTES).split(b"\0"))
    except OSError:
        return frozenset()


def loads_of(path: str) -> Loads | None:
    """What ``path`` needs to be loaded; None for what is no ELF file, or none that can be read. Never waits."""
    try:
        with open_regular(path) as fd:
            return _read(fd)
    except (OSError, struct.error, ValueError, OverflowError):
        return None


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
