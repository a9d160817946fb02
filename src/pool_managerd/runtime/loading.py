"""Whether the loader will find, as the engine's user, the libraries that a program names.

As ldd(1) would say it, without running anything. What is found nowhere here is no finding: the loader's own cache and
settings may know it. Nothing is looked at that the user does not reach, so that root's eyes tell nobody anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pool_managerd.runtime.elf import Loads, loads_of
from pool_managerd.runtime.reach import ENTER, READ, Need, Obstacle, User, first_obstacle

_CACHE = Path("/etc/ld.so.cache")
_MAX_CACHE_BYTES = 8 << 20
_MAX_OBJECTS = 256
_MAX_FOLDERS = 64
_DEFAULTS = ("/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib",
             *(f"{top}/{os.uname().machine}-linux-gnu" for top in ("/lib", "/usr/lib")))  # fmt: skip


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
