"""The disk below saved slots: room for another file, and the removal of those that nobody wants any more.

What cannot be removed stays, and is told once: no save, no restore and no stop fails for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from pool_managerd.config import Config
from pool_managerd.core.narration import size
from pool_managerd.core.slot_cache import Room, SlotFile, is_leftover, room_for
from pool_managerd.errors import PoolError
from pool_managerd.supervision.protocols import Emit, SlotStore


class SlotDisk:
    """Of all pools. ``writing`` are files that engines write now, by pool and name: how large they will be."""

    def __init__(self, files: SlotStore, config: Callable[[], Config]) -> None:
        self._files, self._config = files, config
        self.writing: dict[tuple[str, str], int] = {}
        self._told: set[str] = set()

    def room(self, pool_id: str, need: int, files: list[SlotFile], saved: Container[str], *, on_disk: int = 0) -> Room:
        """``on_disk`` of what is needed is written already. What this stop of ``pool_id`` has ``saved`` stays."""
        whole = [file for file in files if (file.pool_id, file.name) not in self.writing]
        fixed = [file for file in whole if file.pool_id == pool_id and file.name in saved]
        return room_for(
            need, [file for file in whole if file not in fixed], budget_bytes=self._config().slot_cache.disk_bytes,
            free_bytes=self._files.free_bytes() + on_disk, reserved_bytes=sum(self.writing.values()),
            fixed_bytes=sum(file.size_bytes for file in fixed),
        )  # fmt: skip

    async def give_room(self, pool_id: str, files: tuple[SlotFile, ...], emit: Emit) -> None:
        """``files`` go for one of ``pool_id``."""
        for file in files:
            if await self.remove(file, emit):
                human = f"A saved slot of pool '{file.pool_id}' ({size(file.size_bytes)}) made room for one of pool '{pool_id}'"
                emit("cache_removed", human, removed_from=file.pool_id, bytes=file.size_bytes)

    async def tidy(self, pool_id: str, emit: Emit) -> None:
        """What no save has finished, and none is writing now, goes: nothing is ever given back of it. Raises NodeError."""
        for file in await asyncio.to_thread(self._files.of, pool_id):
            if is_leftover(file.name) and (pool_id, file.name) not in self.writing:
                await self.remove(file, emit)

    async def forget(self, pool_id: str, emit: Emit) -> None:
        """All of the pool's."""
        try:
            files = await asyncio.to_thread(self._files.of, pool_id)
        except PoolError as problem:
            self._tell(problem, emit)
            return
        for file in files:
            await self.remove(file, emit)

    async def remove(self, file: SlotFile, emit: Emit) -> bool:
        """Whether it is gone."""
        try:
            await asyncio.to_thread(self._files.remove, file)
        except PoolError as problem:
            self._tell(problem, emit)
            return False
        return True

    def remove_at_once(self, file: SlotFile, emit: Emit) -> None:
        """As ``remove``, also for whoever is just being cancelled."""
        try:
            self._files.remove(file)
        except PoolError as problem:
            self._tell(problem, emit)

    def _tell(self, problem: PoolError, emit: Emit) -> None:
        if problem.message not in self._told:
            self._told.add(problem.message)
            emit("notice", problem.message, level="warn", hint=problem.hint)
