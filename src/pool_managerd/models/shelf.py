"""What people ask of the cache of models: what is in it, what would be fetched, whether it is still what was fetched."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pool_managerd.config import PolicyConfig
from pool_managerd.core.model_keeping import Leftover, Limits, Stock, StoredModel
from pool_managerd.errors import NodeError, SpecError
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.candidates import Candidate
from pool_managerd.models.digests import DigestCache
from pool_managerd.models.elsewhere import Elsewhere
from pool_managerd.models.elsewhere_rows import row_of, rows_of
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.fetch_rules import FETCHED, check_scheme
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.importing import Importer, import_of
from pool_managerd.models.leftovers import Leftovers, bytes_on_disk
from pool_managerd.models.not_here import require_fetchable
from pool_managerd.models.progress import Progress, beyond
from pool_managerd.models.refs import ModelRef, parse_ref
from pool_managerd.models.remote import RemoteModel
from pool_managerd.models.told import Verified, nobody


class Shelf:
    """``policy`` is the one in force; ``elsewhere`` what other tools have on this machine."""

    def __init__(
        self, cache: ModelCache, fetcher: Fetcher, policy: Callable[[], PolicyConfig], elsewhere: Elsewhere, importer: Importer
    ) -> None:
        self._cache, self._fetcher, self._policy = cache, fetcher, policy
        self.tell: Callable[[Verified], None] = nobody
        self._elsewhere, self._importer = elsewhere, importer

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
            return _plan(model, entry.size_bytes, [file.path for file in entry.files], present=True)
        check_scheme(self._policy(), model)
        here = await asyncio.to_thread(self._elsewhere.likely, model)
        if here is not None:
            return _here(here)
        await asyncio.to_thread(require_fetchable, model, self._elsewhere, self._policy())
        found = await self._fetcher.look(model)
        here = await asyncio.to_thread(self._like, found)
        return _here(here) if here else _plan(model, found.size_bytes, [file.name for file in found.files], present=False)

    def _like(self, remote: RemoteModel) -> Candidate | None:
        """What another tool has that may be what the hub has. Blocks."""
        found = self._elsewhere.matching(remote, self._elsewhere.search(remote.ref))
        return next((one for one in found if not self._elsewhere.objection(one)), None)

    async def elsewhere(self) -> list[dict[str, Any]]:
        """A row for each model that another tool has on this machine. The network is not asked."""
        return await asyncio.to_thread(rows_of, self._elsewhere, self._policy())

    async def used(self, ref: str) -> dict[str, Any] | None:
        """The row of a model that is used where another tool has it."""
        used = await asyncio.to_thread(self._elsewhere.remembered, parse_ref(ref))
        if used is None:
            return None
        return await asyncio.to_thread(row_of, self._elsewhere, self._policy(), Candidate.of(used))

    def check_import(self, path: str, name: str | None, digests: Sequence[str]) -> str:
        """The id of what the file would be. Raises SpecError."""
        return import_of(path, name, digests).ref.id

    async def bring(self, path: str, name: str | None, digests: Sequence[str], progress: Progress) -> dict[str, Any]:
        """Its row, once it is in the cache. Raises PoolError."""
        entry = await self._importer.run(import_of(path, name, digests), progress)
        return await asyncio.to_thread(self._row, entry)

    async def rehash(self, ref: str, progress: Progress) -> dict[str, Any]:
        """Hash all of it anew; ``wrong`` are files that are not what was fetched. Raises SpecError."""
        model = _fetchable(ref)
        entry = next((one for one in await asyncio.to_thread(self._cache.all) if one.ref == model.id), None)
        if entry is None:
            raise SpecError(f"cannot verify {model.id}: it is not in the cache")
        done, wrong, began = 0, list[str](), time.monotonic()
        for file in entry.files:
            if not await self._is_right(file, beyond(progress, done, entry.size_bytes)):
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
            keep = self._noted(wanted)
        now = self._cache.time.now()
        models = tuple(self._stored(entry, now, wanted) for entry in self._cache.all())
        leftovers = Leftovers(self._cache).look(wanted, keep=keep)
        limits = replace(self._fetcher.room.limits(), used_bytes=bytes_on_disk(self._cache))
        return Stock(str(self._cache.root), models, tuple(leftovers), limits)

    def _noted(self, wanted: Collection[str]) -> bool:
        """Whether the books could be kept: on a disk that is full nothing could be deleted, if that had to be."""
        self._cache.prepare()
        try:
            self._cache.keep_time(wanted)
        except NodeError as problem:
            if problem.status != 507:
                raise
            return False
        return True

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
            "ref": entry.ref, "path": str(self._cache.root / entry.path), "size_bytes": entry.size_bytes,
            "files": len(entry.files), "digest": entry.digest, "verified": entry.verified, "source": entry.source or None,
            "fetched_at_ms": entry.fetched_at_ms, "untouched": all(map(self._cache.is_untouched, entry.files)),
            "lifecycle": entry.lifecycle, "pinned": entry.pinned, "last_used_ms": entry.last_used_ms,
            "last_verified_ms": entry.last_verified_ms, "paths": [str(self._cache.root / file.path) for file in entry.files],
            "tool": None, "problem": None,
        }  # fmt: skip


def _fetchable(ref: str) -> ModelRef:
    model = parse_ref(ref)
    if model.scheme not in (*FETCHED, "local", "ollama"):
        raise SpecError(f"cannot fetch {model.id}: models of {', '.join(FETCHED)} are kept in the cache, no others")
    return model


def _here(found: Candidate) -> dict[str, Any]:
    return {
        "ref": found.ref, "present": True, "files": [str(file.place) for file in found.files], "size_bytes": found.size_bytes,
        "tool": found.tool,
    }  # fmt: skip


def _plan(model: ModelRef, size_bytes: int | None, files: list[str], *, present: bool) -> dict[str, Any]:
    return {"ref": model.id, "present": present, "files": files, "size_bytes": size_bytes}
