"""The HTTP server: the route table behind the gate, on sockets with limits."""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from pool_managerd.api import openapi, reads
from pool_managerd.api.auth import Access
from pool_managerd.api.context import ApiContext, OwnConfiguration, StreamLimits
from pool_managerd.api.envelope import error_response, json_response
from pool_managerd.api.gate import Gate, Paths
from pool_managerd.api.guard import Connections
from pool_managerd.api.requests import MAX_BODY_BYTES
from pool_managerd.api.routing import Handler
from pool_managerd.api.table import ROUTES
from pool_managerd.config import split_address
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.node import PoolManager
from pool_managerd.telemetry.metrics import Metrics

_BACKLOG = 4096
_ACCEPTS_AT_ONCE = 64
"""Few: what was accepted is read before so many follow that it would have to make room for them."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How much the server takes on. ``shutdown_s`` bounds how long running requests may finish."""

    max_connections: int = 1024
    max_requests: int = 512
    head_timeout_s: float = 10.0
    keepalive_s: float = 75.0
    shutdown_s: float = 2.0
    streams: StreamLimits = field(default_factory=StreamLimits)


class ApiServer:
    """Serves the control API of one node on sockets that are already listening."""

    def __init__(self, node: PoolManager, access: Access, metrics: Metrics, limits: ServerLimits | None = None) -> None:
        self._limits = limits or ServerLimits()
        self._context = ApiContext(node, metrics, streams=self._limits.streams)
        self._gate = _gate(self._context, access, self._limits)
        self._runner = _runner(_application(self._context, self._gate), self._limits)
        self._metrics_runner = _runner(_metrics_application(self._context, self._limits), self._limits)
        self._servers: list[asyncio.Server] = []
        self._guards: list[Connections] = []

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return sum(len(guard.open) for guard in self._guards)

    @property
    def access(self) -> Access:
        """The rules that hold."""
        return self._gate.access

    def use_access(self, access: Access) -> None:
        """Other tokens from now on; the address is the same."""
        self._gate.access = access

    def use_configuration(self, configuration: OwnConfiguration) -> None:
        """The daemon's file can be applied by requests from now on."""
        self._context.configuration = configuration

    async def start(self, listener: socket.socket, metrics_listener: socket.socket | None = None) -> None:
        """Begin to answer on ``listener``, and /metrics alone on ``metrics_listener``."""
        await self._serve(self._runner, listener, _connection_limit(self._limits.max_connections))
        if metrics_listener is not None:
            await self._serve(self._metrics_runner, metrics_listener, 64)

    async def close(self) -> None:
        """Stop listening, end the streams, give running requests a moment, close every connection."""
        self._context.closing.set()
        for server in self._servers:
            server.close()
        for runner in (self._runner, self._metrics_runner):
            await runner.cleanup()
        for guard in self._guards:
            guard.stop()
            for connection in list(guard.open):
                connection.abort()

    async def _serve(self, runner: web.AppRunner, listener: socket.socket, limit: int) -> None:
        await runner.setup()
        server = runner.server
        if server is None:  # pragma: no cover - setup() made it
            raise NodeError("cannot serve the control API: the server is gone")
        protocol = functools.partial(_HttpProtocol.of, server)
        guard = Connections(protocol, limit, self._limits.head_timeout_s, self._limits.streams.write_timeout_s)
        self._servers.append(await asyncio.get_running_loop().create_server(guard, sock=listener, backlog=_ACCEPTS_AT_ONCE))
        listener.listen(_BACKLOG)  # asyncio takes one number for what waits in the kernel and for what it accepts in one go
        self._guards.append(guard)
        guard.start()


def listen(address: str) -> socket.socket:
    """A listening socket on HOST:PORT. Raises NodeError when it cannot be had (the port is taken, no such address)."""
    host, port = split_address(address)
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise NodeError(f"cannot listen on {address}: {error.strerror or error}", hint="choose another --bind") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        hint = (
            "another program has this port: stop it, or choose another with --bind HOST:PORT"
            if error.errno == 98
            else "choose another --bind"
        )
        raise NodeError(f"cannot listen on {address}: {error.strerror}", hint=hint) from error
    return listener


def _gate(context: ApiContext, access: Access, limits: ServerLimits) -> Gate:
    labels = {path: route.path for route in ROUTES for path in route.paths} | {
        "/openapi.json": "/openapi.json",
        "/v1/openapi.json": "/openapi.json",
    }
    exempt = frozenset(route.path for route in ROUTES if route.exempt)
    private = frozenset(route.path for route in ROUTES if route.private)
    paths = Paths(labels, exempt, private, frozenset(route.path for route in ROUTES if route.asks_owner))
    return Gate(access, context.metrics, paths, limits.max_requests, context.node.events.clean_error)


def _application(context: ApiContext, gate: Gate) -> web.Application:
    app = web.Application(middlewares=[gate.middleware()], client_max_size=MAX_BODY_BYTES)
    for route in ROUTES:
        for path in route.paths:
            app.router.add_route(route.method, path, _bind(context, route.handler))
            if route.method == "GET":
                app.router.add_route("HEAD", path, _bind(context, route.handler))
    described = functools.cache(openapi.document)  # made when first asked for: the start of the daemon does not wait for it

    async def openapi_json(_request: web.Request) -> web.Response:
        return json_response(described())

    for path in ("/openapi.json", "/v1/openapi.json"):
        app.router.add_get(path, openapi_json)  # and HEAD
    app.freeze()
    return app


def _metrics_application(context: ApiContext, limits: ServerLimits) -> web.Application:
    bind = context.node.config.daemon.metrics_bind
    access = Access(split_address(bind)[0] if bind is not None else "127.0.0.1")
    paths = Paths({"/metrics": "/metrics"}, frozenset({"/metrics"}))
    gate = Gate(access, context.metrics, paths, limits.max_requests, context.node.events.clean_error)
    app = web.Application(middlewares=[gate.middleware()], client_max_size=1024)
    app.router.add_get("/metrics", _bind(context, reads.metrics))
    app.freeze()
    return app


def _bind(context: ApiContext, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    @functools.wraps(handler)
    async def bound(request: web.Request) -> web.StreamResponse:
        return await handler(context, request)

    return bound


def _runner(app: web.Application, limits: ServerLimits) -> web.AppRunner:
    return web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=limits.keepalive_s,
        shutdown_timeout=limits.shutdown_s,
        auto_decompress=False,
        logger=_protocol_log(),
    )


class _HttpProtocol(RequestHandler):
    """aiohttp's, with our shape of errors for what never becomes a request."""

    @classmethod
    def of(cls, server: web.Server) -> _HttpProtocol:
        return cls(server, loop=asyncio.get_running_loop(), **server._kwargs)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to bytes that are no request, and to what no handler caught; the connection ends with it."""
        if status >= 500 or request.writer.output_size > 0:
            super().handle_error(request, status, exc, message)
        why = "cannot read the request: it is not valid HTTP" if status < 500 else "cannot serve the request"
        error = PoolError(why, code="INVALID_PARAMS" if status < 500 else "INTERNAL", status=status)
        response = error_response(error, str(uuid.uuid4()))
        response.headers["Server"] = "pool-managerd"
        response.force_close()
        return response


class _NotOurTrouble(logging.Filter):
    """Drops the traceback for bytes that are no HTTP request: the sender gets a 400, but the log is not his to fill."""

    def filter(self, record: logging.LogRecord) -> bool:
        problem = record.exc_info[1] if record.exc_info else None
        return not isinstance(problem, HttpProcessingError)


def _protocol_log() -> logging.Logger:
    log = logging.getLogger("pool_managerd.http")
    if not any(isinstance(known, _NotOurTrouble) for known in log.filters):
        log.addFilter(_NotOurTrouble())
    return log


def _connection_limit(wanted: int) -> int:
    """Engines, logs and databases need descriptors too: connections take at most half of what the process may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft // 2))
