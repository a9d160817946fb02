"""The route table of the control API: everything that is served, once (SPEC §11.1, DESIGN §7)."""

from __future__ import annotations

from pydantic import BaseModel

from pool_managerd.api import devices, leases, node_reads, pool_changes, pool_reads, schemas, streams
from pool_managerd.api.routing import Handler, Query, Route

_POOL = "/pools/{pool_id}"
_BOOL: dict[str, object] = {"type": "boolean"}
_WAIT = Query("wait", "true: answer when the operation has ended (200); false: at once (202).", _BOOL)
_OP: dict[int, type[BaseModel] | None] = {202: schemas.OperationAnswer, 200: schemas.OperationAnswer}


def _change(path: str, summary: str, handler: Handler, *, method: str = "POST", bare: bool = False, drain: bool = False) -> Route:
    body = schemas.DrainBody if drain else schemas.NoBody
    errors = (400, 404, 408, 409, 413, 415, 500, 503, 507)
    return Route(method, _POOL + path, summary, handler, _OP, errors=errors, body=body, query=(_WAIT,), bare=bare)


LEASE_ROUTES = (
    Route(
        "POST",
        f"{_POOL}/leases",
        "Take a lease on a slot",
        leases.allocate,
        {201: schemas.LeaseGiven},
        (400, 404, 409, 413, 415, 503),
        schemas.LeaseBody,
    ),
    Route("GET", f"{_POOL}/leases", "Leases that are held", leases.leases, {200: schemas.Lease}, (404,), many=True),
    Route(
        "DELETE",
        f"{_POOL}/leases/{{lease_id}}",
        "Give a lease back; again is no error",
        leases.release,
        {200: schemas.LeaseCount},
        (404,),
    ),
    Route(
        "PUT",
        f"{_POOL}/leases/{{lease_id}}",
        "Renew a lease",
        leases.renew,
        {200: schemas.Lease},
        (400, 404, 409, 413, 415),
        schemas.RenewBody,
    ),
)
READ_ROUTES = (
    Route("GET", "/health", "The daemon is up", node_reads.health, {200: schemas.Health}, bare=True, exempt=True),
    Route(
        "GET",
        "/ready",
        "Every pool to be preloaded is ready",
        node_reads.ready,
        {200: schemas.Ready, 503: schemas.Ready},
        bare=True,
        exempt=True,
    ),
    Route("GET", "/metrics", "Prometheus metrics", node_reads.metrics, {200: None}, bare=True, exempt=True, media="text/plain"),
    Route("GET", "/pools", "All pools, sorted by id", pool_reads.pools, {200: schemas.PoolStatus}, many=True),
    Route("GET", _POOL, "Status of a pool", pool_reads.status, {200: schemas.PoolStatus}, (404,)),
    Route("GET", f"{_POOL}/status", "Status of a pool", pool_reads.status, {200: schemas.PoolStatus}, (404,), bare=True),
    Route(
        "GET",
        f"{_POOL}/health",
        "Liveness and readiness of a pool",
        pool_reads.health,
        {200: schemas.PoolHealth},
        (404,),
        bare=True,
    ),
    Route(
        "GET",
        f"{_POOL}/command",
        "The engine's argv and environment, secrets masked",
        pool_reads.command,
        {200: schemas.Command},
        (404, 409, 500, 503),
        private=True,
    ),
    Route(
        "GET",
        f"{_POOL}/explain",
        "What a start would do, and what stands in its way",
        pool_reads.explain,
        {200: schemas.Explanation},
        (404, 500, 503),
        private=True,
    ),
    Route(
        "GET",
        f"{_POOL}/logs",
        "The engine's log",
        streams.logs,
        {200: None},
        (400, 404, 503),
        query=(
            Query("lines", "How many of the last lines.", {"type": "integer", "minimum": 0, "maximum": 10_000, "default": 200}),
            Query("follow", "Go on with what is appended.", _BOOL),
            Query("since_ms", "Only what is not older than so many ms, and a little more.", {"type": "integer", "minimum": 0}),
            Query("previous", "The launch before the last one.", _BOOL),
        ),
        media="text/plain",
        private=True,
    ),
    Route(
        "GET",
        f"{_POOL}/crashes",
        "Crash reports of a pool",
        pool_reads.pool_crashes,
        {200: schemas.Crash},
        (404,),
        many=True,
        private=True,
    ),
    Route(
        "GET",
        f"{_POOL}/operations/{{operation_id}}",
        "An operation of a pool",
        pool_reads.pool_operation,
        {200: schemas.OperationAnswer},
        (404,),
        private=True,
    ),
    Route("GET", "/crashes", "Crash reports of all pools", pool_reads.crashes, {200: schemas.Crash}, many=True, private=True),
    Route(
        "GET",
        "/operations",
        "Operations, running and recent",
        pool_reads.operations,
        {200: schemas.OperationAnswer},
        (400, 404),
        query=(
            Query("limit", "How many at most.", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}),
            Query("after", "Those that began behind this operation; without it, the newest.", {"type": "string"}),
        ),
        many=True,
        private=True,
    ),
    Route(
        "GET",
        "/operations/{operation_id}",
        "An operation",
        pool_reads.operation,
        {200: schemas.OperationAnswer},
        (404,),
        private=True,
    ),
    Route(
        "GET",
        "/snapshots",
        "What placement reads: all pools at one moment",
        node_reads.snapshots,
        {200: schemas.Snapshots},
    ),
    Route("GET", "/capabilities", "What this daemon can do", node_reads.capabilities, {200: schemas.Capabilities}),
    Route("GET", "/meta/capabilities", "What this daemon can do", node_reads.capabilities, {200: schemas.Capabilities}),
    Route(
        "GET",
        "/events",
        "The event stream (SSE); the Last-Event-ID header resumes it",
        streams.events,
        {200: None},
        (400, 503),
        query=(
            Query(
                "after",
                "Begin behind this event id; 0 = all that are kept.",
                {"type": "integer", "minimum": 0, "maximum": streams.MAX_EVENT_ID},
            ),
            Query("follow", "false: end after the events that are kept.", _BOOL),
        ),
        media="text/event-stream",
        private=True,
    ),
)
CHANGE_ROUTES = (
    Route(
        "POST",
        f"{_POOL}/preload",
        "Bring a pool up: the configured one, or a submitted PreparedEngine",
        pool_changes.preload,
        {200: schemas.Preloaded, 202: schemas.OperationAnswer},
        (400, 403, 404, 408, 409, 413, 415, 422, 500, 503, 507),
        body=schemas.PreparedBody,
        query=(_WAIT,),
        bare=True,
    ),
    _change("/preload", "Cancel a running preload", pool_changes.cancel_preload, method="DELETE", bare=True),
    _change("/start", "Start the engine", pool_changes.start),
    _change("/stop", "Stop the engine; it stays down", pool_changes.stop),
    _change("/restart", "Stop and start the engine", pool_changes.restart),
    _change("/drain", "Take no new leases, wait for the given ones, stop", pool_changes.drain, drain=True),
    _change("/undrain", "Call a running drain off", pool_changes.undrain),
    _change("/hold", "Leave the pool as it is: no automatic restarts", pool_changes.hold),
    _change("/release", "End a hold", pool_changes.release),
    _change("/circuit/reset", "Close the circuit breaker", pool_changes.reset_breaker),
    Route(
        "POST",
        _POOL,
        "Register a pool",
        pool_changes.register,
        {200: schemas.Registered},
        (400, 409, 413, 415, 503, 507),
        schemas.NoBody,
    ),
    Route(
        "DELETE",
        _POOL,
        "Deregister a pool",
        pool_changes.deregister,
        {200: schemas.Registered},
        (400, 404, 409, 413, 415, 503, 507),
        schemas.NoBody,
    ),
)
_DEVICE = "/devices/{device}"
_BODY_ERRORS = (400, 408, 413, 415)


def _without_body(path: str, summary: str, handler: Handler, answer: type[BaseModel], *errors: int) -> Route:
    """A change that takes no body."""
    return Route("POST", path, summary, handler, {200: answer}, (*_BODY_ERRORS, *errors), schemas.NoBody)


DEVICE_ROUTES = (
    Route(
        "GET",
        "/devices",
        "The GPUs: their memory by pool, reservation and unmanaged process",
        devices.devices,
        {200: schemas.Devices},
    ),
    _without_body(
        f"{_DEVICE}/cordon", "Start nothing new on a GPU; what runs there goes on", devices.cordon, schemas.Device, 404, 503, 507
    ),
    _without_body(f"{_DEVICE}/uncordon", "Use a GPU for new starts again", devices.uncordon, schemas.Device, 404, 503, 507),
    _without_body("/devices/release", "Release NVML, for a driver upgrade", devices.release, schemas.Devices, 409, 503),
    _without_body("/devices/resume", "Reinitialise NVML", devices.resume, schemas.Devices, 409, 503),
    _without_body(
        "/preflight", "Check whether this machine can run the configured pools", devices.preflight, schemas.Preflight, 503
    ),
)
# Leases first: aiohttp tries the patterns in this order, and they are the hot path.
ROUTES: tuple[Route, ...] = (*LEASE_ROUTES, *READ_ROUTES, *CHANGE_ROUTES, *DEVICE_ROUTES)
