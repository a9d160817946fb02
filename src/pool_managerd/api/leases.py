"""Leases: the hot path, so nothing here waits or builds more than it must."""

from __future__ import annotations

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import json_response
from pool_managerd.api.requests import pool_id, read_model, token_id
from pool_managerd.api.schemas import LeaseBody, RenewBody


async def leases(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(context.node.leases(pool_id(request)))


async def allocate(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    if not request.body_exists:
        return json_response(context.node.allocate_lease(wanted), 201)
    body = await read_model(request, LeaseBody)
    return json_response(context.node.allocate_lease(wanted, body.holder, body.ttl_ms), 201)


async def renew(context: ApiContext, request: web.Request) -> web.Response:
    wanted, lease = pool_id(request), _lease_id(request)
    body = await read_model(request, RenewBody)
    return json_response(context.node.renew_lease(wanted, lease, body.ttl_ms))


async def release(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(context.node.release_lease(pool_id(request), _lease_id(request)))


def _lease_id(request: web.Request) -> str:
    return token_id(request, "lease_id", "LEASE_NOT_FOUND", "lease")
