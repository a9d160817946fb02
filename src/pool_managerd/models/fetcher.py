"""Models from elsewhere, brought into the cache: each once, however many ask for it at the same time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import structlog

from pool_managerd.core.model_keeping import Limits
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.models.ahead_notes import Ahead
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.download import Download, Persistence, persistently
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.fetch_rules import shown
from pool_managerd.models.file_lock import locked
from pool_managerd.models.folder_fetch import FetchFile, FolderFetch, blob_name
from pool_managerd.models.leftovers import bytes_on_disk
from pool_managerd.models.part import disk_error
from pool_managerd.models.progress import Progress, beyond
from pool_managerd.models.provenance import Origin, Provenance
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.remote import RemoteFile, RemoteModel, find
from pool_managerd.models.remote_head import read_head
from pool_managerd.models.remote_shape import ShapeReading, UnusableError
from pool_managerd.models.room import Room
from pool_managerd.models.told import Downloaded, nobody
from pool_managerd.models.usable import size_of
from pool_managerd.models.web import AgainError, Web

HEADER_TRIES = 2
"""So often headers are asked for: what they tell can be done without."""

log = structlog.get_logger("pool_managerd.models")


async def _no_room(_limits: Limits) -> str:
    """Nothing is deleted for what does not fit."""
    return ""


class Fetcher:
    """``digests`` knows what was hashed already. Made in the event loop.

    ``tell`` is told of every download that ends. ``make_room`` is asked where one would not fit: it deletes what may go for it,
    and says what else could be deleted.
    """

    def __init__(
        self, cache: ModelCache, web: Web, keep_free: int, digests: DigestCache, persistence: Persistence | None = None
    ) -> None:
        self.cache, self._web, self._digests = cache, web, digests
        self.room = Room(cache.root, keep_free, used=lambda: bytes_on_disk(cache))
        self.tell: Callable[[Downloaded], None] = nobody
        self.make_room: Callable[[Limits], Awaitable[str]] = _no_room
        self._provenance = Provenance(cache.books)
        self._tasks: set[asyncio.Task[Entry]] = set()
        self._persistence = persistence or Persistence()
        self._running: dict[tuple[str, ...], _Shared] = {}
        self._coming: dict[object, int] = {}

    async def close(self) -> None:
        """Downloads stop where they are, and can go on from there."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._web.close()
        self.cache.close()

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

    async def fetch(self, model: ModelRef, digests: Sequence[str], progress: Progress) -> Entry:
        """The model in the cache, fetched where it is not there; who asks for the same shares one download. Raises PoolError.

        It is cancelled when nobody waits for it any more: what is there by then is kept.
        """
        key = (model.id, *digests)
        shared = self._running.get(key)
        if shared is None:
            shared = self._running[key] = _Shared(lambda tell: self._counted(model, digests, tell))
            self._tasks.add(shared.task)
            shared.task.add_done_callback(self._tasks.discard)
        try:
            return await shared.wait(progress)
        finally:
            if shared.is_over and self._running.get(key) is shared:
                del self._running[key]

    def fetching(self) -> set[str]:
        """The ids of what is being fetched now."""
        return {model_id for model_id, *_ in self._running}

    def distrust(self, path: Path) -> None:
        """What was hashed of this file before is not what it is: a disk may have lost a bit of it."""
        with suppress(OSError):
            self._digests.forget(path.stat())

    async def _counted(self, model: ModelRef, digests: Sequence[str], progress: Progress) -> Entry:
        received, began = list[Download](), time.monotonic()

        def tell(outcome: Literal["success", "cancelled", "error"], reason: str = "none") -> None:
            count, took_s = sum(download.received for download in received), time.monotonic() - began
            self.tell(Downloaded(model.id, outcome, reason, count, took_s))

        try:
            entry = await self._fetch(model, digests, progress, received)
        except asyncio.CancelledError:
            tell("cancelled")
            raise
        except Exception as problem:
            tell("error", problem.code.lower() if isinstance(problem, PoolError) else "internal")
            raise
        tell("success")
        return entry

    async def _fetch(self, model: ModelRef, digests: Sequence[str], progress: Progress, received: list[Download]) -> Entry:
        await asyncio.to_thread(self.cache.prepare)
        remote = await self.look(model, digests)
        with self._reserved() as reserve:

            def tell(now: int, of: int) -> None:
                reserve(max(0, of - now))
                progress(now, of)

            async def require_room(place: Path) -> None:
                await self._require_room(remote, place, reserve)

            async def fetch(final: Path, file: RemoteFile, told: Progress) -> CachedFile:
                return await self._file(remote, final, file, told, received)

            if remote.is_folder:
                files = await FolderFetch(self.cache, fetch, require_room, self._web.policy).run(remote, tell)
            else:
                await require_room(self.cache.root / remote.folder)
                files = await _one_by_one(self.cache, remote, fetch, tell)
        now_ms = time.time_ns() // 1_000_000
        entry = Entry(model.id, remote.source, now_ms, files, remote.folder if remote.is_folder else "", remote.weights)
        entry = replace(entry, last_verified_ms=now_ms if entry.verified else None)
        await asyncio.to_thread(self.cache.register, entry)
        return entry

    async def _file(
        self, remote: RemoteModel, final: Path, file: RemoteFile, progress: Progress, received: list[Download]
    ) -> CachedFile:
        """One file at its place, fetched where it is not there. Raises PoolError."""
        part = self.cache.partial(final, file.sha256)
        try:
            async with locked(part.with_suffix(".lock"), lambda: progress(size_of(part), file.size or 0)) as waited:
                digest = await self._present(final, file, progress, fetched_just_now=waited)
                if digest is None:
                    await asyncio.to_thread(self.cache.make_folder, final.parent)
                    received.append(download := Download(self._web, self.room, self._persistence))
                    digest = await download.run(file, part, final, progress)
                    await asyncio.to_thread(self._keep_origin, remote, file, size_of(final), digest, download.etag)
                found = await asyncio.to_thread(final.stat)
        except OSError as problem:
            raise disk_error(final, problem) from problem
        self._digests.know(found, f"sha256:{digest}")
        relative = str(final.relative_to(self.cache.root))
        return CachedFile(relative, found.st_size, digest, file.sha256 is not None, found.st_mtime_ns)

    async def _present(self, final: Path, file: RemoteFile, progress: Progress, *, fetched_just_now: bool) -> str | None:
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

    def _keep_origin(self, remote: RemoteModel, file: RemoteFile, size: int, digest: str, etag: str) -> None:
        """A model that is here is of use also where that could not be written down."""
        path = f"{remote.folder}/{file.name}"
        now_ms, ref, source = time.time_ns() // 1_000_000, remote.ref.id.partition("?")[0], shown(file.url)
        try:
            self._provenance.append(Origin(now_ms, ref, path, size, f"sha256:{digest}", source, remote.source, etag))
        except OSError as problem:
            log.warning("cannot write down where a model has come from", model_id=remote.ref.id, reason=problem.strerror)

    @contextmanager
    def _reserved(self) -> Iterator[Callable[[int], int]]:
        """Call it with how many bytes are still to come: it returns how many are to come for all that are under way."""
        mine = object()

        def reserve(count: int) -> int:
            self._coming[mine] = count
            return sum(self._coming.values())

        try:
            yield reserve
        finally:
            self._coming.pop(mine, None)

    async def _require_room(self, remote: RemoteModel, place: Path, reserve: Callable[[int], int]) -> None:
        """For all of it, where its size is known, less what is at ``place`` by now, and for what else is coming: before the first
        byte. Raises NodeError.
        """
        need = reserve(await asyncio.to_thread(self._missing_bytes, remote, place))
        limits = await asyncio.to_thread(self.room.limits, need)
        could_go = await self.make_room(limits) if limits.short_bytes else ""
        await asyncio.to_thread(self.room.require, need, remote.ref.id, could_go)

    def _missing_bytes(self, remote: RemoteModel, place: Path) -> int:
        if remote.size_bytes is None:
            return 0
        finals = [(place / file.name, file.sha256) for file in remote.files]
        there = sum(max(size_of(final), size_of(self.cache.partial(final, sha256))) for final, sha256 in finals)
        return max(0, remote.size_bytes - there)


async def _one_by_one(cache: ModelCache, remote: RemoteModel, fetch: FetchFile, progress: Progress) -> tuple[CachedFile, ...]:
    total, done, files = remote.size_bytes or 0, 0, list[CachedFile]()
    for file in remote.files:
        files.append(await fetch(cache.place(remote.folder, file.name), file, beyond(progress, done, total)))
        done += files[-1].size
    return tuple(files)


class _Shared:
    """One piece of work with several who wait for it; each hears how far it is."""

    def __init__(self, work: Callable[[Progress], Coroutine[Any, Any, Entry]]) -> None:
        self._listeners: list[Progress] = []
        self._last = (0, 0)
        self.task = asyncio.create_task(work(self._tell))
        self.is_over = False

    def _tell(self, done: int, total: int) -> None:
        self._last = done, total
        for listener in tuple(self._listeners):
            listener(done, total)

    async def wait(self, progress: Progress) -> Entry:
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
