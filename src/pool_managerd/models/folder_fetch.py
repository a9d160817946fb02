"""A model that is a folder: its files fetched beside each other, each verified, and the folder there when all of them are."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import SpecError
from pool_managerd.models.at_once import all_of
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.entries import CachedFile
from pool_managerd.models.fetch_rules import shown
from pool_managerd.models.file_lock import locked
from pool_managerd.models.part import disk_error, sync_directory
from pool_managerd.models.progress import Progress
from pool_managerd.models.remote import RemoteFile, RemoteModel
from pool_managerd.models.repository import check_code

AT_ONCE = 4
"""Files that are fetched at the same time: a hub gives a single connection less than the line has."""

FetchFile = Callable[[Path, RemoteFile, Progress], Awaitable[CachedFile]]


class FolderFetch:
    """``fetch`` brings one file to its place, ``require_room`` sees that there is room for all of them at one; ``policy`` says
    whether code that comes with a model may.
    """

    def __init__(
        self, cache: ModelCache, fetch: FetchFile, require_room: Callable[[Path], Awaitable[None]], policy: PolicyConfig
    ) -> None:
        self._cache, self._fetch, self._require_room, self._policy = cache, fetch, require_room, policy

    async def run(self, remote: RemoteModel, progress: Progress) -> tuple[CachedFile, ...]:
        """Its files in their order. What is there by the time that one fails is kept for the next try. Raises PoolError."""
        final = self._cache.root / remote.folder
        staging = self._cache.partial(final, None).with_suffix(".folder")
        waiting = _Sum(progress, remote.size_bytes or 0)
        async with locked(staging.with_suffix(".lock"), waiting.tell):
            there = await asyncio.to_thread(final.is_dir)  # of another reference, or an earlier one
            place = final if there else staging
            await asyncio.to_thread(self._cache.make_folder, place)
            await self._require_room(place)
            files = await self._all(remote, place, waiting)
            if not there:
                await asyncio.to_thread(self._give_name, staging, final)
        return tuple(self._named(file, place, final) for file in files)

    async def _all(self, remote: RemoteModel, place: Path, progress: _Sum) -> Sequence[CachedFile]:
        """What is beside the weights first: it may be a reason not to fetch those."""
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(file: RemoteFile) -> CachedFile:
            async with turns:
                found = await self._fetch(place / file.name, file, progress.of(file.name))
            return await asyncio.to_thread(self._checked, remote, file, place, found)

        beside = await all_of([one(file) for file in remote.files[remote.weights :]])
        return [*await all_of([one(file) for file in remote.files[: remote.weights]]), *beside]

    def _checked(self, remote: RemoteModel, file: RemoteFile, place: Path, found: CachedFile) -> CachedFile:
        """Raises SpecError for a small file that is not what the hub has, and for one that names code."""
        path = place / file.name
        if file.sha256 is not None:
            return found
        try:
            content = path.read_bytes()
            check_code(remote.ref, file.name, content, self._policy)
            if file.blob is None:
                return found
            if blob_name(content) != file.blob:
                path.unlink()
                raise SpecError(
                    f"cannot use {shown(file.url)}: digest mismatch: it is not what the hub has as {file.blob} in git",
                    code="DIGEST_MISMATCH", status=422, hint="fetch it again; see who answers there if that does not help",
                )  # fmt: skip
        except OSError as problem:
            raise disk_error(path, problem) from problem
        return replace(found, expected=True)

    def _give_name(self, staging: Path, final: Path) -> None:
        self._cache.make_folder(final.parent)
        try:
            staging.chmod(0o755)
            sync_directory(staging)
            staging.rename(final)
            sync_directory(final.parent)
        except OSError as problem:
            raise disk_error(final, problem) from problem

    def _named(self, file: CachedFile, place: Path, final: Path) -> CachedFile:
        below = (self._cache.root / file.path).relative_to(place)
        return replace(file, path=str((final / below).relative_to(self._cache.root)))


class _Sum:
    """How far all files are together."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total = progress, total
        self._done: dict[str, int] = {}

    def of(self, name: str) -> Progress:
        def tell(done: int, _of: int) -> None:
            self._done[name] = done
            self.tell()

        return tell

    def tell(self) -> None:
        self._progress(sum(self._done.values()), self._total)


def blob_name(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
