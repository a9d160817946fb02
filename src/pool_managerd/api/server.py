"""The HTTP server: the route table behind the gate, on sockets with limits."""

from __future__ import annotations

import functools
import socket
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from aiohttp import web

from pool_managerd.api import openapi, reads
from pool_managerd.api.auth import Access
from pool_managerd.api.context import ApiContext, OwnConfiguration, StreamLimits
from pool_managerd.api.envelope import error_response, json_response
from pool_managerd.api.gate import Gate, Paths
from pool_managerd.api.requests import MAX_BODY_BYTES
from pool_managerd.api.routing import PREFIXES, Handler
from pool_managerd.api.table import ROUTES
from pool_managerd.config import split_address
from pool_managerd.errors import PoolError
from pool_managerd.httpd.server import HttpLimits, HttpServer
from pool_managerd.node import PoolManager
from pool_managerd.telemetry.metrics import Metrics

_WAITING = frozenset(f"{prefix}/acquire" for prefix in PREFIXES)
_SCRAPERS = 64
"""Connections to the address that serves /metrics alone."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How much the server takes on."""

    max_requests: int = 512
    http: HttpLimits = field(default_factory=HttpLimits)
    streams: StreamLimits = field(default_factory=StreamLimits)


class ApiServer:
    """Serves the control API of one node on sockets that are already listening."""

    def __init__(self, node: PoolManager, access: Access, metrics: Metrics, limits: ServerLimits | None = None) -> None:
        limits = limits or ServerLimits()
        self._context = ApiContext(node, metrics, streams=limits.streams)
        self._gate = _gate(self._context, access, limits)
        self._api = HttpServer(_application(self._context, self._gate), limits.http, _refusal)
        scraped = replace(limits.http, max_connections=_SCRAPERS)
        self._metrics = HttpServer(_metrics_application(self._context, limits), scraped, _refusal)

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return self._api.connections + self._metrics.connections

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
        await self._api.start(listener)
        if metrics_listener is not None:
            await self._metrics.start(metrics_listener)

    async def close(self) -> None:
        """Stop listening, end the streams, give running requests a moment, close every connection."""
        self._context.closing.set()
        for server in (self._api, self._metrics):
            server.stop_listening()
        for server in (self._api, self._metrics):
            await server.close()


def _refusal(error: PoolError) -> web.Response:
    return error_response(error, str(uuid.uuid4()))


def _gate(context: ApiContext, access: Access, limits: ServerLimits) -> Gate:
    labels = {path: route.path for route in ROUTES for path in route.paths} | {
        "/openapi.json": "/openapi.json",
        "/v1/openapi.json": "/openapi.json",
    }
    exempt = frozenset(route.path for route in ROUTES if route.exempt)
    private = frozenset(route.path for route in ROUTES if route.private)
    paths = Paths(labels, exempt, private, frozenset(route.path for route in ROUTES if route.asks_owner), _WAITING)
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
