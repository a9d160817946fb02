"""What people ask of the cache of models: what is in it, what would be fetched, whether it is still what was fetched."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

from pool_managerd.config import PolicyConfig
from pool_managerd.core.model_keeping import Leftover, Limits, Stock, StoredModel
from pool_managerd.errors import SpecError
from pool_managerd.models.cache import CachedFile, Entry, ModelCache
from pool_managerd.models.digests import DigestCache, Progress
from pool_managerd.models.fetch_rules import FETCHED, check_network
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.leftovers import Leftovers, bytes_on_disk
from pool_managerd.models.refs import ModelRef, parse_ref
from pool_managerd.models.told import Verified, nobody


class Shelf:
    """``policy`` is the one in force."""

    def __init__(self, cache: ModelCache, fetcher: Fetcher, policy: Callable[[], PolicyConfig]) -> None:
        self._cache, self._fetcher, self._policy = cache, fetcher, policy
        self.tell: Callable[[Verified], None] = nobody

    def check_ref(self, ref: str) -> None:
        """Raises SpecError for what is never in the cache."""
        _fetchable(ref)

    async def cached(self) -> list[dict[str, Any]]:
        """A row for each reference, sorted. Raises NodeError."""
        return await asyncio.to_thread(lambda: [self._row(entry) for entry in self._cache.all()])

    async def look(self, ref: str) -> dict[str, Any]:
        """What a pull would fetch, ``size_bytes`` None where that is not said beforehand. Raises PoolError."""
        model = _fetchable(ref)
        entry = await asyncio.to_thread(self._cache.find, model.id)
        if entry is not None:
            return {
                "ref": model.id,
                "present": True,
                "files": [file.path for file in entry.files],
                "size_bytes": entry.size_bytes,
            }
        check_network(self._policy(), model)
        found = await self._fetcher.look(model)
        return _plan(model, found.size_bytes, [file.name for file in found.files], present=False)

    async def rehash(self, ref: str, progress: Progress) -> dict[str, Any]:
        """Hash all of it anew; ``wrong`` are files that are not what was fetched. Raises SpecError."""
        model = _fetchable(ref)
        entry = next((one for one in await asyncio.to_thread(self._cache.all) if one.ref == model.id), None)
        if entry is None:
            raise SpecError(f"cannot verify {model.id}: it is not in the cache")
        done, wrong, began = 0, list[str](), time.monotonic()
        for file in entry.files:
            if not await self._is_right(file, _beyond(progress, done, entry.size_bytes)):
                wrong.append(file.path)
            done += file.size
        self.tell(Verified(model.id, "fail" if wrong else "pass", "verify", time.monotonic() - began))
        for path in wrong:
            self._fetcher.distrust(self._cache.root / path)
        await asyncio.to_thread(self._cache.verified, model.id, time.time_ns() // 1_000_000, wrong)
        return {"ref": model.id, "ok": not wrong, "wrong": wrong, "size_bytes": entry.size_bytes}

    async def pin(self, ref: str, *, pinned: bool) -> None:
        """Whether it stays whatever happens; it counts as needed now. Raises NodeError."""
        await asyncio.to_thread(partial(self._cache.need, _fetchable(ref).id, pinned=pinned))

    # --- what goes ---

    async def stock(self, wanted: Collection[str], *, keep: bool) -> Stock:
        """All that there is; ``wanted`` are references that somebody may go on fetching, ``keep`` notes since when what is left
        over has been so. Raises NodeError.
        """
        return await asyncio.to_thread(self._stock, wanted, keep)

    async def remove(self, ref: str, since: float | None = None) -> int | None:
        """The bytes that this frees; None where somebody has needed or pinned it after ``since``. Raises NodeError."""
        await asyncio.to_thread(self._cache.prepare)
        return await asyncio.to_thread(self._cache.remove_unneeded, _fetchable(ref).id, since)

    async def sweep(self, leftover: Leftover) -> int:
        """The bytes that this frees. Raises NodeError."""
        return await asyncio.to_thread(Leftovers(self._cache).remove, leftover)

    async def need(self, refs: Collection[str]) -> None:
        """Somebody needs them now. Raises NodeError."""
        for ref in refs:
            await asyncio.to_thread(self._cache.need, ref)

    async def retire(self, models: Collection[StoredModel]) -> None:
        """Nobody has needed them for as long as models are kept, unless somebody does by now. Raises NodeError."""
        for one in models:
            await asyncio.to_thread(self._cache.retire, one.ref, one.needed_at)

    def fetching(self) -> Collection[str]:
        """The ids of what is being fetched now, for whomever."""
        return self._fetcher.fetching()

    def on_shortage(self, make_room: Callable[[Limits], Awaitable[str]]) -> None:
        """Asked where a download would not fit: deletes what may go for it, and says what else could."""
        self._fetcher.make_room = make_room

    def _stock(self, wanted: Collection[str], keep: bool) -> Stock:
        if not self._cache.root.is_dir():
            return Stock()
        if keep:
            self._cache.prepare()
            self._cache.keep_time(wanted)
        now = self._cache.time.now()
        models = tuple(self._stored(entry, now, wanted) for entry in self._cache.all())
        leftovers = Leftovers(self._cache).look(wanted, keep=keep)
        limits = replace(self._fetcher.room.limits(), used_bytes=bytes_on_disk(self._cache))
        return Stock(str(self._cache.root), models, tuple(leftovers), limits)

    def _stored(self, entry: Entry, now: float, wanted: Collection[str]) -> StoredModel:
        """One whose note does not say when it was needed counts as needed now."""
        needed_at = now if entry.needed_at is None else entry.needed_at
        files = tuple((str(self._cache.root / file.path), file.size) for file in entry.files)
        elsewhere = entry.ref not in wanted and self._cache.is_needed_elsewhere(entry.ref)
        users = ("another daemon needs it",) if elsewhere else ()
        return StoredModel(entry.ref, files, max(0.0, now - needed_at), entry.pinned, users, needed_at)

    async def _is_right(self, file: CachedFile, progress: Progress) -> bool:
        try:
            fd = await asyncio.to_thread(os.open, self._cache.root / file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return await DigestCache().sha256(fd, progress) == f"sha256:{file.sha256}"  # what is known of it is not asked
        except OSError:
            return False
        finally:
            os.close(fd)

    def _row(self, entry: Entry) -> dict[str, Any]:
        return {
            "ref": entry.ref, "path": str(self._cache.root / entry.files[0].path), "size_bytes": entry.size_bytes,
            "files": len(entry.files), "digest": entry.digest, "verified": entry.verified, "source": entry.source or None,
            "fetched_at_ms": entry.fetched_at_ms, "untouched": all(map(self._cache.is_untouched, entry.files)),
            "lifecycle": entry.lifecycle, "pinned": entry.pinned, "last_used_ms": entry.last_used_ms,
            "last_verified_ms": entry.last_verified_ms, "paths": [str(self._cache.root / file.path) for file in entry.files],
        }  # fmt: skip


def _fetchable(ref: str) -> ModelRef:
    model = parse_ref(ref)
    if model.scheme not in FETCHED:
        raise SpecError(f"cannot fetch {model.id}: models of {', '.join(FETCHED)} are kept in the cache, no others")
    return model


def _plan(model: ModelRef, size_bytes: int | None, files: list[str], *, present: bool) -> dict[str, Any]:
    return {"ref": model.id, "present": present, "files": files, "size_bytes": size_bytes}


def _beyond(progress: Progress, done: int, total: int) -> Progress:
    return lambda more, _: progress(done + more, total)
