"""Endless answers: the event stream (SSE) and the engine's log. Bounded in number, and a stuck reader is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import CORRELATION_HEADER, CORRELATION_KEY
from pool_managerd.api.requests import number, pool_id, switch
from pool_managerd.core.event import Event
from pool_managerd.errors import NodeError, RequestError
from pool_managerd.telemetry.engine_log import EngineLog

_ITEM = TypeVar("_ITEM")
MAX_EVENT_ID = 2**63 - 1
_REPLAY_GAP_S = 0.05
STILL_HERE = b": still here\n\n"
_REPLICAS = ("r0", "r1")
_PLACE = re.compile(r"([0-9]{1,20}):([0-9]{1,20})", re.ASCII)


async def events(context: ApiContext, request: web.Request) -> web.StreamResponse:
    """Server-sent events with ids; ``Last-Event-ID`` (or ``?after=``) resumes. ``?follow=false`` ends after the past."""
    after = _last_event_id(request)
    follow = switch(request, "follow", default=True)
    if after is None and not follow:
        after = 0
    if request.method == "HEAD":
        return web.Response(content_type="text/event-stream")
    async with open_stream(context, request, "text/event-stream") as response:
        with context.node.events.subscribe(after) as subscription:  # it ends for a client that is slow, which resumes by id
            await send(context, response, b"retry: 1000\n\n")
            await tell(context, response, subscription, lambda event: event_frame(event) if event.journal else b"", follow=follow)
    return response


async def tell(
    context: ApiContext, response: web.StreamResponse, items: AsyncIterator[_ITEM], frame: Callable[[_ITEM], bytes], *,
    follow: bool = True,
) -> None:  # fmt: skip
    """Each of ``items`` as ``frame`` makes it, with signs of life between them, until they or the daemon end; without ``follow``
    until the next one does not come at once.
    """
    pending: asyncio.Future[_ITEM] | None = None
    closing = asyncio.ensure_future(context.closing.wait())
    patience = context.streams.heartbeat_s if follow else _REPLAY_GAP_S
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            waited: set[asyncio.Future[Any]] = {pending, closing}
            await asyncio.wait(waited, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if pending.done():
                item = pending.result()
                pending = None
                await send(context, response, frame(item))
            elif closing.done() or not follow:
                break
            else:
                await send(context, response, STILL_HERE)
    except StopAsyncIteration:
        pending = None
    finally:
        for task in (pending, closing):
            if task is not None:
                task.cancel()


async def logs(context: ApiContext, request: web.Request) -> web.StreamResponse:
    """The last lines of the engine's log; ``?follow=true`` goes on with what is appended.

    As server-sent events where those are accepted: their ids are places in the log, behind which ``Last-Event-ID`` (or
    ``?after=``) goes on, under the next daemon, too.
    """
    wanted = pool_id(request)
    lines = number(request, "lines", 200, 0, 10_000) or 0
    follow = switch(request, "follow", default=False)
    since_ms, previous = number(request, "since_ms", None, 0, MAX_EVENT_ID), switch(request, "previous", default=False)
    after, replica = _log_place(request), _replica(request, whole=not previous and since_ms is None)
    if follow and previous:
        raise RequestError("cannot follow the log of a launch that has ended: leave follow or previous out")
    sse = "text/event-stream" in request.headers.get("Accept", "")
    media = "text/event-stream" if sse else "text/plain; charset=utf-8"
    if request.method == "HEAD":
        context.node.status(wanted)
        return web.Response(content_type=media.partition(";")[0])
    path = context.node.log_path(wanted, replica)  # 404 for a pool that does not exist
    if replica is not None and not await asyncio.to_thread(path.is_file):
        message = f"cannot show the log of replica {replica} of pool {wanted}: there is none"
        raise RequestError(message, code="LAUNCH_NOT_FOUND", status=404, pool_id=wanted)
    log = EngineLog(path, context.node.events.redactor.text)
    window = _window(context, wanted, since_ms, previous=previous)
    past = log.past(lines, *window) if after is None else log.behind(after)
    frame = functools.partial(log_frame, log) if sse else bytes
    async with open_stream(context, request, media) as response:
        try:
            while (chunk := await asyncio.to_thread(next, past, None)) is not None:
                await send(context, response, frame(chunk))
        finally:
            past.close()
        if follow:
            await send(context, response, frame(b""))
            await _follow(context, response, log, frame, beats=sse)
    return response


async def _follow(
    context: ApiContext, response: web.StreamResponse, log: EngineLog, frame: Callable[[bytes], bytes], *, beats: bool
) -> None:
    """What is appended, until the daemon ends. ``beats``: a quiet log shows signs of life."""
    spoke = time.monotonic()
    while not context.closing.is_set():
        if chunk := await asyncio.to_thread(log.appended):
            await send(context, response, frame(chunk))
            spoke = time.monotonic()
            continue
        if beats and time.monotonic() - spoke >= context.streams.heartbeat_s:
            await send(context, response, STILL_HERE)
            spoke = time.monotonic()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(context.closing.wait(), context.streams.poll_s)


def log_frame(log: EngineLog, text: bytes) -> bytes:
    """One SSE frame: a piece of the log, and the place behind it."""
    place = f"{log.place[0]}:{log.place[1]}"
    data = json.dumps({"id": place, "text": text.decode("utf-8", "replace")}, separators=(",", ":"))
    return f"id: {place}\ndata: {data}\n\n".encode()


def _replica(request: web.Request, *, whole: bool) -> str | None:
    """Which replica's log. Raises RequestError 400 for what is no replica, and unless its log is asked for as a ``whole``."""
    given = request.query.get("replica")
    if given is not None and (given not in _REPLICAS or not whole):
        raise RequestError("cannot show the log of that replica: it must be r0 or r1, and without since_ms and previous")
    return given


def _log_place(request: web.Request) -> tuple[int, int] | None:
    """Where to go on. Raises RequestError 400 for what is no place."""
    given = request.headers.get("Last-Event-ID", request.query.get("after"))
    if given is None:
        return None
    if (found := _PLACE.fullmatch(given)) is None:
        raise RequestError("cannot go on behind that: it is no id of an event of the log")
    return int(found[1]), int(found[2])


def _window(
    context: ApiContext, wanted: str, since_ms: int | None, *, previous: bool
) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Where to read the log from and to. Raises RequestError LAUNCH_NOT_FOUND for a launch that nothing is known of."""
    places = context.node.log_places(wanted)
    start, end = (None, None) if not previous else places.previous() or (None, None)
    if previous and end is None:
        message = f"cannot show an earlier launch of pool {wanted}: since the daemon started there was at most one"
        raise RequestError(message, code="LAUNCH_NOT_FOUND", status=404, pool_id=wanted)
    if since_ms is not None:
        start = places.since(round(time.time() * 1000) - since_ms) or start
    return start, end


def event_frame(event: Event) -> bytes:
    """One SSE frame. The data repeats id and type, with the event's fields beside them."""
    data = json.dumps(event.to_dict(), default=str, separators=(",", ":"))
    return f"id: {event.id}\nevent: {event.type}\ndata: {data}\n\n".encode()


def require_room(context: ApiContext) -> None:
    """Raises NodeError TOO_MANY_REQUESTS where no further stream may be opened."""
    if context.open_streams >= context.streams.max_streams:
        raise NodeError(
            f"cannot open another stream: {context.streams.max_streams} are open", code="TOO_MANY_REQUESTS", retry_after_ms=5000,
            hint="ask without Accept: text/event-stream",
        )  # fmt: skip


@contextlib.asynccontextmanager
async def open_stream(context: ApiContext, request: web.Request, media: str) -> AsyncIterator[web.StreamResponse]:
    """An endless answer that has begun. Raises NodeError TOO_MANY_REQUESTS, ConnectionResetError for a client that has gone."""
    require_room(context)
    headers = {
        "Content-Type": media,
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "X-Accel-Buffering": "no",
        CORRELATION_HEADER: request[CORRELATION_KEY],
    }
    response = web.StreamResponse(headers=headers)
    context.open_streams += 1
    begun = False
    try:
        await response.prepare(request)
        begun = True
        yield response
        await asyncio.wait_for(response.write_eof(), context.streams.write_timeout_s)
    except (TimeoutError, ConnectionResetError):
        if request.transport is not None:
            request.transport.abort()  # a reader that takes nothing keeps nothing
        if not begun:
            raise
    finally:
        context.open_streams -= 1


async def send(context: ApiContext, response: web.StreamResponse, data: bytes) -> None:
    """Raises TimeoutError where the reader does not take it."""
    if data:
        await asyncio.wait_for(response.write(data), context.streams.write_timeout_s)


def _last_event_id(request: web.Request) -> int | None:
    header = request.headers.get("Last-Event-ID")
    if header is None:
        return number(request, "after", None, 0, MAX_EVENT_ID)
    if not (header.isascii() and header.isdigit() and len(header) <= 19):
        raise RequestError("cannot resume: the Last-Event-ID header is not an event id")
    return int(header)
