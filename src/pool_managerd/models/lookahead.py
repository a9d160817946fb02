"""What a model will need, before it is fetched: read from the headers of its files where they lie, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.errors import NodeError
from pool_managerd.models.ahead_notes import Ahead, AheadNotes
from pool_managerd.models.cache import ModelCache
from pool_managerd.models.fetcher import Fetcher
from pool_managerd.models.refs import ModelRef
from pool_managerd.models.shapes import Shapes

FOLDER = "headers"
"""Below the directory of the cache."""


class Lookahead:
    """Without a ``fetcher`` nobody is asked: it knows what others have read. ``shapes`` are told what they would find."""

    def __init__(self, cache: ModelCache, fetcher: Fetcher | None, shapes: Shapes) -> None:
        self._cache, self._fetcher, self._shapes = cache, fetcher, shapes
        self._notes = AheadNotes(cache.root / FOLDER)
        self._running: dict[tuple[object, ...], asyncio.Task[Ahead | None]] = {}

    async def look(self, model: ModelRef, digests: Sequence[str], *, fresh: bool) -> Ahead | None:
        """What is known of it: what was read before, unless it has changed since, which is asked where it is to be ``fresh``.

        None without a fetcher. Who asks meanwhile shares the answer. Raises PoolError.
        """
        if self._fetcher is None:
            return await asyncio.to_thread(self._notes.find, model.id)
        key = (model.id, tuple(digests), fresh)
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._look(self._fetcher, model, digests, fresh), name="look ahead")
            task.add_done_callback(lambda ended: self._ended(key, ended))
        return await asyncio.shield(task)

    async def close(self) -> None:
        tasks = tuple(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def expected(self, model: ModelRef) -> ResolvedModel | None:
        """The model as it will lie in the cache; None where nothing is known of it. Blocks."""
        known = self._notes.find(model.id)
        if known is None or known.shape is None or known.size_bytes is None:
            return None
        if known.is_folder:
            folder = self._notes.folder_of(known)
            return None if folder is None else self._as_folder(model, known, folder, known.shape)
        paths = [str(self._cache.place(known.folder, file.name)) for file in known.files]
        self._shapes.expect(paths[0], known.shape)
        return ResolvedModel(model.id, paths[0], known.size_bytes, files=tuple(paths) if len(paths) > 1 else ())

    def _as_folder(self, model: ModelRef, known: Ahead, folder: Path, shape: ModelShape) -> ResolvedModel:
        """A folder that has its config.json, and nothing else of it: engines' adapters go by that."""
        self._shapes.expect(str(folder), shape)
        return ResolvedModel(model.id, str(folder), known.size_bytes or 0)

    def forget(self, ref: str) -> None:
        """It is here now, or is not what it was. Blocks."""
        self._notes.forget(ref)

    def _keep(self, found: Ahead) -> None:
        with suppress(NodeError):  # a fetch will say so
            self._cache.prepare()
        self._notes.put(found)

    def _ended(self, key: tuple[object, ...], task: asyncio.Task[Ahead | None]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits for it any more

    async def _look(self, fetcher: Fetcher, model: ModelRef, digests: Sequence[str], fresh: bool) -> Ahead | None:
        known = await asyncio.to_thread(self._notes.find, model.id)
        if known is not None and not fresh:
            return known
        remote = await fetcher.look(model, digests)
        if known is not None and known.is_of(remote) and await fetcher.is_still(remote, known):
            return known
        found = await fetcher.read_ahead(remote)
        if found.shape is None:
            await asyncio.to_thread(self._notes.forget, model.id)  # what is not known is asked again
        else:
            await asyncio.to_thread(self._keep, found)
        return found
