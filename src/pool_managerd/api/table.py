"""The route table of the control API: everything that is served, once (SPEC §11.1, DESIGN §7)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pool_managerd.api import acquire, bodies, changes, models, queue_schemas, reads, schemas, streams, yields
from pool_managerd.api.apply_schemas import AppliedConfiguration, ApplyAnswer
from pool_managerd.api.crash_schemas import Crash
from pool_managerd.api.model_schemas import CachedModel, GcAnswer, ModelRemoved, PullAnswer
from pool_managerd.api.routing import Handler, Query, Route

_POOL = "/pools/{pool_id}"
_LEASE = f"{_POOL}/leases/{{lease_id}}"
_DEVICE = "/devices/{device}"
_BOOL: dict[str, object] = {"type": "boolean"}
_WAIT = Query("wait", "true: answer when the operation has ended (200); false: at once (202).", _BOOL)
_OP: dict[int, type[BaseModel] | None] = {202: schemas.OperationAnswer, 200: schemas.OperationAnswer}


def _read(path: str, summary: str, handler: Handler, answer: type[BaseModel] | None, *errors: int, **more: Any) -> Route:
    return Route("GET", path, summary, handler, {200: answer}, errors, **more)


def _change(path: str, summary: str, handler: Handler, *, method: str = "POST", bare: bool = False, drain: bool = False) -> Route:
    """A change of a pool that ends as an operation."""
    body = bodies.DrainBody if drain else bodies.NoBody
    errors = (400, 404, 408, 409, 413, 415, 500, 503, 507)
    return Route(method, _POOL + path, summary, handler, _OP, errors=errors, body=body, query=(_WAIT,), bare=bare)


def _without_body(path: str, summary: str, handler: Handler, answer: type[BaseModel], *errors: int) -> Route:
    """A change that takes no body."""
    return Route("POST", path, summary, handler, {200: answer}, (400, 408, 413, 415, *errors), bodies.NoBody)


_REGISTERED: dict[int, type[BaseModel] | None] = {200: schemas.Registered}
LEASE_ROUTES = (
    Route(
        "POST", f"{_POOL}/leases", "Take a lease on a slot", changes.allocate_lease, {201: schemas.LeaseGiven},
        (400, 404, 409, 413, 415, 503, 507), bodies.LeaseBody,
    ),
    _read(f"{_POOL}/leases", "Leases that are held", reads.leases, schemas.Lease, 404, many=True),
    Route(
        "DELETE", _LEASE, "Give a lease back; again is no error", changes.release_lease, {200: schemas.LeaseCount}, (404, 507)
    ),
    Route(
        "PUT", _LEASE, "Renew a lease", changes.renew_lease, {200: schemas.Lease}, (400, 404, 409, 413, 415, 507),
        bodies.RenewBody,
    ),
)  # fmt: skip
QUEUE_ROUTES = (
    Route(
        "POST", "/acquire", "A slot of a model, started if need be; with Accept: text/event-stream what it waits for is told",
        acquire.acquire, {201: queue_schemas.Acquired, 200: queue_schemas.Acquired},
        (400, 404, 408, 409, 413, 415, 429, 500, 503, 507), bodies.AcquireBody,
        (Query("dry_run", "true: what would happen (200); nothing does.", _BOOL),),
    ),
    _read(
        "/queue", "Requests that wait for a slot, in their order", acquire.queue, queue_schemas.Ticket, many=True, private=True
    ),
    _read(
        "/routes", "Which pool answers to which names, and where; with Accept: text/event-stream each change as it comes",
        acquire.routes, queue_schemas.RouteTable, 503, private=True,
    ),
    Route(
        "DELETE", "/queue/{ticket_id}", "Have a request wait no more", acquire.cancel, {200: queue_schemas.TicketCancelled},
        (400, 404, 408, 413, 415), bodies.NoBody,
    ),
)  # fmt: skip
READ_ROUTES = (
    _read("/health", "The daemon is up", reads.health, schemas.Health, bare=True, exempt=True),
    Route(
        "GET", "/ready", "Every pool to be preloaded is ready", reads.ready, {200: schemas.Ready, 503: schemas.Ready},
        bare=True, exempt=True,
    ),
    _read("/metrics", "Prometheus metrics", reads.metrics, None, bare=True, exempt=True, media="text/plain"),
    _read("/pools", "All pools, sorted by id", reads.pools, schemas.PoolStatus, many=True),
    _read(_POOL, "Status of a pool", reads.status, schemas.PoolStatus, 404),
    _read(f"{_POOL}/status", "Status of a pool", reads.status, schemas.PoolStatus, 404, bare=True),
    _read(f"{_POOL}/health", "Liveness and readiness of a pool", reads.pool_health, schemas.PoolHealth, 404, bare=True),
    _read(
        f"{_POOL}/command", "The engine's argv and environment, secrets masked", reads.command, schemas.Command,
        404, 409, 500, 503, private=True,
    ),
    _read(
        f"{_POOL}/explain", "What a start would do, and what stands in its way", reads.explain, schemas.Explanation,
        404, 500, 503, private=True,
    ),
    _read(
        f"{_POOL}/logs", "The engine's log; with Accept: text/event-stream as SSE, which Last-Event-ID resumes", streams.logs,
        None, 400, 404, 503, media="text/plain", private=True,
        query=(
            Query("lines", "How many of the last lines.", {"type": "integer", "minimum": 0, "maximum": 10_000, "default": 200}),
            Query("follow", "Go on with what is appended.", _BOOL),
            Query("since_ms", "Only what is not older than so many ms, and a little more.", {"type": "integer", "minimum": 0}),
            Query("previous", "The launch before the last one.", _BOOL),
            Query(
                "replica", "The log of this replica, such as one that a reload has tried; without since_ms and previous.",
                {"type": "string", "enum": ["r0", "r1"]},
            ),
            Query("after", "Go on behind this id of an event of the log.", {"type": "string", "pattern": "^[0-9]+:[0-9]+$"}),
        ),
    ),
    _read(f"{_POOL}/crashes", "Crash reports of a pool", reads.pool_crashes, Crash, 404, many=True, private=True),
    _read(
        f"{_POOL}/operations/{{operation_id}}", "An operation of a pool", reads.pool_operation, schemas.OperationAnswer,
        404, private=True,
    ),
    _read(
        "/crashes", "Crash reports of all pools", reads.crashes, Crash, 404, many=True, private=True,
        query=(Query("pool_id", "Only those of this pool.", {"type": "string"}),),
    ),
    _read(
        "/operations", "Operations, running and recent", reads.operations, schemas.OperationAnswer, 400, 404,
        many=True, private=True,
        query=(
            Query(
                "limit", "How many at most.", {"type": "integer", "minimum": 1, "maximum": reads.MAX_PAGE, "default": reads.PAGE}
            ),
            Query("after", "Those that began behind this operation; without it, the newest.", {"type": "string"}),
        ),
    ),
    _read(
        "/config/history", "The configurations that were applied, oldest first", reads.history, AppliedConfiguration,
        many=True, private=True,
    ),
    _read("/operations/{operation_id}", "An operation", reads.operation, schemas.OperationAnswer, 404, private=True),
    _read("/snapshots", "What placement reads: all pools at one moment", reads.snapshots, schemas.Snapshots),
    _read("/capabilities", "What this daemon can do", reads.capabilities, schemas.Capabilities),
    _read("/meta/capabilities", "What this daemon can do", reads.capabilities, schemas.Capabilities),
    _read(
        "/events", "The event stream (SSE); the Last-Event-ID header resumes it", streams.events, None, 400, 503,
        media="text/event-stream", private=True,
        query=(
            Query(
                "after", "Begin behind this event id; 0 = all that are kept.",
                {"type": "integer", "minimum": 0, "maximum": streams.MAX_EVENT_ID},
            ),
            Query("follow", "false: end after the events that are kept.", _BOOL),
        ),
    ),
)  # fmt: skip
CHANGE_ROUTES = (
    Route(
        "POST", f"{_POOL}/preload", "Bring a pool up: the configured one, or a submitted PreparedEngine", changes.preload,
        {200: schemas.Preloaded, 202: schemas.OperationAnswer}, (400, 403, 404, 408, 409, 413, 415, 422, 500, 503, 507),
        bodies.PreparedBody, (_WAIT,), bare=True,
    ),
    _change("/preload", "Cancel a running preload", changes.cancel_preload, method="DELETE", bare=True),
    _change("/start", "Start the engine", changes.start),
    _change("/stop", "Stop the engine; it stays down", changes.stop),
    _change("/evict", "Stop an idle engine; whoever needs it starts it again", changes.evict),
    _change("/restart", "Stop and start the engine", changes.restart),
    _change("/drain", "Take no new leases, wait for the given ones, stop", changes.drain, drain=True),
    _change("/undrain", "Call a running drain off", changes.undrain),
    Route(
        "POST", f"{_POOL}/reload", "Replace what a pool runs, or leave it as it was", changes.reload,
        {202: schemas.OperationAnswer, 200: schemas.ReloadAnswer}, (400, 403, 404, 408, 409, 413, 415, 422, 500, 503, 507),
        bodies.ReloadBody,
        (_WAIT, Query("dry_run", "true: the plan (200), and nothing happens.", _BOOL)),
    ),
    Route(
        "POST", "/apply", "Have the configuration file in force, touching only the pools that it changes", changes.apply,
        {202: schemas.OperationAnswer, 200: ApplyAnswer}, (400, 403, 404, 408, 409, 413, 415, 500, 503, 507),
        bodies.ApplyBody,
        (_WAIT, Query("dry_run", "true: the plan (200), and nothing happens.", _BOOL),), asks_owner=True,
    ),
    Route(
        "POST", f"{_POOL}/purge", "Stop a pool and delete what is kept on disk for it", changes.purge,
        {202: schemas.OperationAnswer, 200: schemas.PurgeAnswer}, (400, 404, 408, 409, 413, 415, 500, 503, 507), bodies.PurgeBody,
        (_WAIT, Query("dry_run", "true: what would be freed (200), and nothing happens.", _BOOL)),
    ),
    Route(
        "POST", f"{_POOL}/bench", "Measure a pool on purpose; all its slots are leased meanwhile", changes.bench, _OP,
        (400, 404, 408, 409, 413, 415, 500, 503, 507), bodies.BenchBody, (_WAIT,),
    ),
    Route(
        "DELETE", f"{_POOL}/bench", "Break a bench off", changes.cancel_bench, {202: schemas.OperationAnswer},
        (400, 404, 408, 409, 413, 415), bodies.NoBody,
    ),
    _change("/hold", "Leave the pool as it is: no automatic restarts", changes.hold),
    _change("/release", "End a hold", changes.release),
    _change("/circuit/reset", "Close the circuit breaker", changes.reset_breaker),
    Route(
        "POST", _POOL, "Register a pool", changes.register, _REGISTERED, (400, 409, 413, 415, 503, 507), bodies.NoBody
    ),
    Route(
        "DELETE", _POOL, "Deregister a pool", changes.deregister, _REGISTERED, (400, 404, 409, 413, 415, 503, 507), bodies.NoBody
    ),
)  # fmt: skip
DEVICE_ROUTES = (
    _read(
        "/devices", "The GPUs: their memory by pool, reservation and unmanaged process", reads.devices, schemas.Devices
    ),
    _without_body(
        f"{_DEVICE}/cordon", "Start nothing new on a GPU; what runs there goes on", changes.cordon, schemas.Device, 404, 503, 507
    ),
    _without_body(f"{_DEVICE}/uncordon", "Use a GPU for new starts again", changes.uncordon, schemas.Device, 404, 503, 507),
    _read("/yield", "GPUs that are left to others for a while", yields.yields, queue_schemas.Yielded, many=True),
    Route(
        "POST", "/yield", "Leave GPUs to others: what is idle there goes, and nothing starts", yields.begin,
        {200: queue_schemas.Yielded}, (400, 404, 408, 413, 415, 503, 507), bodies.YieldBody, many=True,
    ),
    Route(
        "DELETE", "/yield", "Use GPUs again that were left to others", yields.end,
        {200: queue_schemas.Yielded}, (400, 404, 408, 413, 415, 503, 507), bodies.EndYieldBody, many=True,
    ),
    _without_body(
        "/devices/release", "Release NVML, for a driver upgrade", changes.release_devices, schemas.Devices, 409, 503
    ),
    _without_body("/devices/resume", "Reinitialise NVML", changes.resume_devices, schemas.Devices, 409, 503),
    _without_body(
        "/preflight", "Check whether this machine can run the configured pools", changes.preflight, schemas.Preflight, 503
    ),
)  # fmt: skip
MODEL_ROUTES = (
    _read(
        "/models", "The models that were fetched", models.models, CachedModel, 400, 503, many=True, private=True,
        query=(Query("all", "true: also those that other tools have on this machine.", _BOOL),),
    ),
    Route(
        "POST", "/models/import", "Bring a file of the daemon's machine into the cache of models", models.bring, _OP,
        (400, 408, 409, 413, 415, 422, 500, 503, 507), bodies.ImportBody, (_WAIT,),
    ),
    Route(
        "POST", "/models/pull", "Fetch a model into the cache", models.pull,
        {202: schemas.OperationAnswer, 200: PullAnswer}, (400, 403, 408, 409, 413, 415, 422, 500, 503, 507), bodies.ModelBody,
        (_WAIT, Query("dry_run", "true: what would be fetched (200), and nothing is.", _BOOL)),
    ),
    Route(
        "POST", "/models/verify", "Hash a model in the cache anew", models.verify, _OP,
        (400, 404, 408, 409, 413, 415, 500, 503, 507), bodies.ModelBody, (_WAIT,),
    ),
    Route(
        "POST", "/models/cancel", "Break off what is under way with a model", models.cancel, {200: schemas.OperationAnswer},
        (400, 408, 409, 413, 415, 503), bodies.ModelBody,
    ),
    Route(
        "POST", "/models/remove", "Delete a model from the cache", models.remove, {200: ModelRemoved},
        (400, 404, 408, 409, 413, 415, 503, 507), bodies.ModelBody,
    ),
    Route(
        "POST", "/models/pin", "Never delete a model from the cache", models.pin, {200: CachedModel},
        (400, 404, 408, 413, 415, 503, 507), bodies.ModelBody,
    ),
    Route(
        "POST", "/models/unpin", "Let a model go again when nobody needs it", models.unpin, {200: CachedModel},
        (400, 404, 408, 413, 415, 503, 507), bodies.ModelBody,
    ),
    Route(
        "POST", "/models/gc", "Delete from the cache what nobody needs", models.gc, {200: GcAnswer},
        (400, 408, 413, 415, 503, 507), bodies.ModelGcBody,
        (Query("dry_run", "true: what would be deleted, and why the rest stays; nothing is.", _BOOL),),
    ),
)  # fmt: skip
# Leases first: aiohttp tries the patterns in this order, and they are the hot path.
ROUTES: tuple[Route, ...] = (
    *LEASE_ROUTES, *QUEUE_ROUTES, *READ_ROUTES, *CHANGE_ROUTES, *DEVICE_ROUTES, *MODEL_ROUTES,
)  # fmt: skip
