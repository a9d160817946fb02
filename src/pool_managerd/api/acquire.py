"""A slot of a model for whoever asks, waited for: as one answer, or as a stream that tells what it waits for."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import Any

from aiohttp import web

from pool_managerd.api.bodies import AcquireBody, NoBody
from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import CORRELATION_KEY, Handover, envelope, json_response
from pool_managerd.api.requests import read_model, switch, token_id
from pool_managerd.api.streams import STILL_HERE, open_stream, require_room, send, tell
from pool_managerd.core.demand.request import AcquireRequest
from pool_managerd.errors import PoolError

_LOOK_S = 0.1
_TOLD = ("place", "state", "step", "waits_for")
"""What is told anew when it changes; the times beside it change all the time."""


async def acquire(context: ApiContext, request: web.Request) -> web.StreamResponse:
    """Answers when there is a slot (201); a client that goes away does not wait. ``?dry_run=true``: what it would lead to."""
    dry_run = switch(request, "dry_run", default=False)
    body = await read_model(request, AcquireBody)
    if dry_run:
        return json_response(await context.keep(context.node.plan_acquire(body.model)))
    asked = AcquireRequest(body.model, body.wait_ms, body.ttl_ms, body.priority, body.holder)
    if "text/event-stream" in request.headers.get("Accept", ""):
        return await _told(context, request, asked)
    given = await context.node.take_slot(asked)
    return Handover(given, lambda: context.node.release_lease(given["pool_id"], given["lease_id"]))


async def _told(context: ApiContext, request: web.Request, asked: AcquireRequest) -> web.StreamResponse:
    """Events ``waiting`` with place, estimate and what is waited for, at each change; then ``granted``, or ``error``."""
    require_room(context)
    node, ticket, theirs = context.node, context.node.new_ticket_id(), False
    taking = asyncio.ensure_future(node.take_slot(asked, ticket))
    try:
        await asyncio.wait({taking}, timeout=_LOOK_S)
        if taking.done() and taking.exception() is not None:
            taking.result()  # refused at once: as without a stream
        async with open_stream(context, request, "text/event-stream") as response:
            told, spoke = None, time.monotonic()
            while not taking.done():
                row = node.ticket(ticket)
                if row is not None and (new := tuple(row[key] for key in _TOLD)) != told:
                    told, spoke = new, time.monotonic()
                    await send(context, response, _frame("waiting", row))
                elif time.monotonic() - spoke >= context.streams.heartbeat_s:
                    spoke = time.monotonic()
                    await send(context, response, STILL_HERE)
                await asyncio.wait({taking}, timeout=_LOOK_S)
            try:
                await send(context, response, _frame("granted", taking.result()))
                theirs = True
            except PoolError as problem:
                await send(context, response, _frame("error", envelope(problem, request[CORRELATION_KEY])))
        return response
    finally:
        if not taking.done():
            taking.cancel()
        elif not (theirs or taking.cancelled() or taking.exception() is not None):
            node.release_lease(taking.result()["pool_id"], taking.result()["lease_id"])


def _frame(event: str, body: dict[str, Any]) -> bytes:
    return f"event: {event}\ndata: {json.dumps(body, separators=(',', ':'), default=str)}\n\n".encode()


async def queue(context: ApiContext, _request: web.Request) -> web.Response:
    return json_response(context.node.queue())


async def routes(context: ApiContext, request: web.Request) -> web.StreamResponse:
    """All pools; with ``Accept: text/event-stream`` an event ``routes`` with all of them, then one with each change."""
    if request.method == "HEAD" or "text/event-stream" not in request.headers.get("Accept", ""):
        return json_response(context.node.routes())
    async with open_stream(context, request, "text/event-stream") as response:
        changes = context.node.watch_routes()
        await tell(context, response, changes, partial(_frame, "routes"))
    return response


async def cancel(context: ApiContext, request: web.Request) -> web.Response:
    wanted = token_id(request, "ticket")
    await read_model(request, NoBody)
    context.node.cancel_ticket(wanted)
    return json_response({"ticket_id": wanted, "cancelled": True})
