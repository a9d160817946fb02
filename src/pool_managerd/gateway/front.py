"""What the gateway does with a request: find its model, have a slot of it, pass it on; and the pages beside that."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import structlog
from aiohttp import hdrs, web

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import PoolError, RequestError
from pool_managerd.gateway.access import Access, Caller
from pool_managerd.gateway.asked import Asked, in_form, in_json, passed_through
from pool_managerd.gateway.bodies import Bodies, Body, BodyLimits
from pool_managerd.gateway.concurrency import Counted
from pool_managerd.gateway.dialects import Dialect
from pool_managerd.gateway.engine_connection import BrokenEngineError, OddEngineError
from pool_managerd.gateway.engine_link import EngineLinks, engine_place
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.forward import forward
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.loading_text import LoadingText
from pool_managerd.gateway.models import AS_ROUTER, as_list, listed
from pool_managerd.gateway.paths import Path
from pool_managerd.gateway.requests import Requests
from pool_managerd.gateway.rules import for_engine
from pool_managerd.gateway.sessions import SessionNames

if TYPE_CHECKING:
    from pool_managerd.gateway.spans import RequestSpans

log = structlog.get_logger("pool_managerd.gateway")
_TRIES = 2
"""An engine that ends before the first byte of its answer: the request goes to another one, or to the one that comes after."""
_CAUSE_S = 0.5
_LONGEST_AGAIN_S = 60.0
_NO = frozenset({"false", "0"})


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """``heartbeat_s``: how often a stream that waits shows a sign of life."""

    bodies: BodyLimits = field(default_factory=BodyLimits)
    heartbeat_s: float = 12.0


@dataclass(frozen=True, slots=True)
class FrontParts:
    """What it works with; ``spans`` None: it does not trace."""

    leasing: Leasing
    links: EngineLinks
    access: Access
    requests: Requests
    sessions: SessionNames
    loading: LoadingText
    spans: RequestSpans | None = None


class Front:
    """One per gateway."""

    def __init__(self, parts: FrontParts, limits: FrontLimits) -> None:
        self._leasing, self._links, self._access, self._requests = parts.leasing, parts.links, parts.access, parts.requests
        self._sessions, self._loading, self._spans = parts.sessions, parts.loading, parts.spans
        self._limits, self._bodies = limits, Bodies(limits.bodies)

    async def infer(self, request: web.Request, path: Path) -> web.StreamResponse:
        """A request for a model that its body names."""
        exchange = Exchange(request, path.dialect, self._limits.heartbeat_s, path.inner or request.path)
        return await self._followed(exchange, self._inferred(exchange, path))

    async def upstream(self, request: web.Request) -> web.StreamResponse:
        """``/upstream/MODEL/PATH``: any request, to the engine as it is."""
        exchange = Exchange(request, Dialect.OPENAI, self._limits.heartbeat_s, "/upstream")
        return await self._followed(exchange, self._passed_through(exchange))

    async def props(self, request: web.Request) -> web.StreamResponse:
        """``/props`` of llama.cpp: of ``?model=``, which is started unless ``autoload=false``; else of the one that is loaded."""
        exchange = Exchange(request, Dialect.OPENAI, self._limits.heartbeat_s, "/props")
        return await self._followed(exchange, self._props(exchange))

    async def models(self, request: web.Request) -> web.StreamResponse:
        """All models that the caller may ask for."""
        return await self._told(self._exchange(request), self._models(request, None))

    async def model(self, request: web.Request) -> web.StreamResponse:
        return await self._told(self._exchange(request), self._models(request, request.match_info["model"]))

    def _exchange(self, request: web.Request) -> Exchange:
        """Of a page that both APIs have."""
        dialect = Dialect.ANTHROPIC if "anthropic-version" in request.headers else Dialect.OPENAI
        return Exchange(request, dialect, self._limits.heartbeat_s)

    async def _models(self, request: web.Request, wanted: str | None) -> web.StreamResponse:
        caller, directory = self._access.caller(request.headers), self._leasing.directory
        await self._leasing.learnt()
        if wanted is not None:
            caller.require(wanted)
        behind = None if wanted is None else directory.pools(wanted)
        shown = [place for place in directory.all() if caller.may_see(place)]
        if behind is None:
            return web.json_response(as_list(listed(place for place in shown if place.card.get("listed", True))))
        return web.json_response(listed(place for place in shown if place.pool_id in behind)[0])

    async def not_found(self, request: web.Request) -> web.StreamResponse:
        problem = RequestError(
            f"cannot find {request.method} {request.path[:120]}", code="NOT_FOUND", status=404,
            hint="GET /v1/models lists the models; engines' other paths are at /upstream/MODEL/PATH",
        )  # fmt: skip
        return await Exchange(request, Dialect.OPENAI, self._limits.heartbeat_s).fail(problem)

    # --- a request ---

    async def _followed(self, exchange: Exchange, work: Coroutine[Any, Any, web.StreamResponse]) -> web.StreamResponse:
        """As ``_counted``, and traced where this gateway does."""
        if self._spans is None:
            return await self._counted(exchange, work)
        with self._spans.request(exchange.request, exchange.record) as exchange.traced:
            return await self._counted(exchange, work)

    async def _counted(self, exchange: Exchange, work: Coroutine[Any, Any, web.StreamResponse]) -> web.StreamResponse:
        """``work`` as one of the requests that are counted, and that can be cancelled."""
        record = exchange.record
        with self._requests.under_way(record):
            try:
                return await self._told(exchange, work)
            except asyncio.CancelledError:
                task, why = asyncio.current_task(), self._requests.why_cancelled(record)
                if why is None or task is None:
                    raise
                task.uncancel()
                record.state = "cancelled"
                return await exchange.fail(why)

    async def _told(self, exchange: Exchange, work: Coroutine[Any, Any, web.StreamResponse]) -> web.StreamResponse:
        """``work``, with every error in the client's dialect."""
        try:
            return await work
        except PoolError as problem:
            self._requests.failed(exchange.record, problem)
            if exchange.traced is not None:
                exchange.traced.refused(problem)
            if problem.retriable and problem.status in (429, 503):
                problem.retry_after_ms = self._again_ms(problem, exchange.record.model)
            if problem.code == "QUEUE_TIMEOUT" or (problem.status >= 500 and self._access.keys is not None):
                problem.hint = None  # it is for whoever runs the node, and may say what is on it
            return await exchange.fail(problem)
        except ConnectionError:  # of the client: it has gone, and nobody is told
            exchange.record.state = "cancelled"
            return exchange.response or web.Response(status=499)

    def _again_ms(self, problem: PoolError, model: str | None) -> int | None:
        """When a slot may be free, by what requests took of late, where nobody knows better."""
        typical_s = self._requests.typical_s(model)
        if typical_s is None:
            return problem.retry_after_ms
        return max(problem.retry_after_ms or 0, round(1000 * min(typical_s, _LONGEST_AGAIN_S)))

    async def _inferred(self, exchange: Exchange, path: Path) -> web.StreamResponse:
        caller = self._access.caller(exchange.request.headers)
        exchange.record.key = caller.name
        body = Body(self._bodies)
        try:
            raw = await body.read(exchange.request)
            self._requests.capture(exchange.record, exchange.request.raw_headers, raw)
            asked = self._read(exchange.request, raw, path)
            exchange.stream = asked.stream and path.streams
            target = exchange.request.rel_url.raw_path_qs
            if path.inner is not None:
                target = path.inner + target[len(exchange.request.rel_url.raw_path) :]
            exchange.show_life()
            with caller.asking(asked.model):
                return await self._served(exchange, target, asked)
        finally:
            exchange.show_no_more()
            body.let_go()

    async def _passed_through(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        caller = self._access.caller(request.headers)
        exchange.record.key = caller.name
        await self._leasing.learnt()
        model, target = self._leasing.directory.split(request.rel_url.raw_path_qs.split("/", 2)[2])
        if ".." in unquote(target.partition("?")[0]).split("/"):
            raise RequestError("cannot pass that path on: it has a part `..`")
        body = Body(self._bodies)
        try:
            raw = await body.read(request)
            self._requests.capture(exchange.record, request.raw_headers, raw)
            with caller.asking(model):
                return await self._served(exchange, target, passed_through(model, raw, target))
        finally:
            body.let_go()

    async def _props(self, exchange: Exchange) -> web.StreamResponse:
        request, directory = exchange.request, self._leasing.directory
        caller = self._access.caller(request.headers)
        exchange.record.key = caller.name
        await self._leasing.learnt()
        model = request.query.get("model") or self._only_loaded(caller)
        if model is None:
            exchange.record.status = 200
            return web.json_response(dict(AS_ROUTER))
        with caller.asking(model):
            if request.query.get("autoload") in _NO and directory.open_launches().keys().isdisjoint(directory.pools(model)):
                raise RequestError(f"model {model[:80]!r} is not loaded", code="POOL_UNREADY", status=503)
            return await self._served(exchange, request.rel_url.raw_path_qs, Asked(model, stream=False, body=b""))

    def _only_loaded(self, caller: Caller) -> str | None:
        """A name of the only model of llama.cpp that is loaded, and that the caller may ask for; None: there is not one."""
        loaded = [place for place in self._leasing.directory.all() if place.open and place.engine == "llamacpp"]
        found = {place.name: name for place in loaded for name in place.names if caller.may_ask(name)}
        return next(iter(found.values())) if len(found) == 1 else None

    async def _served(self, exchange: Exchange, target: str, asked: Asked) -> web.StreamResponse:
        exchange.record.model = asked.model
        for attempt in range(1, _TRIES + 1):
            held: list[HeldLease] = []
            broken = False
            works = exchange.request.method == "POST"  # else it is a page
            counted = await self._leasing.counted(asked.model) if works else None
            try:
                lease = await self._lease(exchange, asked, counted)
                held.append(lease)
                place = self._leasing.directory.place(lease.pool_id)
                self._requests.leased(exchange.record, lease.pool_id, (place and place.engine) or "unknown")
                body = for_engine(asked, place)
                answering = forward(self._links, exchange, engine_place(lease.url, target), body, self._access.withheld)
                traced = exchange.traced
                return await (answering if traced is None else traced.engine(lease.url, place, answering))
            except BrokenEngineError as problem:
                broken = True
                if exchange.sent or attempt == _TRIES:
                    raise await self._with_cause(problem, held[0]) from problem
                if not await self._leasing.moves_on(asked.model, held[0], gone=not isinstance(problem, OddEngineError)):
                    raise _final(problem.message, held[0]) from problem
            finally:
                if counted is not None:
                    counted.over()
                for one in held:
                    self._leasing.done(one, broken=broken)
        raise AssertionError("unreachable")

    async def _lease(self, exchange: Exchange, asked: Asked, counted: Counted | None) -> HeldLease:
        """A slot: where several pools have the name and the request is of a session, of the one that served that last."""
        leasing, session = self._leasing, None
        if leasing.directory.shared(asked.model):
            session = self._sessions.of(exchange.request.headers, asked, exchange.record.key)
        lease = None if session is None else await leasing.again(asked.model, session, exchange.request_id, counted)
        if (lease := lease or leasing.kept(asked.model, counted)) is None:
            async with self._loading.shown(exchange, asked.model):
                taking = leasing.take(asked.model, exchange.request_id, counted)
                lease = await (taking if exchange.traced is None else exchange.traced.slot(taking))
        if counted is not None:
            counted.goes_to(lease.pool_id)
        if session is not None:
            leasing.served(session, lease)
        return lease

    async def _with_cause(self, problem: BrokenEngineError, lease: HeldLease) -> BrokenEngineError:
        """With what the daemon has found out about the engine's end, which takes it a moment."""
        until = 0.0 if isinstance(problem, OddEngineError) else asyncio.get_running_loop().time() + _CAUSE_S
        while asyncio.get_running_loop().time() < until:
            place = self._leasing.directory.place(lease.pool_id)
            cause = None if place is None or place.open else place.last_error or ("it was stopped" if place.stays_down else None)
            if cause is not None:
                return _final(f"{problem.message}; {cause}", lease)
            await asyncio.sleep(0.02)
        return _final(problem.message, lease)

    def _read(self, request: web.Request, raw: bytes, path: Path) -> Asked:
        kind = request.headers.get(hdrs.CONTENT_TYPE, "")
        if path.form and kind.lower().startswith("multipart/form-data"):
            return in_form(raw, kind)
        return in_json(raw)


def _final(message: str, lease: HeldLease) -> BrokenEngineError:
    """Perhaps it is this request that ends engines: clients are not to send it again by themselves."""
    return BrokenEngineError(message, pool_id=lease.pool_id, retriable=False)
