"""The models in the cache, for people: fetched beforehand, listed, verified anew, removed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from pool_managerd.config import Config, PoolConfig
from pool_managerd.core.narration import size
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.fetching import Pace, told
from pool_managerd.supervision.model_gc import ModelGc
from pool_managerd.supervision.model_users import ModelUsers
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.prospects import Proposal, Prospects, propose
from pool_managerd.supervision.protocols import CachedModels
from pool_managerd.supervision.services import Services


class _Tell(Protocol):
    """``done`` of ``total`` bytes; of what is fetched or hashed, unless ``doing`` says otherwise."""

    def __call__(self, done: int, total: int, doing: str = "") -> None: ...


class ModelCacheWork:
    """Of one node. What is fetched here is not for any pool; a pool that wants the same meanwhile shares the download."""

    def __init__(self, pools: Pools, services: Services, cached: CachedModels, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._cached = pools, services, cached
        self._prospects = Prospects(pools, services, config().gpu.overhead_mib << 20)
        self._running: dict[str, tuple[Operation, asyncio.Task[None]]] = {}
        self._removing: set[str] = set()
        self._users = ModelUsers(pools, services, config)
        self.gc = ModelGc(self._users, services, cached, config, lambda: self._running)

    async def close(self) -> None:
        """The daemon ends: what was fetched by now is kept."""
        running = tuple(task for _, task in self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # --- reads ---

    async def rows(self, *, everywhere: bool = False) -> list[dict[str, Any]]:
        """What the cache has, by reference; ``everywhere``: then what other tools have on this machine. Raises NodeError."""
        rows, others = await self._cached.cached(), await self._cached.elsewhere() if everywhere else []
        here, paths = {row["ref"] for row in rows}, _own_paths(rows)
        return [
            *(self._with_pools(row, paths[row["ref"]]) for row in rows),
            *(self._with_pools(row, [row["path"]]) if row["ref"] not in here else row | {"pools": []} for row in others),
        ]

    async def plan(self, ref: str) -> dict[str, Any]:
        """What a pull would fetch, and what it would need here; nothing but headers is read. Raises PoolError."""
        row, model_id = await self._cached.look(ref), self._s.models.id_of(ref)
        if row["present"]:
            return row
        users = self._configured_with(model_id)
        ahead = await self._s.models.foresee(ref, users[0].checksums if users else (), fresh=True)
        return row if ahead is None else await self._prospects.plan(ref, ahead, users)

    async def propose(self, wanted: PoolConfig) -> Proposal:
        """How a pool would run here whose keys are not all given. Raises PoolError."""
        return await propose(self._pools, self._s, wanted)

    # --- changes ---

    async def pull(self, ref: str) -> Operation:
        """Fetch it, or find that it is there. The outcome is its row. Raises PoolError for what is refused at once."""
        self._cached.check_ref(ref)
        return await self._begin("pull", ref, lambda tell: self._pull(ref, tell))

    async def verify(self, ref: str) -> Operation:
        """Hash it anew. The outcome has ``ok``, and ``wrong``: the files that are not what was fetched. Raises PoolError."""
        return await self._begin("verify", await self._known(ref), lambda tell: self._cached.rehash(ref, tell))

    async def remove(self, ref: str) -> dict[str, Any]:
        """Delete it from the cache. Raises RequestError MODEL_IN_USE while anything needs it, or it is pinned."""
        model_id = await self._known(ref)
        if model_id in self._removing:
            raise _in_use(model_id, "it is just being deleted", "")
        self._removing.add(model_id)
        try:
            rows = await self._cached.cached()
            paths, pinned = _own_paths(rows).get(model_id, []), _is_pinned(rows, model_id)
            freed = await self.gc.remove(ref, lambda: self._check_unneeded(model_id, paths, pinned=pinned))
        finally:
            self._removing.discard(model_id)
        if freed is None:
            raise _in_use(
                model_id, "another daemon needs it, or somebody has begun to", "models gc --dry-run shows who needs what"
            )
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
            return self._with_pools(row, row["paths"])

        return await self._begin("import", ref, work)

    async def cancel(self, ref: str) -> Operation:
        """Break off what is under way with it for people; pools that fetch the same go on. Raises RequestError MODEL_NOT_BUSY."""
        model_id = self._s.models.id_of(ref)
        running = self._running.get(model_id)
        if running is None:
            raise RequestError(
                f"cannot cancel {model_id}: nothing is under way with it", code="MODEL_NOT_BUSY", status=409,
                hint="pool-managerd operations shows what is; a pool's own download ends with: pool-managerd stop POOL",
            )  # fmt: skip
        operation, task = running
        task.cancel()
        await asyncio.wait([task])
        return operation

    async def pin(self, ref: str, *, pinned: bool) -> dict[str, Any]:
        """Never delete it until this is taken back; its row. Raises RequestError MODEL_NOT_CACHED."""
        model_id = await self._known(ref)
        before = _is_pinned(await self._cached.cached(), model_id)
        await self._cached.pin(ref, pinned=pinned)
        if before != pinned:
            human = f"The model {model_id} is pinned: it stays" if pinned else f"The model {model_id} is not pinned any more"
            self._s.events.emit("model_pinned", human, model_id=model_id, pinned=pinned)
        return await self._row(model_id)

    # --- inside ---

    def _check_unneeded(self, model_id: str, paths: list[str], *, pinned: bool) -> None:
        """Raises RequestError MODEL_IN_USE with who needs it."""
        if model_id in self._running or model_id in self._cached.fetching():
            raise _in_use(model_id, "it is being fetched or verified", "wait for that, and ask again")
        found = {need.pool_id: need.why for need in reversed(self._users.all()) if need.covers(model_id, paths)}
        if found:
            raise _in_use(
                model_id,
                "; ".join(found[pool_id] for pool_id in sorted(found)),
                "take it out of the configuration first, or wait for what is under way",
            )
        if pinned:
            raise _in_use(model_id, "it is pinned", f"pool-managerd models unpin {model_id}")

    def _with_pools(self, row: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
        return _shown(row, [need.pool_id for need in self._users.all() if need.covers(row["ref"], paths)])

    def _configured_with(self, model_id: str) -> list[PoolConfig]:
        configured = (pool.config for pool in self._pools.all() if pool.config is not None)
        return [config for config in configured if self._s.models.id_of(config.model) == model_id]

    async def _row(self, model_id: str) -> dict[str, Any]:
        row = next((row for row in await self.rows() if row["ref"] == model_id), None)
        if row is None:
            raise NodeError(f"cannot find {model_id} in the cache: it was changed there meanwhile")
        return row

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
        running = self._running.get(model_id)
        if running is not None and running[0].kind == f"model_{kind}" and kind != "import":
            return running[0]
        if model_id in self._running or model_id in self._removing:
            raise RequestError(
                f"cannot {kind} {model_id}: it is being fetched, verified or deleted already",
                code="OPERATION_IN_PROGRESS",
                status=409,
            )
        operation = self._pools.operations.begin(f"model_{kind}", "")
        task = asyncio.create_task(self._run(operation, model_id, work), name=f"{kind}:{model_id}")
        self._running[model_id] = operation, task
        await self._pools.operations.kept()
        return operation

    async def _run(self, operation: Operation, model_id: str, work: Callable[[_Tell], Awaitable[dict[str, Any]]]) -> None:
        outcome: dict[str, Any] | None = None
        error: PoolError | None = None
        pace = Pace(self._s.clock)

        def tell(done: int, total: int, doing: str = "") -> None:
            pace.seen(done)
            human = f"{model_id}: {doing}{doing and ' '}{told(done, total, pace.bytes_per_s)}"
            operation.progress = {"done": done, "total": total, "human": human, **({"doing": doing} if doing else {})}

        try:
            outcome = await work(tell)
        except asyncio.CancelledError:
            kept = "nothing of it is" if operation.kind == "model_import" else "what is there by now is"
            why = "the daemon is shutting down" if self._pools.closing else "it was cancelled"
            error = NodeError(f"cannot finish with {model_id}: {why}; {kept} kept", retriable=self._pools.closing)
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
        digests = next((config.checksums for config in self._configured_with(model_id)), ())
        await self._s.models.fetch(ref, digests, progress=tell, unpacking=partial(tell, doing="unpacking"))
        row = next((row for row in await self.rows() if row["ref"] == model_id), None)
        if row is None and (used := await self._cached.used(ref)) is not None:
            return self._with_pools(used, [used["path"]])
        row = row or await self._row(model_id)
        self._s.events.emit("fetched", f"The model {model_id} is in the cache", model_id=model_id, bytes=row["size_bytes"])
        return row


def _shown(row: dict[str, Any], pools: Sequence[str]) -> dict[str, Any]:
    """With the pools that need it."""
    return {key: value for key, value in row.items() if key != "paths"} | {"pools": sorted(set(pools))}


def _own_paths(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By reference, the files that would go with it: no other one has them."""
    having = Counter(path for row in rows for path in row["paths"])
    return {row["ref"]: [path for path in row["paths"] if having[path] == 1] for row in rows}


def _is_pinned(rows: Sequence[dict[str, Any]], model_id: str) -> bool:
    return any(row["pinned"] for row in rows if row["ref"] == model_id)


def _in_use(model_id: str, why: str, hint: str) -> RequestError:
    return RequestError(f"cannot remove {model_id}: {why}", code="MODEL_IN_USE", status=409, hint=hint or None)
