"""Changes of pools: accepted durably and answered with an operation, or waited for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import json_response
from pool_managerd.api.requests import new_pool_id, pool_id, read_model, read_object, switch
from pool_managerd.api.routing import Handler
from pool_managerd.api.schemas import DrainBody, NoBody
from pool_managerd.errors import RequestError
from pool_managerd.node import Operation, PoolManager


async def preload(context: ApiContext, request: web.Request) -> web.Response:
    """Answers when the pool is ready (200) or has failed (the error), unless ``?wait=false``."""
    wanted = new_pool_id(request)
    wait = switch(request, "wait", default=True)
    body = await read_object(request)
    engine = None if body is None else context.node.parse_prepared(body, wanted)
    operation = await context.keep(context.node.preload(wanted, engine))
    if not wait:
        return json_response(operation.to_dict(), 202)
    return json_response(await context.keep(operation.wait()))


async def drain(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    wait = switch(request, "wait", default=False)
    body = await read_model(request, DrainBody)
    return await _finish(context, context.node.drain(wanted, body.deadline_ms), wait)


def change(call: Callable[[PoolManager, str], Coroutine[Any, Any, Operation]]) -> Handler:
    """The handler of a change that takes nothing but the pool."""

    async def handler(context: ApiContext, request: web.Request) -> web.Response:
        wanted = pool_id(request)
        wait = switch(request, "wait", default=False)
        await read_model(request, NoBody)
        return await _finish(context, call(context.node, wanted), wait)

    return handler


cancel_preload = change(lambda node, wanted: node.cancel_preload(wanted))
start = change(lambda node, wanted: node.start(wanted))
stop = change(lambda node, wanted: node.stop(wanted))
restart = change(lambda node, wanted: node.restart(wanted))
hold = change(lambda node, wanted: node.hold(wanted))
release = change(lambda node, wanted: node.release(wanted))
undrain = change(lambda node, wanted: node.undrain(wanted))
reset_breaker = change(lambda node, wanted: node.reset_breaker(wanted))


async def register(context: ApiContext, request: web.Request) -> web.Response:
    wanted = new_pool_id(request)
    await read_model(request, NoBody)
    await context.keep(_awaited(context.node.register(wanted)))
    return json_response({"pool_id": wanted, "registered": True})


async def deregister(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    await read_model(request, NoBody)
    if not await context.keep(_awaited(context.node.deregister(wanted))):
        raise RequestError(f"pool {wanted} not found", code="POOL_NOT_FOUND", status=404, pool_id=wanted)
    return json_response({"pool_id": wanted, "registered": False})


async def _finish(context: ApiContext, change: Coroutine[Any, Any, Operation], wait: bool) -> web.Response:
    operation = await context.keep(change)
    if not wait:
        return json_response(operation.to_dict(), 202)
    await context.keep(operation.wait())
    return json_response(operation.to_dict())


async def _awaited(call: Awaitable[bool]) -> bool:
    return await call
