"""The directories that each pool has in ``work/`` and ``cache/`` of the runtime directory: measured, and deleted.

Engines fill them as they like. No link is followed, and nothing outside is touched, whatever lies in their place.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from pool_managerd.config import is_pool_id
from pool_managerd.core.narration import size
from pool_managerd.core.purge import CACHE, WORK, Freed
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.runtime.directory import CODE, ConfinedDirectory, cannot, shown
from pool_managerd.runtime.removal import Failed, measure_tree, remove_tree, removed_from, removed_name


class PoolPlaces:
    """Under one runtime directory. What the disk forbids is raised as NodeError."""

    def __init__(self, runtime_dir: Path) -> None:
        root = Path(os.path.abspath(runtime_dir))
        self._roots = {name: ConfinedDirectory(root / name, 0o755) for name in (WORK, CACHE)}

    def measured(self, pool_id: str, places: Iterable[str]) -> list[Freed]:
        """What ``purge`` would free. Blocks, for as long as there is something to look at."""
        found = list[Freed]()
        for root in self._of(pool_id, places):
            with root.opened() as fd:
                own = [pool_id] if _owner(fd, pool_id) is not None else []
                found += [Freed(str(root.path / name), measure_tree(fd, name)) for name in _left_of(fd, pool_id) + own]
        return found

    def put_away(self, pool_id: str, places: Collection[str]) -> dict[str, str]:
        """Take their names from them, at once: a launch from now on gets new ones. By path what they are called now.

        What an earlier purge could not delete has such a name already, and is among them.
        Where a pool keeps its cache, its working directory is empty afterwards, and says which user both are of.
        """
        away = dict[str, str]()
        for root in self._of(pool_id, places):
            with root.opened() as fd:
                away |= {str(root.path / name): name for name in _left_of(fd, pool_id)}
                if (owner := _owner(fd, pool_id)) is None:
                    continue
                name = removed_name(pool_id)  # a daemon that dies now leaves it to the next one's sweep
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
        """Delete what ``put_away`` has. Blocks. Raises NodeError with the first path that stays, when all else is deleted."""
        found, stays = list[Freed](), list[str]()
        for path, name in away.items():
            root, failed = self._roots[Path(path).parent.name], list[tuple[str, str]]()
            with root.opened() as fd:
                found.append(Freed(path, remove_tree(fd, name, _noted_in(failed))))
                if not failed and _owner(fd, name) is not None:
                    failed.append((name, "something was put into it meanwhile"))
            stays += [f"cannot delete all of {path}: {shown(root.path / at)} stays: {why}" for at, why in failed[:1]]
        if stays:
            raise NodeError(
                f"{stays[0]}; what can be deleted is, {size(sum(one.bytes for one in found))} freed", code=CODE,
                hint="see what keeps it there (a read-only mount, chattr +i), and purge again: what is left goes then",
            )  # fmt: skip
        return found

    def _of(self, pool_id: str, places: Iterable[str]) -> list[ConfinedDirectory]:
        if not is_pool_id(pool_id):
            raise SpecError(f"cannot use {pool_id[:80]!r} in a file name", code="INVALID_POOL_ID")
        return [self._roots[place] for place in places]


def swept(root: ConfinedDirectory) -> list[str]:
    """Delete what was put away of any pool; of each thing that stays the first path, and why. Blocks. Raises NodeError."""
    told = list[str]()
    with root.opened() as fd:
        for name in os.listdir(fd):
            failed = list[tuple[str, str]]()
            if removed_from(name) is not None:
                remove_tree(fd, name, _noted_in(failed))
            told += [f"cannot delete {shown(root.path / at)}: {why}" for at, why in failed[:1]]
    return told


def _owner(directory: int, name: str) -> tuple[int, int] | None:
    """Uid and gid; None where there is nothing of that name."""
    with suppress(FileNotFoundError):
        info = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return info.st_uid, info.st_gid
    return None


def _left_of(directory: int, pool_id: str) -> list[str]:
    """What was put away before and is there still."""
    return sorted(name for name in os.listdir(directory) if removed_from(name) == pool_id)


def _noted_in(failed: list[tuple[str, str]]) -> Failed:
    return lambda at, error: failed.append((at, error.strerror or str(error)))
