"""From a request to its engine's answer, byte for byte, with backpressure: what the client does not take is not read."""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web
from multidict import CIMultiDict

from pool_managerd.errors import EngineError
from pool_managerd.gateway.engine_connection import Question
from pool_managerd.gateway.engine_link import EngineAnswer, EngineLinks
from pool_managerd.gateway.exchange import REQUEST_ID, Exchange

_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length", b"expect", b"x-request-id",
})  # fmt: skip
_HOP_OF_STREAMS = _HOP | {b"accept-encoding"}
"""What signs of life are put into is plain text."""
_KEPT_BACK = frozenset({*_HOP, b"server", b"date"})
_WHOLE_BYTES = 1 << 20


async def forward(
    links: EngineLinks, exchange: Exchange, place: tuple[str, str], body: bytes | None, withheld: Collection[bytes] = ()
) -> web.StreamResponse:
    """Ask the engine at ``place`` (address, path with query) and pass its answer on.

    Headers that are ``withheld`` do not reach it. Raises BrokenEngineError when it ends; whether the client was sent anything by
    then, the exchange knows.
    """
    request, (url, target) = exchange.request, place
    named = request.headers.get("Connection")
    hop = _HOP_OF_STREAMS if exchange.stream else _HOP
    kept_back = hop if not (withheld or named) else hop | set(withheld) | _tokens(named)
    headers = [header for header in request.raw_headers if header[0].lower() not in kept_back]
    headers.append((b"x-request-id", exchange.request_id.encode()))
    asked = headers if exchange.traced is None else exchange.traced.for_engine(headers)
    answer = await links.ask(url, Question(request.method.encode(), target.encode(), asked, body))
    try:
        return await _passed_on(exchange, answer)
    finally:
        answer.close()


async def _passed_on(exchange: Exchange, answer: EngineAnswer) -> web.StreamResponse:
    sse = answer.header(b"content-type").startswith(b"text/event-stream") and not answer.header(b"content-encoding")
    if not sse:
        exchange.show_no_more()
    if exchange.begun and not (sse and answer.status == 200):
        raise await _refused(answer)
    if exchange.record.capture is not None:
        exchange.record.capture.answered(answer.headers)
    if not sse and not exchange.begun and answer.length is not None and answer.length <= _WHOLE_BYTES:
        body = await answer.whole()
        exchange.record.status = answer.status
        exchange.record.passes(body)
        head = _passed(answer)
        head[REQUEST_ID] = exchange.request_id
        return web.Response(body=body, status=answer.status, headers=head)
    exchange.stream = sse
    exchange.show_life()
    piece = await answer.piece()
    if not exchange.begun:
        head = _passed(answer)
        if sse:
            head["X-Accel-Buffering"] = "no"
        elif answer.length is not None:
            head["Content-Length"] = str(answer.length)
        await exchange.begin(answer.status, head)
    while piece and not answer.ended:
        await exchange.write(piece)
        piece = await answer.piece()
    return await exchange.end(piece)  # with what came last, in one go


async def _refused(answer: EngineAnswer) -> EngineError:
    """The engine's error, for a client whose stream has begun with signs of life. What it says is for the client alone."""
    if answer.status < 400:
        kind = answer.header(b"content-type").decode("latin-1")[:80] or "no Content-Type"
        return EngineError(f"the engine answered {answer.status} with {kind} where a stream was asked for", code="ENGINE_REFUSED")
    said = (await answer.piece()).decode("utf-8", "replace")
    return EngineError(
        f"the engine answered {answer.status}", code="ENGINE_REFUSED", status=answer.status, hint=said[:500] or None
    )


def _passed(answer: EngineAnswer) -> CIMultiDict[str]:
    """Those for the client: what an engine tells browsers is kept back as well."""
    kept_back = _KEPT_BACK | _tokens(answer.header(b"connection").decode("latin-1"))
    return CIMultiDict(
        (name.decode("ascii"), value.decode("utf-8", "surrogateescape"))
        for name, value in answer.headers
        if (low := name.lower()) not in kept_back and not low.startswith(b"access-control-")
    )


def _tokens(listed: str | None) -> set[bytes]:
    """Headers that a Connection header names."""
    return {token.strip().lower().encode("utf-8", "surrogateescape") for token in (listed or "").split(",")}
