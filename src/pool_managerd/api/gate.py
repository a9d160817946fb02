"""What every request passes: correlation id, load limit, Host and Origin, token; and what every answer gets."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from pool_managerd import failpoints
from pool_managerd.api.auth import Access
from pool_managerd.api.envelope import (
    CORRELATION_HEADER,
    CORRELATION_KEY,
    OWNER_KEY,
    TRUSTED_KEY,
    error_response,
    from_http_exception,
)
from pool_managerd.config import is_pool_id
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.httpd.guard import GuardedConnection, at_work
from pool_managerd.telemetry import tracing
from pool_managerd.telemetry.logs import correlation_id
from pool_managerd.telemetry.metrics import Metrics

_SANE_ID = re.compile(r"^[A-Za-z0-9._-]{1,128}$")
_AUTH_LOG_PER_SECOND = 5
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
UNMATCHED = "unmatched"
log = structlog.get_logger("pool_managerd.api")


@dataclass(frozen=True, slots=True)
class Paths:
    """``labels`` maps a route's template to its metrics label; ``exempt`` ones need no token.

    ``private`` ones show text of engines or of the configuration: without a configured token they are the owner's. Of
    ``asks_owner`` ones the handler is told who calls. ``waiting`` ones may take long and cost nothing: they keep nobody out.
    """

    labels: Mapping[str, str]
    exempt: frozenset[str]
    private: frozenset[str] = frozenset()
    asks_owner: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()


class Gate:
    """The outermost middleware. ``access`` are the rules that hold now; ``clean`` takes secrets out of errors that are told."""

    def __init__(
        self, access: Access, metrics: Metrics, paths: Paths, max_requests: int, clean: Callable[[PoolError], PoolError]
    ) -> None:
        self.access = access
        self._metrics = metrics
        self._paths = paths
        self._clean = clean
        self._max_requests = max_requests
        self._running = 0
        self._auth_logs = (0, 0)  # the second, and how many lines it has had
        self._continued = _continued()

    def middleware(self) -> Middleware:
        """The aiohttp middleware."""

        @web.middleware
        async def gate(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            resource = request.match_info.route.resource
            counts = resource is None or resource.canonical not in self._paths.waiting
            self._running += counts
            try:
                with at_work(request.transport) as guarded:
                    if self._continued is None:
                        return await self._answer(request, handler, guarded)
                    with self._continued(request.headers):
                        return await self._answer(request, handler, guarded)
            finally:
                self._running -= counts

        return gate

    async def _answer(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
        guarded: GuardedConnection | None,
    ) -> web.StreamResponse:
        given = request.headers.get(CORRELATION_HEADER)
        correlation = given if given is not None and _SANE_ID.match(given) else str(uuid.uuid4())
        request[CORRELATION_KEY] = correlation
        correlation_id.set(correlation)
        resource = request.match_info.route.resource
        label = UNMATCHED if resource is None else self._paths.labels.get(resource.canonical, UNMATCHED)
        response: web.StreamResponse
        try:
            self._admit(request, label, guarded)
            response = await handler(request)
            if request.method not in _READS:
                failpoints.reach("api.before_reply")
        except PoolError as error:
            response = error_response(self._clean(_placed(error, request)), correlation)
        except web.HTTPException as error:
            response = from_http_exception(error, correlation)
        except ConnectionResetError:  # of a client that has gone: there is nobody to answer
            if not _has_gone(request):
                raise
            response = web.Response(status=499)
        except Exception:  # the boundary of a request: the caller gets an id, the log the rest
            log.exception("A request failed unexpectedly", action="request_failed", route=label, method=request.method)
            hint = f"the daemon's log has the details under correlation id {correlation}"
            response = error_response(PoolError("cannot serve the request: an unexpected error occurred", hint=hint), correlation)
        if not response.prepared:
            response.headers[CORRELATION_HEADER] = correlation
            response.headers["Server"] = "pool-managerd"
            response.headers["X-Content-Type-Options"] = "nosniff"
        self._metrics.http_request(label, request.method, response.status)
        return response

    def _admit(self, request: web.Request, label: str, guarded: GuardedConnection | None) -> None:
        headers = request.headers
        token = headers.get(hdrs.AUTHORIZATION)
        if self._running > self._max_requests and label != "/health":
            raise NodeError("cannot take more requests at the moment", code="TOO_MANY_REQUESTS", retry_after_ms=1000)
        near = guarded is not None and guarded.peer_is_loopback
        tokenless = near and not self.access.loopback_bind and not self.access.bears_token(token)
        origin, site = headers.get(hdrs.ORIGIN), headers.get("Sec-Fetch-Site")
        self.access.check_browser(headers.get(hdrs.HOST), origin, site, tokenless=tokenless)
        if label in self._paths.exempt and request.method in _READS:
            return
        uid: Callable[[], int | None] = (lambda: None) if guarded is None else guarded.peer_uid
        try:
            self.access.check_token(token, peer_is_loopback=near)
            if self.access.open_to(peer_is_loopback=near):
                if request.method not in _READS or label in self._paths.private:
                    self.access.check_owner(token, uid)
                request[TRUSTED_KEY] = self.access.trusts(token, uid)
            if label in self._paths.asks_owner:
                request[OWNER_KEY] = self.access.is_owner(token, uid)
        except RequestError as error:
            self._log_refusal(request, label, error)
            raise

    def _log_refusal(self, request: web.Request, label: str, error: RequestError) -> None:
        if _has_gone(request):  # whose request it was cannot be asked any more
            return
        second = int(time.monotonic())
        count = self._auth_logs[1] + 1 if self._auth_logs[0] == second else 1
        self._auth_logs = (second, count)
        if count <= _AUTH_LOG_PER_SECOND:  # a flood of bad requests must not become a flood of log lines
            log.warning(
                "A request without the right token was refused",
                action="auth_failed",
                identity=request.remote,
                endpoint=label,
                method=request.method,
                reason=error.code,
            )


def _continued() -> Callable[[Mapping[str, str]], AbstractContextManager[None]] | None:
    """What goes on with a caller's trace; None where this process does not trace: nothing is imported for it then."""
    if not tracing.is_on():
        return None
    from pool_managerd.telemetry.spans import continued

    return continued


def _has_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _placed(error: PoolError, request: web.Request) -> PoolError:
    """The error with the pool of the path, where whoever raised it did not say which pool it was about."""
    given = request.match_info.get("pool_id")
    if error.pool_id is None and given is not None and is_pool_id(given):
        error.pool_id = given
    return error
