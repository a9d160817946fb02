"""A gateway between a scripted node and a scripted engine, all on loopback, in one loop."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from pool_managerd.gateway.bodies import BodyLimits
from pool_managerd.gateway.front import FrontLimits
from pool_managerd.gateway.leasing import LeaseTimes
from pool_managerd.gateway.node_link import NodeLink
from pool_managerd.gateway.server import Gateway, GatewayOptions
from pool_managerd.httpd.server import HttpLimits, listen, url_of

Json = dict[str, Any]
CHUNK = b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
LIMITS = FrontLimits(BodyLimits(1 << 20, 3 << 20, seconds=1.0), heartbeat_s=0.05)
TIMES = LeaseTimes(linger_s=30, ttl_s=30, away_s=5, again_s=0.02)
OPTIONS = GatewayOptions(LIMITS, HttpLimits(shutdown_s=0.5), TIMES)


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Its URL, while it answers."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
    await runner.setup()
    listener = listen("127.0.0.1:0")
    await web.SockSite(runner, listener).start()
    try:
        yield url_of(listener)
    finally:
        await runner.cleanup()


@dataclass
class Engine:
    """Answers with ``words`` chunks, each when ``step`` is released where that is set; ``dies_after`` so many it cuts off."""

    words: int = 3
    step: asyncio.Semaphore | None = None
    dies_after: int | None = None
    refuses: int = 0
    status: int = 200
    seen: list[tuple[web.Request, bytes]] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append((request, body))
        self.running += 1
        try:
            if self.refuses:
                self.refuses -= 1
                self._cut(request)
            if self.status != 200:
                return web.json_response({"error": {"message": "too long", "type": "x"}}, status=self.status)
            if b'"stream":true' not in body.replace(b" ", b""):
                if self.step is not None:
                    await self.step.acquire()
                return web.json_response({"path": request.path_qs, "body": body.decode("utf-8", "replace")})
            return await self._stream(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Access-Control-Allow-Origin": "*"})
        response.enable_chunked_encoding()
        if self.step is not None:
            await self.step.acquire()
        await response.prepare(request)
        for number in range(self.words):
            if self.step is not None and number:
                await self.step.acquire()
            if self.dies_after == number:
                await asyncio.sleep(0.05)  # what comes with the end of its connection is lost with it
                self._cut(request)
            await response.write(CHUNK)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _cut(self, request: web.Request) -> None:
        if request.transport is not None:
            request.transport.close()
        raise ConnectionResetError

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app


@dataclass
class Node:
    """The control API, as far as a gateway asks it. ``slots`` are free; ``refusal`` is (status, body) of an acquire; ``served``
    are the pools that leases were given of, ``row`` is what the queue says of each who waits; ``started`` is what an acquire
    says, and ``traceparents`` what came with them.
    """

    rows: dict[str, Json] = field(default_factory=dict)
    slots: int = 4
    waiting: bool = False
    refusal: tuple[int, Json] | None = None
    leases: dict[str, str] = field(default_factory=dict)
    given: int = 0
    waits: int = 0
    gave_up: int = 0
    holders: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    away: bool = False
    row: Json = field(default_factory=dict)
    started: bool = False
    traceparents: list[str | None] = field(default_factory=list)
    waiters: list[str] = field(default_factory=list)
    queue_asked: int = 0
    logs: dict[str, list[str]] = field(default_factory=dict)
    log_queries: list[str] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def pool(self, pool_id: str, url: str, **row: Any) -> None:
        known: Json = {
            "pool_id": pool_id, "name": pool_id, "names": [pool_id], "state": "ready", "ready": True, "draining": False,
            "loading": False, "stays_down": False, "epoch": 1, "url": url, "engine": "llamacpp", "model_id": "m", "ctx": 2048,
            "engine_names": None, "slots": 4, "last_error": None,
        }  # fmt: skip
        self.rows[pool_id] = {**known, **row}

    async def tell(self, **changes: Any) -> None:
        """Something has changed: whoever waits looks again."""
        for name, value in changes.items():
            setattr(self, name, value)
        async with self.changed:
            self.changed.notify_all()

    async def routes(self, request: web.Request) -> web.StreamResponse:
        self._here()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while not self.away:
            told = {"pools": list(self.rows.values()), "gone": [], "waiting": self.waiting}
            await response.write(b"event: routes\ndata: " + json.dumps(told).encode() + b"\n\n")
            async with self.changed:
                await self.changed.wait()
        if request.transport is not None:
            request.transport.abort()
        return response

    async def acquire(self, request: web.Request) -> web.StreamResponse:
        self._here()
        asked = await request.json()
        self.traceparents.append(request.headers.get("traceparent"))
        if asked.get("wait_ms") == 0 and not self._free(asked["model"]):
            return web.json_response({"code": "QUEUE_TIMEOUT", "message": "no slot within 0 ms"}, status=503)
        self.waits += 1
        self.waiters.append(asked["holder"])
        try:
            async with self.changed:
                await self.changed.wait_for(lambda: self.refusal is not None or self._free(asked["model"]))
        except asyncio.CancelledError:
            self.gave_up += 1
            raise
        finally:
            self.waits -= 1
            self.waiters.remove(asked["holder"])
        if self.refusal is not None:
            status, body = self.refusal
            return web.json_response(body, status=status)
        row = self._row(asked["model"])
        self.given += 1
        lease_id = f"l{self.given}"
        self.leases[lease_id] = row["pool_id"]
        self.holders.append(asked["holder"])
        self.served.append(row["pool_id"])
        given = {key: row[key] for key in ("pool_id", "url", "epoch")}
        return web.json_response({"lease_id": lease_id, "started": self.started, **given}, status=201)

    async def give_back(self, request: web.Request) -> web.StreamResponse:
        self._here()
        known = self.leases.pop(request.match_info["lease"], None)
        await self.tell()
        return web.json_response({"active_leases": len(self.leases)}, status=404 if known is None else 200)

    async def queue(self, _request: web.Request) -> web.StreamResponse:
        self._here()
        self.queue_asked += 1
        known = {"state": "ready", "step": None, "estimate_ms": None, "waits_for": "a slot"}
        return web.json_response([
            {"holder": holder, "place": place, **known, **self.row} for place, holder in enumerate(self.waiters, 1)
        ])  # fmt: skip

    async def log(self, request: web.Request) -> web.StreamResponse:
        """``logs`` of the pool, then what is appended to them."""
        self._here()
        self.log_queries.append(request.query_string)
        lines = self.logs.setdefault(request.match_info["pool"], [])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        given = max(0, len(lines) - int(request.query["lines"]))
        while not self.away:
            told = {"id": f"1:{len(lines)}", "text": "".join(lines[given:])}
            given = len(lines)
            await response.write(b"id: 1:1\ndata: " + json.dumps(told).encode() + b"\n\n: still here\n\n")
            async with self.changed:
                await self.changed.wait()
        return response

    async def renew(self, request: web.Request) -> web.StreamResponse:
        self._here()
        return web.json_response({}, status=200 if request.match_info["lease"] in self.leases else 404)

    async def evict(self, request: web.Request) -> web.StreamResponse:
        pool_id = request.match_info["pool"]
        if pool_id in self.leases.values():
            return web.json_response({"code": "POOL_IN_USE", "message": f"cannot evict pool '{pool_id}': in flight"}, status=409)
        self.rows[pool_id] |= {"ready": False, "state": "offline"}
        await self.tell()
        return web.json_response({"status": "succeeded"})

    def _row(self, model: str) -> Json:
        return min((row for row in self.rows.values() if model in row["names"]), key=self._used)

    def _used(self, row: Json) -> int:
        return sum(pool_id == row["pool_id"] for pool_id in self.leases.values())

    def _free(self, model: str) -> bool:
        row = self._row(model)
        return row["ready"] and self._used(row) < row["slots"] and len(self.leases) < self.slots

    def _here(self) -> None:
        if self.away:
            raise web.HTTPServiceUnavailable(text='{"code": "NODE_UNAVAILABLE", "message": "it is away"}')

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/routes", self.routes)
        app.router.add_post("/v1/acquire", self.acquire)
        app.router.add_get("/v1/queue", self.queue)
        app.router.add_get("/v1/pools/{pool}/logs", self.log)
        app.router.add_delete("/v1/pools/{pool}/leases/{lease}", self.give_back)
        app.router.add_post("/v1/pools/{pool}/evict", self.evict)
        app.router.add_put("/v1/pools/{pool}/leases/{lease}", self.renew)
        return app


@dataclass
class Lab:
    """All of it, running; ``url`` is the gateway's."""

    node: Node
    engine: Engine
    engine_url: str
    gateway: Gateway
    url: str
    session: aiohttp.ClientSession

    async def ask(self, body: Any, path: str = "/v1/chat/completions", **options: Any) -> tuple[int, Any]:
        """One request with its JSON answer."""
        data = io.BytesIO(body) if isinstance(body, bytes) else json.dumps(body)
        async with self.session.post(self.url + path, data=data, **options) as answer:
            return answer.status, json.loads(await answer.read())

    async def text(self, body: Json, path: str = "/v1/chat/completions", **options: Any) -> str:
        """One request, with all of its stream."""
        async with self.session.post(self.url + path, json=body, **options) as answer:
            return (await answer.read()).decode()

    async def until(self, condition: Any, what: str) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)
        assert condition(), what


@asynccontextmanager
async def lab(options: GatewayOptions = OPTIONS, **row: Any) -> AsyncIterator[Lab]:
    """One pool, ``m``, that is ready."""
    node, engine = Node(), Engine()
    async with served(engine.app()) as engine_url, served(node.app()) as node_url, aiohttp.ClientSession() as session:
        node.pool("m", engine_url, **row)
        async with Gateway(NodeLink(node_url, lambda: None), options) as gateway:
            following = asyncio.create_task(gateway.run())
            listener = listen("127.0.0.1:0")
            url = await gateway.start(listener)
            made = Lab(node, engine, engine_url, gateway, url, session)
            await made.until(lambda: gateway.leasing.connected, "the gateway to follow the node")
            try:
                yield made
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
                node.away = True
                await node.tell()
