"""From a request to its engine's answer, byte for byte, with backpressure: what the client does not take is not read."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Iterable, Mapping
from typing import TypeVar

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from pool_managerd.errors import EngineError
from pool_managerd.gateway.exchange import REQUEST_ID, Exchange

_T = TypeVar("_T")
_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "content-length", "expect",
})  # fmt: skip
_KEPT_BACK = frozenset({*_HOP, "server", "date"})
_WHOLE_BYTES = 1 << 20
_AT_ONCE_BYTES = 1 << 20
"""A larger body is written piece by piece."""
_CONNECT_S = 5.0
_IDLE_S = 3.0
"""A connection is not used again after it: llama.cpp and uvicorn close theirs after 5 s, and a race would lose the request."""


class BrokenEngineError(EngineError):
    """The engine ended, or cut its answer off."""

    code = "ENGINE_GONE"
    status = 502
    retriable = True


def engine_session() -> aiohttp.ClientSession:
    """For requests to engines on this machine: nothing is decoded, followed or remembered."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S), auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_S), trust_env=False,
    )  # fmt: skip


async def forward(
    session: aiohttp.ClientSession, exchange: Exchange, url: str, body: bytes | None, *, withheld: Iterable[str] = (),
) -> web.StreamResponse:  # fmt: skip
    """Ask the engine at ``url`` and pass its answer on. Headers that are ``withheld`` do not reach it.

    Raises BrokenEngineError when it ends; whether the client has been sent anything by then, the exchange knows.
    """
    request = exchange.request
    headers = _passed(request.headers, {*_HOP, *withheld})
    headers[REQUEST_ID] = exchange.request_id
    data = io.BytesIO(body) if body is not None and len(body) > _AT_ONCE_BYTES else body
    asking = session.request(request.method, url, data=data, headers=headers, allow_redirects=False)
    answer = await exchange.patiently(_of_engine(asking))
    try:
        return await _passed_on(exchange, answer)
    finally:
        answer.close()  # of one that was read to its end the connection is used again; of any other it ends, and the work with it


async def _of_engine(asked: Awaitable[_T]) -> _T:
    """What the engine has to say. Raises BrokenEngineError."""
    try:
        return await asked
    except (aiohttp.ClientError, OSError, TimeoutError) as problem:
        raise BrokenEngineError(_why(problem)) from problem


def _why(problem: Exception) -> str:
    if isinstance(problem, aiohttp.ClientPayloadError):
        return "the engine ended in the middle of its answer"
    if isinstance(problem, aiohttp.ServerDisconnectedError | aiohttp.ClientConnectionResetError | ConnectionResetError):
        return "the engine closed the connection without an answer"
    cause = problem.os_error if isinstance(problem, aiohttp.ClientConnectorError) else problem
    return f"cannot reach the engine: {getattr(cause, 'strerror', None) or str(cause) or type(cause).__name__}"


async def _passed_on(exchange: Exchange, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    sse = answer.content_type == "text/event-stream"
    if exchange.begun and not (sse and answer.status == 200):
        raise await _refused(answer)
    head, length = _passed(answer.headers, _KEPT_BACK, browser=False), answer.content_length
    if not sse and not exchange.begun and length is not None and length <= _WHOLE_BYTES:
        body = await _of_engine(answer.read())
        exchange.record.status = answer.status
        exchange.record.passes(body)
        head[REQUEST_ID] = exchange.request_id
        return web.Response(body=body, status=answer.status, headers=head)
    if sse:
        head["X-Accel-Buffering"] = "no"
    elif length is not None:
        head["Content-Length"] = str(length)
    exchange.stream = sse
    chunk = await exchange.patiently(_of_engine(answer.content.readany()))
    if not exchange.begun:
        await exchange.begin(answer.status, head)
    while chunk:
        await exchange.write(chunk)
        chunk = await _next(exchange, answer.content)
    return await exchange.end()


async def _next(exchange: Exchange, content: aiohttp.StreamReader) -> bytes:
    """What comes next; empty at the end. A stream that is silent for long shows signs of life."""
    if not exchange.stream:
        return await _of_engine(content.readany())
    while True:
        asked = asyncio.timeout(exchange.heartbeat_s)
        try:
            async with asked:
                return await _of_engine(content.readany())
        except (TimeoutError, BrokenEngineError):
            if not asked.expired():
                raise
        await exchange.still_here()


async def _refused(answer: aiohttp.ClientResponse) -> EngineError:
    """The engine's error, for a client whose stream has begun with signs of life."""
    said = (await _of_engine(answer.content.read(4096))).decode("utf-8", "replace")
    return EngineError(f"the engine answered {answer.status}: {said[:500]}", code="ENGINE_REFUSED", status=answer.status)


def _passed(
    headers: CIMultiDictProxy[str] | Mapping[str, str], kept_back: Iterable[str], *, browser: bool = True
) -> CIMultiDict[str]:
    """Those for the other side; without ``browser`` what an engine tells browsers is kept back as well."""
    withheld = set(kept_back) | {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in withheld and (browser or not name.lower().startswith("access-control-"))
    )
