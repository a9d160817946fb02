"""A node without engines: what the control API and the CLI are tested against. Its pools change only when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pool_managerd.config import Config
from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.baselines import Baseline
from pool_managerd.core.bench import BenchRequest
from pool_managerd.core.crash import CrashClass
from pool_managerd.core.crash_report import CrashReport, Evidence, Source, remediation
from pool_managerd.core.event import Event
from pool_managerd.core.purge import PurgeRequest
from pool_managerd.core.redaction import Redactor
from pool_managerd.errors import EngineError, PoolError, RequestError, SpecError
from pool_managerd.supervision.log_places import LogPlaces
from tests.api.fake_cache import FakeCache
from tests.api.fake_devices import FakeDevices

Json = dict[str, Any]
READY_POOL: Mapping[str, Any] = MappingProxyType({
    "pool_id": "", "state": "ready", "live": True, "ready": True, "draining": False, "slots_total": 2, "engine": "llamacpp",
    "engine_version": "b1", "model_id": "tiny", "device_mask": None, "crash_count": 0, "restart_count": 0, "last_error": None,
    "last_heartbeat_ms": 1, "circuit_state": "closed", "pid": 4242, "url": "http://127.0.0.1:8080", "isolation": "no_new_privs",
    "reason": None, "held": False, "drained": False, "next_restart_at_ms": None, "preload": None,
    "perf": {"first_token_ms": 5.0, "tokens_per_s": 90.0, "measured_with": "warm-up of 16 tokens", "measured_at_ms": 1},
    "baselines": [Baseline(5.0, 90.0, 3, "warm-up of 16 tokens", 1).to_dict()],
    "replica_id": "r0", "epoch": 1, "profile": "dev", "configured": True,
})  # fmt: skip


_LOAD = {
    "requests": 1, "runs": 2, "first_token_ms_p50": 12.0, "between_tokens_ms_p50": 9.5, "between_tokens_ms_p99": 11.0,
    "tokens_per_s": 100.0, "tokens_per_s_total": 80.0, "prompt_tokens_per_s": 900.5,
}  # fmt: skip
_FULL = {"requests": 4, "first_token_ms_p50": 40.0, "tokens_per_s_total": 160.0, "prompt_tokens_per_s": None}
BENCH: Mapping[str, Any] = MappingProxyType({
    "engine": "llamacpp", "engine_version": "b1", "model_id": "file:models/tiny", "device_mask": None, "duration_ms": 900,
    "measured_with": "bench of 8 tokens behind a prompt of 512, 2 runs", "tokens": 8, "prompt_tokens": 512, "runs": 2, "slots": 4,
    "pool_id": "demo", "alone": _LOAD, "full": {**_LOAD, **_FULL},
})  # fmt: skip


class FakeSubscription:
    def __init__(self, past: list[Event], limit: int) -> None:
        self.queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._limit = limit
        self.closed = False
        for event in past:
            self.queue.put_nowait(event)

    def push(self, event: Event) -> None:
        if not self.closed and self.queue.qsize() >= self._limit:
            self.closed = True
            while not self.queue.empty():
                self.queue.get_nowait()
            self.queue.put_nowait(None)
        elif not self.closed:
            self.queue.put_nowait(event)

    async def __anext__(self) -> Event:
        event = await self.queue.get()
        if event is None:
            raise StopAsyncIteration
        return event

    def close(self) -> None:
        self.closed = True

    def __aiter__(self) -> FakeSubscription:
        return self

    def __enter__(self) -> FakeSubscription:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FakeEvents:
    def __init__(self) -> None:
        self.log: list[Event] = []
        self.subscriptions: list[FakeSubscription] = []
        self._listeners: list[Callable[[Any], None]] = []
        self.queue_limit = 1000
        self.redactor = Redactor()
        self.state_trouble: str | None = None

    def publish(
        self, type: str, pool_id: str | None = None, *, journal: bool = True, human: str = "It happened", **fields: Any
    ) -> Event:
        event = Event(len(self.log) + 1, 1_795_000_000_000, type, "info", pool_id, human, fields, journal)
        self.log.append(event)
        for listener in self._listeners:
            listener(event)
        for subscription in self.subscriptions:
            subscription.push(event)
        return event

    def listen(self, fn: Callable[[Any], None], /) -> Callable[[], None]:
        self._listeners.append(fn)
        return lambda: self._listeners.remove(fn)

    def clean_error(self, problem: PoolError, /) -> PoolError:
        return self.redactor.error(problem)

    def subscribe(self, after_id: int | None) -> FakeSubscription:
        past = [] if after_id is None else [event for event in self.log if event.id > after_id]
        if after_id is not None and after_id > len(self.log):
            past = [Event(0, 1, "gap", "warn", None, "Not all is kept", {"after_id": after_id, "oldest_id": 1}), *self.log]
        subscription = FakeSubscription(past, self.queue_limit)
        self.subscriptions.append(subscription)
        return subscription


class FakeOperation:
    def __init__(self, operation_id: str, kind: str, pool_id: str) -> None:
        self.operation_id, self.kind, self.pool_id = operation_id, kind, pool_id
        self.result: asyncio.Future[Json] = asyncio.get_running_loop().create_future()

    def to_dict(self) -> Json:
        status = "running"
        outcome: Json | None = None
        if self.result.done():
            status = "failed" if self.result.exception() else "succeeded"
            outcome = None if self.result.exception() else self.result.result()
        body: Json = {
            "operation_id": self.operation_id,
            "kind": self.kind,
            "pool_id": self.pool_id,
            "status": status,
            "outcome": outcome,
        }
        if status == "failed":
            error = self.result.exception()
            body["error"] = {
                "code": getattr(error, "code", "INTERNAL"),
                "message": str(error),
                "hint": getattr(error, "hint", None),
            }
        return body

    async def wait(self) -> Json:
        return await self.result


class FakeNode(FakeCache, FakeDevices):
    """``auto`` ends every operation at once; otherwise a test sets ``operation.result`` itself."""

    def __init__(self, config: Config | None = None, *, auto: bool = True) -> None:
        super().__init__()
        self.config = config or Config()
        self.version = "0.1.0"
        self.events = FakeEvents()
        self.more_of_outcomes: Json = {}
        self.auto = auto
        self.ops: dict[str, FakeOperation] = {}
        self.pools: dict[str, Json] = {}
        self.lease_ids: dict[str, list[str]] = {}
        self.past_leases: set[str] = set()
        self.submitted: list[PreparedEngine | None] = []
        self.calls: list[tuple[str, str]] = []
        self.purges: list[PurgeRequest] = []
        self.benched: list[tuple[str, int | None, int | None, int]] = []
        self.places = LogPlaces()
        self.fail_next: PoolError | Exception | None = None
        self.log_file = Path("/nonexistent")  # a test that reads the log says where it is
        self.devices_problem: Json | None = None
        self.explanation: Json | None = None
        self.add("demo")

    def add(self, pool_id: str, **changes: Any) -> None:
        self.pools[pool_id] = dict(READY_POOL) | {"pool_id": pool_id, "baselines": [*READY_POOL["baselines"]]} | changes
        self.lease_ids[pool_id] = []

    def _pool(self, pool_id: str) -> Json:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        if pool_id not in self.pools:
            raise RequestError(f"pool {pool_id} not found", code="POOL_NOT_FOUND", status=404, pool_id=pool_id)
        return self.pools[pool_id]

    def pool_ids(self) -> list[str]:
        return sorted(self.pools)

    def status(self, pool_id: str) -> Json:
        pool = self._pool(pool_id)
        held = len(self.lease_ids[pool_id])
        return pool | {"active_leases": held, "slots_free": pool["slots_total"] - held}

    def statuses(self) -> list[Json]:
        return [self.status(pool_id) for pool_id in self.pool_ids()]

    def health(self, pool_id: str) -> Json:
        pool = self._pool(pool_id)
        return {key: pool[key] for key in ("live", "ready", "draining")} | {"metrics": {"active_leases": 0}}

    def leases(self, pool_id: str) -> list[Json]:
        self._pool(pool_id)
        return [{"lease_id": lease, "holder": None, "given_at_ms": 1, "expires_at_ms": None} for lease in self.lease_ids[pool_id]]

    def crashes(self, pool_id: str | None = None) -> list[Json]:
        return [
            CrashReport(
                pool_id or "demo", 1, 1_795_000_000_000, CrashClass.BAD_FLAGS, human="It fell", summary="exit_code=1",
                last_error='health check failed: its log says "error: invalid argument: --ctx-siz"',
                evidence=(Evidence(Source.EXIT_RECORD, "exit code 1, by itself"),
                          Evidence(Source.LOG, "error: invalid argument: --ctx-siz", 40)),
                remedy=remediation("fix_flags", "demo"), action="starting it again in 1 s", exit_code=1, uptime_seconds=2.0,
                engine="llamacpp", engine_version="b1", log_tail=("loading", "error: invalid argument: --ctx-siz"),
            ).to_json()
        ]  # fmt: skip

    def command(self, pool_id: str) -> Json:
        self._pool(pool_id)
        return {"pool_id": pool_id, "argv": ["llama-server", "--port", "8080"], "env": {"HF_TOKEN": "***"}, "cwd": "/"}

    def log_path(self, pool_id: str, replica_id: str | None = None) -> Path:
        self._pool(pool_id)
        return self.log_file if replica_id is None else self.log_file.with_suffix(f".{replica_id}")

    def log_places(self, pool_id: str) -> LogPlaces:
        self._pool(pool_id)
        return self.places

    def readiness(self) -> tuple[bool, list[Json]]:
        missing = [p for p in self.statuses() if not p["ready"]]
        return not missing, [{"pool_id": p["pool_id"], "state": p["state"], "last_error": p["last_error"]} for p in missing]

    def capabilities(self) -> Json:
        return {"profile": "dev", "engines": ["llamacpp"]}

    def routes(self) -> dict[str, Any]:
        return {"pools": [], "gone": [], "waiting": False}

    def snapshots(self) -> Json:
        return {
            "version": 1, "taken_at_ms": 18_000, "devices_stale": self.devices_problem is not None, "devices_taken_at_ms": 1_000,
            "devices_age_ms": 17_000, "devices_problem": self.devices_problem, "pools": self.statuses(),
        }  # fmt: skip

    def operations(self) -> list[Json]:
        return [operation.to_dict() for operation in self.ops.values()]

    def operation(self, operation_id: str) -> Json:
        if operation_id not in self.ops:
            raise RequestError(f"operation {operation_id} not found", code="OPERATION_NOT_FOUND", status=404)
        return self.ops[operation_id].to_dict()

    async def explain(self, pool_id: str) -> Json:
        self._pool(pool_id)
        return self.explanation or {
            "pool_id": pool_id,
            "would": "Would start llama.cpp on CPU",
            "steps": [{"kind": "spawn", "detail": "x"}],
            "blockers": [],
        }

    def parse_prepared(self, body: Mapping[str, Any], pool_id: str) -> PreparedEngine:
        if "binary_path" not in body:
            raise SpecError("cannot use the PreparedEngine: binary_path is missing")
        return PreparedEngine(pool_id, str(body["binary_path"]), verbatim=True)

    def _accept(self, kind: str, pool_id: str, outcome: Json | None = None) -> FakeOperation:
        self._pool(pool_id)
        self.calls.append((kind, pool_id))
        operation = FakeOperation(f"op-{len(self.ops) + 1}", kind, pool_id)
        self.ops[operation.operation_id] = operation
        if self.auto:
            operation.result.set_result(outcome or {"pool_id": pool_id, **self.more_of_outcomes})
        return operation

    async def preload(self, pool_id: str, engine: PreparedEngine | None = None) -> FakeOperation:
        if engine is not None and pool_id not in self.pools:
            self.add(pool_id)
        self.submitted.append(engine)
        return self._accept("preload", pool_id, {"pool_id": pool_id, "pid": 4242, "handoff_path": ".runtime/engines/engine.json"})

    async def cancel_preload(self, pool_id: str) -> FakeOperation:
        return self._accept("cancel_preload", pool_id)

    async def plan_purge(self, request: PurgeRequest) -> Json:
        self._pool(request.pool_id)
        self.purges.append(request)
        rows = [{"path": f"/run/{place}/{request.pool_id}", "bytes": 4 << 20} for place in sorted(request.places)]
        return {
            "pool_id": request.pool_id, "stops_by": request.stops_by, "would_remove": rows, "would_free_bytes": len(rows) << 22,
        }  # fmt: skip

    async def purge(self, request: PurgeRequest) -> FakeOperation:
        plan = await self.plan_purge(request)
        outcome = {"pool_id": request.pool_id, "removed": plan["would_remove"], "freed_bytes": plan["would_free_bytes"]}
        return self._accept("purge", request.pool_id, outcome)

    async def bench(self, request: BenchRequest) -> FakeOperation:
        self.benched.append((request.pool_id, request.tokens, request.prompt_tokens, request.runs))
        return self._accept("bench", request.pool_id, {**BENCH, "pool_id": request.pool_id})

    def cancel_bench(self, pool_id: str) -> FakeOperation:
        return self._accept("cancel_bench", pool_id)

    async def start(self, pool_id: str) -> FakeOperation:
        return self._accept("start", pool_id)

    async def stop(self, pool_id: str) -> FakeOperation:
        return self._accept("stop", pool_id)

    async def evict(self, pool_id: str) -> FakeOperation:
        return self._accept("evict", pool_id)

    async def restart(self, pool_id: str) -> FakeOperation:
        return self._accept("restart", pool_id)

    async def hold(self, pool_id: str) -> FakeOperation:
        return self._accept("hold", pool_id)

    async def release(self, pool_id: str) -> FakeOperation:
        return self._accept("release", pool_id)

    async def undrain(self, pool_id: str) -> FakeOperation:
        return self._accept("undrain", pool_id)

    async def reset_breaker(self, pool_id: str) -> FakeOperation:
        return self._accept("reset_breaker", pool_id)

    async def drain(self, pool_id: str, deadline_ms: int | None = None) -> FakeOperation:
        outcome = {"pool_id": pool_id, "force_stopped": False, "duration_ms": deadline_ms or 0, "final_lease_count": 0}
        return self._accept("drain", pool_id, outcome)

    async def take_lease(
        self, pool_id: str, holder: str | None = None, ttl_ms: int | None = None, *, key: str | None = None
    ) -> Json:
        pool, held = self._pool(pool_id), self.lease_ids[pool_id]
        if len(held) >= pool["slots_total"]:
            raise RequestError(
                f"cannot lease a slot of pool {pool_id}: none is free", code="NO_FREE_SLOTS", status=409, retriable=True
            )
        held.append(f"l{len(self.past_leases) + len(held) + 1}")
        return {"lease_id": held[-1], "active_leases": len(held)}

    async def prolong_lease(self, pool_id: str, lease_id: str, ttl_ms: int) -> Json:
        self._pool(pool_id)
        return {"lease_id": lease_id, "expires_at_ms": 1 + ttl_ms}

    async def give_lease_back(self, pool_id: str, lease_id: str) -> Json:
        self._pool(pool_id)
        if lease_id in self.lease_ids[pool_id]:
            self.lease_ids[pool_id].remove(lease_id)
            self.past_leases.add(lease_id)
        elif lease_id not in self.past_leases:
            raise RequestError(f"lease {lease_id} not found", code="LEASE_NOT_FOUND", status=404)
        return {"active_leases": len(self.lease_ids[pool_id])}

    async def register(self, pool_id: str) -> bool:
        self.add(pool_id)
        return True

    async def deregister(self, pool_id: str) -> bool:
        return self.pools.pop(pool_id, None) is not None

    def fail(self, message: str) -> None:
        """The next call about a pool is refused with an engine error."""
        self.fail_next = EngineError(message, hint="look at the log")
