"""The gateway as a server: the paths that clients call, behind limits and the rules that keep web pages out."""

from __future__ import annotations

import functools
import json
import socket
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from pool_managerd.core.narration import size
from pool_managerd.errors import PoolError
from pool_managerd.gateway.access import Access
from pool_managerd.gateway.budgets import Budgets, beside
from pool_managerd.gateway.captures import Captures
from pool_managerd.gateway.certificate import Certificate
from pool_managerd.gateway.dialects import Dialect, told
from pool_managerd.gateway.engine_link import EngineLinks
from pool_managerd.gateway.engine_logs import EngineLogs
from pool_managerd.gateway.faces import Faces
from pool_managerd.gateway.front import Front, FrontLimits, FrontParts
from pool_managerd.gateway.keys import KeyFile
from pool_managerd.gateway.leasing import LeaseTimes, Leasing
from pool_managerd.gateway.link import Link
from pool_managerd.gateway.loading_text import LoadingText
from pool_managerd.gateway.paths import POSTS
from pool_managerd.gateway.requests import Requests
from pool_managerd.gateway.sessions import SessionNames
from pool_managerd.gateway.sharing import Common
from pool_managerd.gateway.views import Views
from pool_managerd.gateway.watchers import Watchers
from pool_managerd.httpd.browser import check_browser
from pool_managerd.httpd.guard import at_work
from pool_managerd.httpd.server import HttpLimits, HttpServer, url_of
from pool_managerd.telemetry import tracing
from pool_managerd.telemetry.gateway_metrics import GatewayMetrics

if TYPE_CHECKING:
    from pool_managerd.gateway.spans import RequestSpans

log = structlog.get_logger("pool_managerd.gateway")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """``limits`` of requests, ``http`` of connections, ``leases``: how long each is kept. ``keys`` None: none are asked for.
    ``certificate`` None: it speaks plain HTTP. ``local``: only this machine is to call; ``origins``: of web pages that may.
    ``sessions``: what says which one a request is of; ``loading_text``: streams tell what they wait for. ``capture_bytes``: of
    memory for what requests and answers say; 0: it is kept nowhere. ``labels`` go on every series; ``narrate``: every request has
    its line in the log.
    """

    limits: FrontLimits = field(default_factory=FrontLimits)
    http: HttpLimits = field(default_factory=lambda: HttpLimits(max_connections=4096, shutdown_s=10.0, descriptors=3))
    leases: LeaseTimes = field(default_factory=LeaseTimes)
    keys: KeyFile | None = None
    certificate: Certificate | None = None
    local: bool = True
    origins: tuple[str, ...] = ()
    sessions: SessionNames = field(default_factory=SessionNames)
    loading_text: bool = False
    capture_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    narrate: bool = False


class Gateway:
    """``async with Gateway(link): …`` answers on ``listener`` once ``start`` was called. ``run`` follows the daemon."""

    def __init__(self, link: Link, options: GatewayOptions | None = None, common: Common | None = None) -> None:
        self._options, self._common = options or GatewayOptions(), common or Common()
        self._link = link
        self.leasing = Leasing(link, self._options.leases, self._common)
        self._links = EngineLinks()
        self._server: HttpServer | None = None
        keys = self._options.keys
        self._budgets = None if keys is None else Budgets(beside(keys.place), self._common.tally)
        labels = {**self._options.labels, **self._common.labels()}
        captures = Captures(self._options.capture_bytes) if self._options.capture_bytes else None
        self._requests = Requests(GatewayMetrics(labels), self._budgets, captures, narrate=self._options.narrate)
        self._watchers = Watchers()

    async def __aenter__(self) -> Gateway:
        if most := self._options.capture_bytes:
            log.warning(
                f"What requests and answers say is captured, in {size(most)} of memory of this process: gateway.capture_bytes",
                action="captures", **self._common.labels(),
            )  # fmt: skip
        await self._link.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Running requests have a moment to end; then leases go back."""
        self._watchers.closing.set()
        self._common.siblings.close()
        if self._server is not None:
            await self._server.close(self._requests.end)
        if self._budgets is not None:
            self._budgets.save()
        with suppress(TimeoutError):
            await self.leasing.close()
        self._links.close()
        await self._link.__aexit__()

    async def start(self, listener: socket.socket) -> str:
        """Begin to answer: at this URL."""
        access = Access(self._options.keys, self._budgets, self._common.tally)
        loading = LoadingText(self.leasing, by_default=self._options.loading_text)
        parts = FrontParts(self.leasing, self._links, access, self._requests, self._options.sessions, loading, _spans())
        faces = Faces(self.leasing, access, self._watchers)
        logs = EngineLogs(self._link, self.leasing, access, self._watchers)
        views = Views(self.leasing, access, self._requests, self._common.siblings)
        await self._common.siblings.start(views.answers())
        app = _application(Front(parts, self._options.limits), views, faces, logs, self._options)
        certificate = self._options.certificate
        self._server = HttpServer(app, self._options.http, _refusal, None if certificate is None else certificate.context)
        await self._server.start(listener)
        return url_of(listener, "http" if certificate is None else "https")

    def end_requests(self) -> None:
        """Those in flight end now, and their clients are told."""
        self._requests.end()

    async def run(self) -> None:
        """Follow the daemon until cancelled."""
        await self.leasing.run()


def _spans() -> RequestSpans | None:
    """None where this process does not trace: what makes spans is not imported then."""
    if not tracing.is_on():
        return None
    from pool_managerd.gateway.spans import RequestSpans

    return RequestSpans()


def _application(front: Front, views: Views, faces: Faces, logs: EngineLogs, options: GatewayOptions) -> web.Application:
    app = web.Application(
        middlewares=[_guard(options.origins, local=options.local)], client_max_size=options.limits.bodies.each_bytes
    )
    for path, kind in POSTS.items():
        app.router.add_post(path, _with(front.infer, kind))
    app.router.add_get("/v1/models", front.models)
    app.router.add_get("/models", front.models)
    app.router.add_get("/v1/models/{model:.+}", front.model)
    app.router.add_get("/health", views.health)
    app.router.add_get("/metrics", views.metrics)
    app.router.add_get("/v1/queue", views.queue)
    app.router.add_get("/v1/requests", views.requests)
    app.router.add_get("/v1/requests/{request_id}", views.request)
    app.router.add_delete("/v1/requests/{request_id}", views.cancel)
    for method, path, handler in (
        ("GET", "/running", faces.running), ("GET", "/unload", faces.unload), ("POST", "/api/models/unload", faces.unload),
        ("POST", "/api/models/unload/{model:.+}", faces.unload), ("GET", "/api/events", faces.events),
        ("GET", "/logs/stream", logs.stream), ("GET", "/logs/stream/{model:.+}", logs.stream), ("GET", "/props", front.props),
    ):  # fmt: skip
        app.router.add_route(method, path, handler)
    app.router.add_route("*", "/upstream/{path:.+}", front.upstream)
    app.router.add_route("*", "/{path:.*}", front.not_found)
    app.on_response_prepare.append(_allow(options.origins))
    app.freeze()
    return app


def _with(handler: Callable[..., Awaitable[web.StreamResponse]], kind: object) -> Handler:
    @functools.wraps(handler)
    async def bound(request: web.Request) -> web.StreamResponse:
        return await handler(request, kind)

    return bound


def _refusal(error: PoolError) -> web.Response:
    found = told(error, Dialect.OPENAI, f"req_{uuid.uuid4().hex}")
    return web.Response(
        body=json.dumps(found.body).encode(), status=found.status, headers=found.headers, content_type="application/json"
    )


def _guard(origins: Collection[str], *, local: bool) -> Middleware:
    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN, "").lower()
        with at_work(request.transport):
            try:
                site = request.headers.get("Sec-Fetch-Site")
                check_browser(request.headers.get(hdrs.HOST), origin or None, site, local=local, origins=origins)
            except PoolError as problem:
                return _refusal(problem)
            if request.method == "OPTIONS" and origin in origins:
                wanted = request.headers.get("Access-Control-Request-Headers", "")[:_MAX_NAMES]
                return web.Response(status=204, headers={**_CORS, "Access-Control-Allow-Headers": wanted})
            return await handler(request)

    return guarded


def _allow(origins: Collection[str]) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Answers for pages of these origins may be read by them; nobody else's by any page."""

    async def allow(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Server"] = "pool-managerd"
        if request.headers.get(hdrs.ORIGIN, "").lower() in origins:
            response.headers["Access-Control-Allow-Origin"] = request.headers[hdrs.ORIGIN]
            response.headers["Vary"] = "Origin"

    return allow


_MAX_NAMES = 2048
_CORS = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600"}
