"""The GPUs: what they hold, which of them are in use, and whether this machine may run engines at all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import json_response
from pool_managerd.api.requests import device_id, read_model
from pool_managerd.api.routing import Handler
from pool_managerd.api.schemas import NoBody
from pool_managerd.node import PoolManager


async def devices(context: ApiContext, _request: web.Request) -> web.Response:
    return json_response(context.node.devices())


def device_change(call: Callable[[PoolManager, str], Coroutine[Any, Any, dict[str, Any]]]) -> Handler:
    """The handler of a change of one device; it answers with the device's row."""

    async def handler(context: ApiContext, request: web.Request) -> web.Response:
        wanted = device_id(request)
        await read_model(request, NoBody)
        return json_response(await context.keep(call(context.node, wanted)))

    return handler


def node_change(call: Callable[[PoolManager], Coroutine[Any, Any, dict[str, Any]]]) -> Handler:
    """The handler of a change that takes nothing."""

    async def handler(context: ApiContext, request: web.Request) -> web.Response:
        await read_model(request, NoBody)
        return json_response(await context.keep(call(context.node)))

    return handler


cordon = device_change(lambda node, wanted: node.cordon(wanted))
uncordon = device_change(lambda node, wanted: node.uncordon(wanted))
release = node_change(lambda node: node.release_devices())
resume = node_change(lambda node: node.resume_devices())


async def preflight(context: ApiContext, request: web.Request) -> web.Response:
    await read_model(request, NoBody)
    found = await context.keep(context.node.preflight())
    return json_response(context.node.events.redactor.mapping(found))
