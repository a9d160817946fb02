"""A model that is in archives: its layers fetched and verified, its files unpacked beside them, the folder there when all are.

What is fetched stays until the model is in the catalog: whatever ends it before, the next try goes on with it.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pool_managerd.config import PolicyConfig
from pool_managerd.errors import PoolError, SpecError
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.checksums import not_for_each_part
from pool_managerd.models.entries import CachedFile, Entry
from pool_managerd.models.file_lock import locked
from pool_managerd.models.folder_fetch import FetchFile, FolderFetch
from pool_managerd.models.part import disk_error, sync_directory
from pool_managerd.models.progress import Progress
from pool_managerd.models.remote import RemoteFile, RemoteModel
from pool_managerd.models.thread_work import in_thread
from pool_managerd.models.unpacking import Unpacking, Written


@dataclass(frozen=True, slots=True)
class Unpacked:
    """``files`` as they are in the cache, ``layers`` what each of them was in; ``folder`` and ``weights`` as of an `Entry`."""

    files: tuple[CachedFile, ...]
    folder: str
    weights: int
    layers: tuple[RemoteFile, ...] = ()


Need = Callable[[Path, int], Awaitable[None]]
"""Sees that there is room for what is not at a place yet, and for so many bytes more. Raises NodeError."""
Keep = Callable[[Unpacked], Awaitable[Entry]]
"""Puts it into the catalog."""


class UnpackedFetch:
    """``fetch`` brings one layer to its place. ``fits`` blocks, and raises NodeError where that many bytes do not fit."""

    def __init__(
        self, cache: ModelCache, fetch: FetchFile, require_room: Need, policy: PolicyConfig, fits: Callable[[int], None]
    ) -> None:
        self._cache, self._fetch, self._require_room, self._policy, self._fits = cache, fetch, require_room, policy, fits

    async def run(
        self, remote: RemoteModel, digests: Sequence[str], progress: Progress, unpacking: Progress, *, keep: Keep
    ) -> Entry:
        """``digests`` (``sha256:<hex>``) are what its weights must be. Raises PoolError."""
        final = self._cache.root / remote.folder
        staging = self._cache.partial(final, None).with_suffix(".folder")
        async with locked(staging.with_suffix(".lock"), lambda: progress(0, remote.size_bytes or 0)):
            found = await asyncio.to_thread(self._known, remote)
            if found is not None:  # by another reference
                _check_digests(remote, found, digests)
            else:
                found = await self._bring(remote, digests, staging, progress, unpacking)
                await asyncio.to_thread(self._give_name, staging / "files", final)
            entry = await keep(found)
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
            return entry

    async def _bring(
        self, remote: RemoteModel, digests: Sequence[str], staging: Path, progress: Progress, unpacking: Progress
    ) -> Unpacked:
        await self._fetch_layers(remote, staging / "layers", progress)
        try:
            found = await self._unpack(remote, staging, unpacking)
            _check_digests(remote, found, digests)
        except (PoolError, asyncio.CancelledError) as problem:
            never = isinstance(problem, SpecError) and problem.code == SpecError.code  # else its layers are of use once more
            await asyncio.to_thread(shutil.rmtree, staging if never else staging / "files", ignore_errors=True)
            raise
        return found

    async def _fetch_layers(self, remote: RemoteModel, place: Path, progress: Progress) -> None:
        async def require_room(at: Path) -> None:
            await self._require_room(at, _least_bytes(remote))

        layers = replace(remote, folder=str(place.relative_to(self._cache.root)))
        await FolderFetch(self._cache, self._fetch, require_room, self._policy).run(layers, progress)

    async def _unpack(self, remote: RemoteModel, staging: Path, progress: Progress) -> Unpacked:
        loop, stop, place = asyncio.get_running_loop(), threading.Event(), staging / "files"

        def tell(done: int, total: int) -> None:
            loop.call_soon_threadsafe(progress, done, total)

        work = Unpacking(remote, staging / "layers", self._policy, stop, tell)
        chosen = await in_thread(work.choose, stop)
        await self._require_room(staging / "layers", chosen.size_bytes)
        await asyncio.to_thread(_empty, place)
        written = await in_thread(lambda: work.write(chosen, place, self._fits), stop)
        files = tuple(_cached(f"{remote.folder}/{one.path}", one) for one in written)
        folder, weights = (remote.folder, chosen.weights) if chosen.is_folder else ("", 0)
        return Unpacked(files, folder, weights, tuple(one.layer for one in written))

    def _known(self, remote: RemoteModel) -> Unpacked | None:
        """The same artifact, which is here under another name."""
        for entry in self._cache.all():
            is_same = entry.source == remote.source and entry.files[0].path.startswith(f"{remote.folder}/")
            if is_same and all(map(self._cache.is_untouched, entry.files)):
                return Unpacked(entry.files, entry.folder, entry.weights)
        return None

    def _give_name(self, place: Path, final: Path) -> None:
        """What lies there by that name nobody vouches for."""
        self._cache.make_folder(final.parent)
        try:
            if final.exists():
                shutil.rmtree(final)
            place.rename(final)
            sync_directory(final.parent)
        except OSError as problem:
            raise disk_error(final, problem) from problem


def _empty(place: Path) -> None:
    """Of what an earlier try has left."""
    try:
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(mode=0o755)
        place.chmod(0o755)
    except OSError as problem:
        raise disk_error(place, problem) from problem


def _least_bytes(remote: RemoteModel) -> int:
    """What archives of a model become at least; of an image nobody knows which layers have any of it."""
    return 0 if remote.inside else sum(file.size or 0 for file in remote.files if file.is_packed)


def _cached(path: str, one: Written) -> CachedFile:
    """It is what the registry has: so was what it was in."""
    return CachedFile(path, one.size, one.sha256, expected=True, mtime_ns=one.mtime_ns)


def _check_digests(remote: RemoteModel, found: Unpacked, digests: Sequence[str]) -> None:
    """Raises SpecError where its weights are not what somebody has said."""
    weights = found.files[: found.weights] if found.folder else found.files
    if digests and len(digests) != len(weights):
        raise not_for_each_part(Path(found.files[0].path).parent, len(weights), len(digests))
    for file, wanted in zip(weights, digests, strict=False):
        if f"sha256:{file.sha256}" != wanted:
            raise SpecError(
                f"cannot use {remote.ref.id}: digest mismatch: {Path(file.path).name} should be {wanted}, and is"
                f" sha256:{file.sha256}", code="DIGEST_MISMATCH", status=422, hint="correct provisioning.model.checksum",
            )  # fmt: skip
