"""The models in the cache, for people: fetched beforehand, listed, verified anew, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.fetching import Pace, told
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.protocols import CachedModels
from pool_managerd.supervision.services import Services

_Tell = Callable[[int, int], None]


class ModelCacheWork:
    """Of one node. What is fetched here is not for any pool; a pool that wants the same meanwhile shares the download."""

    def __init__(self, pools: Pools, services: Services, cached: CachedModels) -> None:
        self._pools, self._s, self._cached = pools, services, cached
        self._running: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """The daemon ends: what was fetched by now is kept."""
        running = tuple(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # --- reads ---

    async def rows(self, *, everywhere: bool = False) -> list[dict[str, Any]]:
        """What the cache has, by reference; ``everywhere``: then what other tools have on this machine. Raises NodeError."""
        rows, others = await self._cached.cached(), await self._cached.elsewhere() if everywhere else []
        users, here = self._users(), {row["ref"] for row in rows}
        others = [row | {"pools": [] if row["ref"] in here else sorted(users.get(row["ref"], ()))} for row in others]
        return [*(row | {"pools": sorted(users.get(row["ref"], ()))} for row in rows), *others]

    async def plan(self, ref: str) -> dict[str, Any]:
        """What a pull would fetch; nothing is. Raises PoolError."""
        return await self._cached.look(ref)

    # --- changes ---

    async def pull(self, ref: str) -> Operation:
        """Fetch it, or find that it is there. The outcome is its row. Raises PoolError for what is refused at once."""
        self._cached.check_ref(ref)
        return await self._begin("pull", ref, lambda tell: self._pull(ref, tell))

    async def verify(self, ref: str) -> Operation:
        """Hash it anew. The outcome has ``ok``, and ``wrong``: the files that are not what was fetched. Raises PoolError."""
        return await self._begin("verify", await self._known(ref), lambda tell: self._cached.rehash(ref, tell))

    async def remove(self, ref: str) -> dict[str, Any]:
        """Delete it from the cache. Raises RequestError MODEL_IN_USE while a pool is configured with it."""
        model_id = await self._known(ref)
        users = sorted(self._users().get(model_id, ()))
        if users or model_id in self._running:
            why = f"pools are configured with it: {', '.join(users)}" if users else "it is being fetched or verified"
            raise RequestError(
                f"cannot remove {model_id}: {why}", code="MODEL_IN_USE", status=409,
                hint="take it out of the configuration first" if users else "wait for that, and ask again",
            )  # fmt: skip
        freed = await self._cached.remove(ref)
        self._s.events.emit(
            "model_removed", f"The model {model_id} is removed: {size(freed)} freed", bytes=freed, model_id=model_id
        )
        return {"ref": model_id, "freed_bytes": freed}

    async def bring(self, path: str, name: str | None, digests: Sequence[str]) -> Operation:
        """Bring a file of this machine into the cache. The outcome is its row. Raises PoolError for what is refused at once."""
        ref = self._cached.check_import(path, name, digests)

        async def work(tell: _Tell) -> dict[str, Any]:
            row = await self._cached.bring(path, name, digests, tell)
            self._s.events.emit("fetched", f"The model {ref} is in the cache", model_id=ref, bytes=row["size_bytes"])
            return self._with_pools(row)

        return await self._begin("import", ref, work)

    # --- inside ---

    def _with_pools(self, row: dict[str, Any]) -> dict[str, Any]:
        return row | {"pools": sorted(self._users().get(row["ref"], ()))}

    def _users(self) -> dict[str, set[str]]:
        """Pools by the reference that they are configured with, or run by a reload."""
        found: dict[str, set[str]] = {}
        for pool in self._pools.all():
            running = pool.launch.prepared.model_id if pool.launch.prepared is not None else None
            for ref in (None if pool.config is None else self._s.models.id_of(pool.config.model), running):
                if ref is not None:
                    found.setdefault(ref, set()).add(pool.pool_id)
        return found

    async def _known(self, ref: str) -> str:
        self._cached.check_ref(ref)
        model_id = self._s.models.id_of(ref)
        if not any(row["ref"] == model_id for row in await self._cached.cached()):
            raise RequestError(
                f"the model {model_id} is not in the cache", code="MODEL_NOT_CACHED", status=404,
                hint="pool-managerd models ls shows what is",
            )  # fmt: skip
        return model_id

    async def _begin(self, kind: str, ref: str, work: Callable[[_Tell], Awaitable[dict[str, Any]]]) -> Operation:
        model_id = self._s.models.id_of(ref)
        if self._pools.closing:
            raise NodeError(f"cannot {kind} {model_id}: the daemon is shutting down")
        if model_id in self._running:
            raise RequestError(
                f"cannot {kind} {model_id}: it is being fetched or verified already", code="OPERATION_IN_PROGRESS", status=409
            )
        operation = self._pools.operations.begin(f"model_{kind}", "")
        self._running[model_id] = asyncio.create_task(self._run(operation, model_id, work), name=f"{kind}:{model_id}")
        await self._pools.operations.kept()
        return operation

    async def _run(self, operation: Operation, model_id: str, work: Callable[[_Tell], Awaitable[dict[str, Any]]]) -> None:
        outcome: dict[str, Any] | None = None
        error: PoolError | None = None
        pace = Pace(self._s.clock)

        def tell(done: int, total: int) -> None:
            pace.seen(done)
            operation.progress = {"done": done, "total": total, "human": f"{model_id}: {told(done, total, pace.bytes_per_s)}"}

        try:
            outcome = await work(tell)
        except asyncio.CancelledError:
            kept = "nothing of it is" if operation.kind == "model_import" else "what is there by now is"
            error = NodeError(f"cannot finish with {model_id}: the daemon is shutting down; {kept} kept")
        except PoolError as problem:
            error = problem
        except Exception as problem:  # noqa: BLE001 - the task's boundary: whoever waits must be told
            error = self._s.events.fault(f"while the model {model_id} was fetched or verified", problem, None)
        finally:
            self._running.pop(model_id, None)
        if error is not None:
            self._s.events.clean_error(error)
        self._pools.operations.finish(operation, outcome, error)

    async def _pull(self, ref: str, tell: _Tell) -> dict[str, Any]:
        model_id = self._s.models.id_of(ref)
        configured = (pool.config for pool in self._pools.all() if pool.config is not None)
        same = (config.checksums for config in configured if self._s.models.id_of(config.model) == model_id)
        await self._s.models.fetch(ref, next(same, ()), progress=tell)
        row = next((row for row in await self.rows() if row["ref"] == model_id), None)
        if row is None and (used := await self._cached.used(ref)) is not None:
            return self._with_pools(used)
        if row is None:
            raise NodeError(f"cannot find {model_id} in the cache: it was changed there meanwhile")
        self._s.events.emit("fetched", f"The model {model_id} is in the cache", model_id=model_id, bytes=row["size_bytes"])
        return row
