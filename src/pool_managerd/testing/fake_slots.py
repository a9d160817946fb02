"""Fakes of what slots are saved by: one that is told when it has done it, and a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from pool_managerd.core.slot_cache import Restored, SlotFile
from pool_managerd.errors import NodeError
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.protocols import Emit


class FakeSlots:
    """Notes what is asked of it. While ``gate`` is set, nothing is done; ``found`` is what a launch is given back."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gate: asyncio.Event | None = None
        self.found = Restored()
        self.broken: Exception | None = None

    def launching(self, pool: Pool, emit: Emit) -> None:
        self.asked.append(f"launch {pool.pool_id}")

    @contextmanager
    def unwanted(self, pool_id: str) -> Iterator[None]:
        self.asked.append(f"unwanted {pool_id}")
        yield
        self.asked.append(f"wanted {pool_id}")

    async def save(self, pool: Pool, emit: Emit) -> None:
        await self._work(f"save {pool.pool_id}")

    async def restore(self, pool: Pool, emit: Emit) -> Restored:
        await self._work(f"restore {pool.pool_id}")
        return self.found

    async def _work(self, what: str) -> None:
        self.asked.append(what)
        if self.gate is not None:
            await self.gate.wait()
        if self.broken is not None:
            raise self.broken


class FakeSlotStore:
    """Files in memory, by pool and name, with the beginning of each; ``free`` is what the disk has left. What ``stays`` cannot be
    removed.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], SlotFile] = {}
        self.heads: dict[tuple[str, str], bytes] = {}
        self.free = 1 << 40
        self.stays: set[str] = set()
        self._written = 0.0

    def put(self, pool_id: str, name: str, size_bytes: int, head: bytes = b"") -> None:
        """An engine writes it."""
        self._written += 1
        self.files[pool_id, name] = SlotFile(pool_id, name, size_bytes, self._written)
        self.heads[pool_id, name] = head

    def names(self) -> list[str]:
        return sorted(name for _, name in self.files)

    def all(self) -> list[SlotFile]:
        return list(self.files.values())

    def of(self, pool_id: str) -> list[SlotFile]:
        return [file for (owner, _), file in self.files.items() if owner == pool_id]

    def complete(self, pool_id: str, name: str, final: str, size_bytes: int) -> None:
        file = self.files.pop((pool_id, name), None)
        if file is None or file.size_bytes != size_bytes:
            raise NodeError(f"cannot keep {name}: it is not what the engine said")
        self.files[pool_id, final] = SlotFile(pool_id, final, size_bytes, file.written_at)
        self.heads[pool_id, final] = self.heads.pop((pool_id, name))

    def head(self, pool_id: str, name: str, count: int) -> bytes:
        return self.heads.get((pool_id, name), b"")[:count]

    def remove(self, file: SlotFile) -> None:
        if file.name in self.stays:
            raise NodeError(f"cannot remove {file.name}: Operation not permitted")
        self.files.pop((file.pool_id, file.name), None)

    def free_bytes(self) -> int:
        return self.free
