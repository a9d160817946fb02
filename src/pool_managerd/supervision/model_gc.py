"""Models that nobody needs any more, deleted: on request, or where a limit would not hold (core/model_keeping.py: the rules)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from pool_managerd.config import Config
from pool_managerd.core.event import Event
from pool_managerd.core.model_keeping import DAY_S, Leftover, Limits, Stock, StoredModel, Verdict, may_go, plan
from pool_managerd.core.narration import count, size
from pool_managerd.errors import PoolError
from pool_managerd.supervision.model_users import ModelUsers, Need
from pool_managerd.supervision.pause import pause
from pool_managerd.supervision.protocols import CachedModels
from pool_managerd.supervision.services import Services

CARE_S = 900.0
"""So often is looked at what the cache has, and done what may be."""
_NEEDED_S = 3_600.0
"""So old may what a note says of the last need be, of a model that is needed all along."""
_NAMED = 3
_CHANGES = frozenset({"download", "fetched", "model_removed", "models_gc"})


class ModelGc:
    """Of one cache. ``busy`` are the ids of models that are fetched or verified for people."""

    def __init__(
        self, users: ModelUsers, services: Services, cached: CachedModels, config: Callable[[], Config],
        busy: Callable[[], Collection[str]],
    ) -> None:  # fmt: skip
        self._users, self._s, self._cached, self._config, self._busy = users, services, cached, config, busy
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self.figures: dict[str, int] | None = None
        """What the cache had when it was last looked at: ``bytes``, and models by their lifecycle."""
        cached.on_shortage(self.make_room)
        services.events.listen(self._hear)

    # --- what people ask ---

    async def plan(self, older_than_s: float | None) -> dict[str, Any]:
        """What a run would delete, and why each of the others stays; nothing is changed. Raises NodeError."""
        stock = await self._stock(keep=False)
        return self._told(plan(stock.models, stock.leftovers, *self._asked(stock, older_than_s)), stock.limits)

    async def run(self, older_than_s: float | None) -> dict[str, Any]:
        """Delete what may go. Raises NodeError; what is deleted by then is."""
        async with self._turn:
            stock = await self._stock(keep=True)
            return self._told(await self._carried_out(stock, *self._asked(stock, older_than_s)), stock.limits)

    async def remove(self, ref: str, refuse: Callable[[], None]) -> int | None:
        """Delete this one; ``refuse`` raises where somebody needs it. The bytes that this frees, None where somebody has begun to
        need it in this moment. Raises PoolError.
        """
        async with self._turn:
            stock = await self._stock(keep=False)
            needed_at = next((one.needed_at for one in stock.models if one.ref == ref), 0.0)
            refuse()
            return await self._cached.remove(ref, needed_at)

    # --- what the node does ---

    async def make_room(self, limits: Limits) -> str:
        """For a download that does not fit: delete what may go, where that is allowed; what else could be done about it."""
        keep_s = self._keep_s
        async with self._turn:
            stock = await self._stock(keep=True)
            could = [one for one in plan(stock.models, stock.leftovers, keep_s, limits) if one.go]
            enough = may_go(could) >= limits.short_bytes
            if self._config().models.gc.enabled and enough:
                await self._carried_out(stock, keep_s, limits)
                return ""
        if not could:
            return ""
        if not enough:
            return (
                f"all that may go would free {size(may_go(could))}: pool-managerd models gc --dry-run says what, and why not more"
            )
        names = ", ".join(one.name for one in could[:_NAMED])
        more = f" and {len(could) - _NAMED} more" if len(could) > _NAMED else ""
        return f"pool-managerd models gc --older-than {keep_s / DAY_S:.0f}d would free {size(may_go(could))}: {names}{more}"

    async def care(self) -> None:
        """Forever: what is needed is noted to be, limits are kept where that is wanted, and what there is is counted."""
        trouble = ""
        while True:
            self._changed.clear()
            try:
                async with self._turn:
                    await self._look_after()
                trouble = ""
            except PoolError as problem:
                if problem.message != trouble:  # each is told once
                    trouble = problem.message
                    self._s.events.emit("notice", f"The cache of models cannot be looked after: {trouble}", level="warn")
            await pause(self._s.clock, CARE_S, self._changed)

    async def _look_after(self) -> None:
        stock = await self._stock(keep=True)
        await self._cached.need([one.ref for one in stock.models if one.users and one.idle_s >= _NEEDED_S])
        retired = sum(_idle(one, self._keep_s) for one in stock.models)
        active = len(stock.models) - retired
        self.figures = {"bytes": stock.limits.used_bytes, "active": active, "retired": retired}
        if self._config().models.gc.enabled:
            await self._carried_out(stock, self._keep_s, stock.limits)

    def _hear(self, event: Event) -> None:
        if event.type in _CHANGES:
            self._changed.set()

    # --- inside ---

    @property
    def _keep_s(self) -> float:
        return float(self._config().models.gc.keep_days * DAY_S)

    def _asked(self, stock: Stock, older_than_s: float | None) -> tuple[float, Limits | None]:
        """An age that is asked for holds alone; else no more goes than a limit of the cache makes go, where it has one."""
        if older_than_s is not None:
            return older_than_s, None
        return self._keep_s, stock.limits if self._config().models.max_bytes is not None else None

    async def _stock(self, *, keep: bool) -> Stock:
        """What there is, with who needs it."""
        wanted = {*(need.ref for need in self._users.all() if need.ref is not None), *self._fetched_or_verified()}
        stock = await self._cached.stock(wanted, keep=keep)
        needs, busy = self._users.all(), self._fetched_or_verified()
        models = tuple(replace(one, users=(*one.users, *users_of(one, needs, busy))) for one in stock.models)
        places = (_users(needs, "", [f"{stock.root}/{one.path}"]) for one in stock.leftovers)
        left = (replace(one, users=(*one.users, *users)) for one, users in zip(stock.leftovers, places, strict=True))
        return replace(stock, models=models, leftovers=tuple(left))

    def _fetched_or_verified(self) -> set[str]:
        return {*self._busy(), *self._cached.fetching()}

    async def _carried_out(self, stock: Stock, keep_s: float, limits: Limits | None) -> tuple[Verdict, ...]:
        """What became of each: who has begun to need one in the meantime keeps it."""
        models, leftovers = {one.ref: one for one in stock.models}, {one.path: one for one in stock.leftovers}
        decided, done = plan(stock.models, stock.leftovers, keep_s, limits), list[Verdict]()
        for one in decided:
            freed = await self._go(one, models, leftovers) if one.go else None
            done.append(replace(one, frees_bytes=freed or 0) if freed is not None or not one.go else _needed_now(one))
        stays = (models[one.name] for one in decided if not one.go and one.kind == "model")
        await self._cached.retire([model for model in stays if _idle(model, keep_s)])
        gone = [one for one in done if one.go]
        if gone:
            human = f"{count(len(gone), 'thing')} that nobody needs {'is' if len(gone) == 1 else 'are'} deleted from the cache of"
            names = [one.name for one in gone]
            freed_bytes = may_go(gone)
            self._s.events.emit("models_gc", f"{human} models: {size(freed_bytes)} freed", bytes=freed_bytes, deleted=names)
        return tuple(done)

    async def _go(self, verdict: Verdict, models: dict[str, StoredModel], leftovers: dict[str, Leftover]) -> int | None:
        if verdict.kind != "model":
            return await self._cached.sweep(leftovers[verdict.name])
        model = models[verdict.name]
        if users_of(model, self._users.all(), self._fetched_or_verified()):
            return None
        return await self._cached.remove(model.ref, model.needed_at)

    def _told(self, verdicts: Sequence[Verdict], limits: Limits) -> dict[str, Any]:
        rows = [
            {
                "name": one.name, "kind": one.kind, "size_bytes": one.size_bytes, "action": "delete" if one.go else "keep",
                "why": one.why, "frees_bytes": one.frees_bytes,
            }
            for one in verdicts
        ]  # fmt: skip
        return {
            "rows": rows, "freed_bytes": may_go(verdicts), "used_bytes": limits.used_bytes, "max_bytes": limits.max_bytes,
            "free_bytes": limits.free_bytes, "keep_free_bytes": limits.keep_free_bytes,
        }  # fmt: skip


def users_of(model: StoredModel, needs: Sequence[Need], busy: Collection[str] = ()) -> tuple[str, ...]:
    """Who needs it, each in a sentence."""
    found = _users(needs, model.ref, [path for path, _ in model.files])
    return (*found, *(("it is being fetched or verified",) if model.ref in busy else ()))


def _users(needs: Sequence[Need], ref: str, paths: Sequence[str]) -> list[str]:
    """Each pool once: the first reason that it has."""
    found: dict[str, str] = {}
    for need in needs:
        if need.covers(ref, paths):
            found.setdefault(need.pool_id, need.why)
    return list(found.values())


def _idle(model: StoredModel, keep_s: float) -> bool:
    return not model.users and not model.pinned and model.idle_s >= keep_s


def _needed_now(verdict: Verdict) -> Verdict:
    return replace(verdict, go=False, why="somebody has begun to need it", frees_bytes=0)
