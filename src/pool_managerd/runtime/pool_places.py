"""The directories that each pool has in ``work/`` and ``cache/`` of the runtime directory: measured, and deleted.

Engines fill them as they like. No link is followed, and nothing outside is touched, whatever lies in their place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from pool_managerd.config import is_pool_id
from pool_managerd.core.purge import CACHE, WORK, Freed
from pool_managerd.errors import SpecError
from pool_managerd.runtime.directory import ConfinedDirectory, cannot
from pool_managerd.runtime.removal import measure_tree, remove_tree


class PoolPlaces:
    """Under one runtime directory. What the disk forbids is raised as NodeError."""

    def __init__(self, runtime_dir: Path) -> None:
        root = Path(os.path.abspath(runtime_dir))
        self._roots = {name: ConfinedDirectory(root / name, 0o755) for name in (WORK, CACHE)}

    def measured(self, pool_id: str, places: Iterable[str]) -> list[Freed]:
        """What ``purge`` would free. Blocks, for as long as there is something to look at."""
        found = []
        for root in self._of(pool_id, places):
            with root.opened() as fd:
                if _owner(fd, pool_id) is not None:
                    found.append(Freed(str(root.path / pool_id), measure_tree(fd, pool_id)))
        return found

    def put_away(self, pool_id: str, places: Collection[str]) -> dict[str, str]:
        """Take their names from them, at once: a launch from now on gets new ones. By path what they are called now.

        Where a pool keeps its cache, its working directory is empty afterwards, and says which user both are of.
        """
        away = {}
        for root in self._of(pool_id, places):
            with root.opened() as fd:
                if (owner := _owner(fd, pool_id)) is None:
                    continue
                name = f".{pool_id}.{time.monotonic_ns()}.removed"  # a daemon that dies now leaves it to the next one's sweep
                try:
                    os.rename(pool_id, name, src_dir_fd=fd, dst_dir_fd=fd)
                    if CACHE not in places:
                        os.mkdir(pool_id, 0o700, dir_fd=fd)
                        os.chown(pool_id, *owner, dir_fd=fd, follow_symlinks=False)
                except OSError as error:
                    raise cannot("take away", root.path / pool_id, error) from error
                away[str(root.path / pool_id)] = name
        return away

    def remove(self, away: dict[str, str]) -> list[Freed]:
        """Delete what ``put_away`` has. Blocks."""
        found = []
        for path, name in away.items():
            root = self._roots[Path(path).parent.name]
            with root.opened() as fd:
                found.append(Freed(path, remove_tree(fd, name)))
                if _owner(fd, name) is not None:
                    raise cannot("delete", root.path / name, OSError(0, "some of it could not be deleted"))
        return found

    def _of(self, pool_id: str, places: Iterable[str]) -> list[ConfinedDirectory]:
        if not is_pool_id(pool_id):
            raise SpecError(f"cannot use {pool_id[:80]!r} in a file name", code="INVALID_POOL_ID")
        return [self._roots[place] for place in places]


def _owner(directory: int, name: str) -> tuple[int, int] | None:
    """Uid and gid; None where there is nothing of that name."""
    with suppress(FileNotFoundError):
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return info.st_uid, info.st_gid
    return None
