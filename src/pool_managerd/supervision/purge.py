"""Purges, carried out: the engine ends, and what is kept on disk for its pool is deleted (core/purge.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from pool_managerd.config import Config, path_from
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.lifecycle import Phase, view
from pool_managerd.core.lifecycle import events as ev
from pool_managerd.core.narration import size
from pool_managerd.core.purge import Freed, PurgeRequest
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.supervision.asking import Asking
from pool_managerd.supervision.in_flight import a_moment
from pool_managerd.supervision.operations import Operation
from pool_managerd.supervision.pool import Pool
from pool_managerd.supervision.pools import Pools
from pool_managerd.supervision.services import Services


class Purges:
    """Of all pools of a node. ``config`` is what is in force."""

    def __init__(self, pools: Pools, services: Services, config: Callable[[], Config]) -> None:
        self._pools, self._s, self._config = pools, services, config
        self._running: dict[str, asyncio.Task[None]] = {}

    # --- for the node ---

    async def plan(self, request: PurgeRequest) -> dict[str, Any]:
        """What a purge would stop and free, without doing any of it. Raises PoolError where it would be refused."""
        pool = self._checked(request)
        found = await self._s.launcher.measure(pool.pool_id, request.places)
        stops = request.stops_by if _is_up(pool) else None
        return {"pool_id": pool.pool_id, "stops_by": stops, **_told(found, "would_remove", "would_free_bytes")}

    async def begin(self, request: PurgeRequest) -> Operation:
        """Accept a purge; what it freed is the operation's outcome. Raises PoolError for what is refused at once."""
        async with self._pools.turn(self._pools.get(request.pool_id)):
            pool = self._checked(request)
            operation = self._pools.operations.begin("purge", pool.pool_id)
            task = asyncio.create_task(self._run(request, pool, operation), name=f"purge:{pool.pool_id}")
            self._running[pool.pool_id] = task
        await self._pools.operations.kept()
        return operation

    async def close(self) -> None:
        """The daemon ends: what has no name any more is deleted by the next one."""
        running = tuple(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # --- what is refused ---

    def _checked(self, request: PurgeRequest) -> Pool:
        pool = self._pools.get(request.pool_id)
        pool_id = pool.pool_id
        if self._pools.closing:
            raise NodeError(f"cannot purge pool '{pool_id}': the daemon is shutting down")
        if self._pools.precedence.has(pool_id) or pool_id in self._running:
            doing = "purged" if pool_id in self._running else "reloaded"
            raise _refusal(pool_id, f"it is being {doing} already", "OPERATION_IN_PROGRESS")
        if self._pools.replacements.find(pool_id) is not None and not request.force:
            raise _refusal(pool_id, "the engine that it ran before has not ended yet", "OPERATION_IN_PROGRESS")
        if pool.definition.external:
            raise _refusal(pool_id, "somebody else runs its engine, and nothing of it is kept here", "NOT_OURS")
        if request.purge_engine:
            raise self._engine_not_ours(pool)
        for ref in request.purge_models:
            raise self._model_not_ours(pool, ref)
        if _is_up(pool) and request.stops_by is None:
            hint = "let it be drained first, or force it"
            raise _refusal(pool_id, f"it is {view(pool.state).state}", "POOL_IN_USE", hint)
        return pool

    def _engine_not_ours(self, pool: Pool) -> RequestError:
        engine, config = pool.launch.prepared or pool.submitted, pool.config
        package = config is not None and config.provisioning.mode == "package"
        path = engine.binary_path if isinstance(engine, PreparedEngine) else None
        if path is None and config is not None and config.provisioning.binary is not None:
            path = str(config.provisioning.binary.path)
        what = "a Python package" if package else "a program of yours"
        where = f" ({path})" if path else ""
        hint = "uninstall the package, where no other pool needs it" if package else "delete the program yourself"
        return _refusal(pool.pool_id, f"its engine is {what}{where}, not in a cache of this daemon", "NOT_OURS", hint)

    def _model_not_ours(self, pool: Pool, ref: str) -> RequestError:
        """What was fetched is not one pool's, and everything else is a file that somebody put there."""
        model_id, config = self._s.models.id_of(ref), self._config()
        if not model_id.startswith("file:"):
            why = f"the model {model_id} is kept for all pools"
            return _refusal(pool.pool_id, why, "NOT_OURS", f"pool-managerd models rm {model_id}, when no pool has it any more")
        configured = ((one.pool_id, one.config) for one in self._pools.all())
        users = [pool_id for pool_id, c in configured if c is not None and self._s.models.id_of(c.model) == model_id]
        others = [pool_id for pool_id in users if pool_id != pool.pool_id]
        path = str(path_from(config.base_dir, model_id.removeprefix("file:")))
        where = f" ({path})" if path not in model_id else ""
        shared = f", and pools run it: {', '.join(others)}" if others else ""
        hint = f"delete it yourself{', when no pool runs it any more' if users else ''}"
        why = f"the model {model_id}{where} is a file of yours, not in a cache of this daemon{shared}"
        return _refusal(pool.pool_id, why, "NOT_OURS", hint)

    # --- carrying it out ---

    async def _run(self, request: PurgeRequest, pool: Pool, operation: Operation) -> None:
        outcome: dict[str, Any] | None = None
        error: PoolError | None = None
        try:
            with self._s.slots.unwanted(pool.pool_id) if request.delete_cache_dirs else nullcontext():
                await self._stop(request, pool)
            outcome = await self._delete(request, pool)
        except asyncio.CancelledError:
            error = NodeError(f"cannot finish the purge of pool '{pool.pool_id}': the daemon is shutting down")
        except PoolError as problem:
            error = problem
        except Exception as problem:  # noqa: BLE001 - the task's boundary: whoever waits must be told
            error = self._s.events.fault(f"while pool '{pool.pool_id}' was purged", problem, pool.pool_id)
        finally:
            self._running.pop(pool.pool_id, None)
        if error is not None:
            self._s.events.clean_error(error)
        self._pools.operations.finish(operation, outcome, error)

    async def _stop(self, request: PurgeRequest, pool: Pool) -> None:
        """Until it is down; one that fails again and again is started no more."""
        if pool.instance.phase is Phase.DOWN and self._pools.replacements.find(pool.pool_id) is None:
            return
        if request.force or not _is_up(pool):
            ended = await self._pools.change(pool, "stop", ev.Stop(), "down", desired="down")
        else:
            drain = ev.Drain(self._config().lifecycle.drain_deadline_ms, 0)
            ended = await self._pools.change(pool, "drain", drain, "drained", desired="drained")
        await ended.wait()
        while self._pools.replacements.find(pool.pool_id) is not None:  # it was stopped, too, and uses the same directories
            await a_moment(self._s)

    async def _delete(self, request: PurgeRequest, pool: Pool) -> dict[str, Any]:
        """Between the look at the pool and the moment from which its directories have no name nothing is waited for."""
        pool_id = pool.pool_id
        async with self._pools.turn(pool):
            if self._pools.find(pool_id) is not pool or not self._is_at_rest(pool):
                raise _refusal(pool_id, f"somebody started it meanwhile: it is {view(pool.state).state}", "OPERATION_CANCELLED")
            found = await self._s.launcher.purge(pool_id, request.places)
            if self._is_at_rest(pool):
                await Asking(self._pools, self._s.clock).begin(pool, ev.Purge(), "now")
        told = _told(found, "removed", "freed_bytes")
        human = f"Pool '{pool_id}' is purged: {size(told['freed_bytes'])} freed"
        self._s.events.emit("purged", human, pool_id=pool_id, **told)
        return {"pool_id": pool_id, **told}

    def _is_at_rest(self, pool: Pool) -> bool:
        """Nothing of it runs, and nothing has begun that would."""
        waits = self._pools.precedence.has(pool.pool_id) or self._pools.replacements.find(pool.pool_id) is not None
        return pool.instance.phase is Phase.DOWN and not waits


def _is_up(pool: Pool) -> bool:
    """It serves, or is about to: somebody may count on it."""
    seen = view(pool.state)
    return seen.live or seen.ready or seen.draining


def _told(found: Sequence[Freed], rows: str, total: str) -> dict[str, Any]:
    listed: Iterable[Freed] = sorted(found, key=lambda one: one.path)
    return {rows: [{"path": one.path, "bytes": one.bytes} for one in listed], total: sum(one.bytes for one in found)}


def _refusal(pool_id: str, why: str, code: str, hint: str | None = None) -> RequestError:
    return RequestError(
        f"cannot purge pool '{pool_id}': {why}", code=code, status=409, pool_id=pool_id, hint=hint,
        retriable=code == "OPERATION_IN_PROGRESS",
    )  # fmt: skip
