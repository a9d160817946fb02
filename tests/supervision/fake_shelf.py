"""A cache of models in memory, for what decides about it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from pool_managerd.core.model_keeping import DAY_S, Leftover, Limits, Stock, StoredModel
from pool_managerd.errors import SpecError


class FakeShelf:
    """Has ``models``; each takes 100 bytes in a file of its own below /cache. ``gate``: a deletion waits until it opens."""

    def __init__(self, *refs: str, idle_days: float = 30) -> None:
        self.models = {ref: StoredModel(ref, ((self.path(ref), 100),), idle_days * DAY_S, needed_at=5.0) for ref in refs}
        self.leftovers: list[Leftover] = []
        self.limits = Limits(free_bytes=1 << 40)
        self.made_room: Callable[[Limits], Awaitable[str]] | None = None
        self.now_fetching: set[str] = set()
        self.kept: list[bool] = []
        self.needed: list[str] = []
        self.retired: list[str] = []
        self.gate: asyncio.Event | None = None
        self.on_remove: Callable[[str], None] = lambda _: None

    @staticmethod
    def path(ref: str) -> str:
        return f"/cache/{ref.replace(':', '_')}"

    def check_ref(self, ref: str) -> None:
        """Every reference may be in it."""

    async def cached(self) -> list[dict[str, Any]]:
        return [
            {"ref": ref, "size_bytes": 100, "pinned": one.pinned, "paths": [path for path, _ in one.files]}
            for ref, one in sorted(self.models.items())
        ]

    async def elsewhere(self) -> list[dict[str, Any]]:
        return []

    async def used(self, ref: str) -> dict[str, Any] | None:
        return None

    def check_import(self, path: str, name: str | None, digests: Sequence[str]) -> str:
        raise SpecError(f"cannot import {path}: nothing is imported here")

    async def bring(
        self, path: str, name: str | None, digests: Sequence[str], progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        raise SpecError(f"cannot import {path}: nothing is imported here")

    async def look(self, ref: str) -> dict[str, Any]:
        return {"ref": ref, "present": ref in self.models}

    async def rehash(self, ref: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return {"ref": ref, "ok": True, "wrong": []}

    async def pin(self, ref: str, *, pinned: bool) -> None:
        self.models[ref] = replace(self.models[ref], pinned=pinned, needed_at=9.0)

    async def stock(self, wanted: Collection[str], *, keep: bool) -> Stock:
        self.kept.append(keep)
        used = 100 * len(self.models)
        return Stock("/cache", tuple(self.models.values()), tuple(self.leftovers), replace(self.limits, used_bytes=used))

    async def remove(self, ref: str, since: float | None = None) -> int | None:
        self.on_remove(ref)
        if self.gate is not None:
            await self.gate.wait()
        one = self.models.get(ref)
        if one is None or (since is not None and one.needed_at > since):
            return None
        del self.models[ref]
        self.limits = replace(self.limits, free_bytes=self.limits.free_bytes + 100)
        return 100

    async def sweep(self, leftover: Leftover) -> int:
        self.leftovers.remove(leftover)
        return leftover.size_bytes

    async def need(self, refs: Collection[str]) -> None:
        self.needed += refs

    async def retire(self, models: Collection[StoredModel]) -> None:
        self.retired += [one.ref for one in models]

    def fetching(self) -> Collection[str]:
        return self.now_fetching

    def on_shortage(self, make_room: Callable[[Limits], Awaitable[str]]) -> None:
        self.made_room = make_room
