"""GPUs that are left to others for a while: by whom asks, and taken back."""

from __future__ import annotations

from aiohttp import web

from pool_managerd.api.bodies import EndYieldBody, YieldBody
from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import json_response
from pool_managerd.api.requests import read_model


async def yields(context: ApiContext, _request: web.Request) -> web.Response:
    """Those of now, with the pools that are still there."""
    return json_response(context.node.yields())


async def begin(context: ApiContext, request: web.Request) -> web.Response:
    """Nothing starts there from now on; what is idle goes at once, what is in use when its requests have ended."""
    body = await read_model(request, YieldBody)
    return json_response(await context.keep(context.node.yield_gpus(body.devices, body.for_ms)))


async def end(context: ApiContext, request: web.Request) -> web.Response:
    """Answers with what is still left to others."""
    body = await read_model(request, EndYieldBody)
    return json_response(await context.keep(context.node.end_yield(body.devices)))
