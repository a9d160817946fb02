"""Models from elsewhere, brought into the cache: each once, however many ask for it at the same time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pool_managerd.errors import NodeError
from pool_managerd.models.ahead_notes import Ahead
from pool_managerd.models.cache import CachedFile, Entry, ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.download import Download, Persistence, Sized, persistently
from pool_managerd.models.file_lock import locked
from pool_managerd.models.folder_fetch import FolderFetch, blob_name
from pool_managerd.models.part import disk_error
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.remote import RemoteFile, RemoteModel, find
from pool_managerd.models.remote_head import read_head
from pool_managerd.models.remote_shape import ShapeReading, UnusableError
from pool_managerd.models.room import Room
from pool_managerd.models.web import AgainError, Web

HEADER_TRIES = 2
"""So often headers are asked for: what they tell can be done without."""


class Fetcher:
    """``digests`` knows what was hashed already. Made in the event loop."""

    def __init__(
        self, cache: ModelCache, web: Web, keep_free: int, digests: DigestCache, persistence: Persistence | None = None
    ) -> None:
        self.cache, self._web, self._digests = cache, web, digests
        self.room = Room(cache.root, keep_free)
        self._tasks: set[asyncio.Task[Entry]] = set()
        self._persistence = persistence or Persistence()
        self._running: dict[tuple[str, ...], _Shared] = {}

    async def close(self) -> None:
        """Downloads stop where they are, and can go on from there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._web.close()

    async def look(self, model: ModelRef, digests: Sequence[str] = ()) -> RemoteModel:
        """What is there to be fetched. Raises PoolError."""
        return await persistently(lambda: find(model, self._web, digests), model.id, self._persistence, lambda: 0)

    async def read_ahead(self, remote: RemoteModel) -> Ahead:
        """What the headers of its files tell, of which no more than those is read. Raises PoolError."""
        reading, tries = ShapeReading(remote, self._web), replace(self._persistence, tries=HEADER_TRIES)
        try:
            return reading.ahead(await persistently(reading.shape, remote.ref.id, tries, lambda: 0))
        except NodeError:  # it may be fetched all the same
            return reading.ahead(None)
        except UnusableError as problem:
            return reading.ahead(None, problem.message)

    async def is_still(self, remote: RemoteModel, known: Ahead) -> bool:
        """Whether its first file is the one that ``known`` was read from, which has to be asked where no digest tells."""
        file, before = remote.files[0], known.files[0]
        if file.sha256 is not None:
            return True
        try:
            found = await read_head(file, self._web, lambda head: head, (1,))
        except AgainError:
            return False
        return found is not None and (found[0].size, found[0].etag) == (before.size, before.etag)

    async def fetch(self, model: ModelRef, digests: Sequence[str], progress: Sized) -> Entry:
        """The model in the cache, fetched where it is not there; who asks for the same shares one download. Raises PoolError.

        It is cancelled when nobody waits for it any more: what is there by then is kept.
        """
        key = (model.id, *digests)
        shared = self._running.get(key)
        if shared is None:
            shared = self._running[key] = _Shared(lambda tell: self._fetch(model, digests, tell))
            self._tasks.add(shared.task)
            shared.task.add_done_callback(self._tasks.discard)
        try:
            return await shared.wait(progress)
        finally:
            if shared.is_over and self._running.get(key) is shared:
                del self._running[key]

    async def _fetch(self, model: ModelRef, digests: Sequence[str], progress: Sized) -> Entry:
        await asyncio.to_thread(self.cache.prepare)
        remote = await self.look(model, digests)
        if remote.is_folder:
            files = await FolderFetch(self.cache, self.file, self.room, self._web.policy).run(remote, progress)
        else:
            files = await self._files(remote, progress)
        folder = remote.folder if remote.is_folder else ""
        entry = Entry(model.id, remote.source, time.time_ns() // 1_000_000, files, folder, remote.weights)
        await asyncio.to_thread(self.cache.put, entry)
        return entry

    async def _files(self, remote: RemoteModel, progress: Sized) -> tuple[CachedFile, ...]:
        await asyncio.to_thread(self._require_room, remote)
        total, done, files = remote.size_bytes or 0, 0, list[CachedFile]()
        for file in remote.files:
            files.append(await self.file(self.cache.place(remote.folder, file.name), file, _beyond(progress, done, total)))
            done += files[-1].size
        return tuple(files)

    async def file(self, final: Path, file: RemoteFile, progress: Sized) -> CachedFile:
        """One file at its place, fetched where it is not there. Raises PoolError."""
        part = self.cache.partial(final, file.sha256)
        try:
            async with locked(part.with_suffix(".lock"), lambda: progress(_size_of(part), file.size or 0)) as waited:
                digest = await self._present(final, file, progress, fetched_just_now=waited)
                if digest is None:
                    await asyncio.to_thread(self.cache.make_folder, final.parent)
                    digest = await Download(self._web, self.room, self._persistence).run(file, part, final, progress)
                found = await asyncio.to_thread(final.stat)
        except OSError as problem:
            raise disk_error(final, problem) from problem
        self._digests.know(found, f"sha256:{digest}")
        relative = str(final.relative_to(self.cache.root))
        return CachedFile(relative, found.st_size, digest, file.sha256 is not None, found.st_mtime_ns)

    async def _present(self, final: Path, file: RemoteFile, progress: Sized, *, fetched_just_now: bool) -> str | None:
        """The sha256 of a file that is there already, for another reference or from before; one that is another is deleted.

        Without a digest nobody could tell whether it is what would be fetched, unless that was done meanwhile.
        """
        if not await asyncio.to_thread(final.is_file):
            return None
        if file.sha256 is None and not fetched_just_now and not await asyncio.to_thread(_is_blob, final, file):
            await asyncio.to_thread(final.unlink)
            return None
        fd = await asyncio.to_thread(os.open, final, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = (await self._digests.sha256(fd, progress)).removeprefix("sha256:")
        finally:
            os.close(fd)
        if file.sha256 in (None, found):
            return found
        await asyncio.to_thread(final.unlink)
        return None

    def _require_room(self, remote: RemoteModel) -> None:
        """For all of it, where its size is known, less what is there by now: before the first byte. Blocks. Raises NodeError."""
        if remote.size_bytes is not None:
            finals = [(self.cache.place(remote.folder, file.name), file.sha256) for file in remote.files]
            there = sum(max(_size_of(final), _size_of(self.cache.partial(final, sha256))) for final, sha256 in finals)
            self.room.require(remote.size_bytes - there, remote.ref.id)


class _Shared:
    """One piece of work with several who wait for it; each hears how far it is."""

    def __init__(self, work: Callable[[Sized], Coroutine[Any, Any, Entry]]) -> None:
        self._listeners: list[Sized] = []
        self._last = (0, 0)
        self.task = asyncio.create_task(work(self._tell))
        self.is_over = False

    def _tell(self, done: int, total: int) -> None:
        self._last = done, total
        for listener in tuple(self._listeners):
            listener(done, total)

    async def wait(self, progress: Sized) -> Entry:
        """Raises PoolError. The last one that is cancelled ends it: who comes then begins anew."""
        self._listeners.append(progress)
        progress(*self._last)
        try:
            await asyncio.wait([self.task])
        finally:
            self._listeners.remove(progress)
            if not self._listeners:
                self.is_over = True
                self.task.cancel()
        if self.task.cancelled():
            raise NodeError("cannot fetch the model: the daemon is shutting down")
        return self.task.result()


def _is_blob(path: Path, file: RemoteFile) -> bool:
    """Whether it is what git has."""
    with suppress(OSError):
        return file.blob is not None and path.stat().st_size == file.size and blob_name(path.read_bytes()) == file.blob
    return False


def _beyond(progress: Sized, done: int, total: int) -> Sized:
    """Progress of one file among all."""
    return lambda more, of: progress(done + more, total or of)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
