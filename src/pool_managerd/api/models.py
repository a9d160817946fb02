"""The cache of models: listed, filled beforehand, verified, emptied."""

from __future__ import annotations

from aiohttp import web

from pool_managerd.api.bodies import ImportBody, ModelBody, ModelGcBody
from pool_managerd.api.changes import finish
from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import json_response
from pool_managerd.api.requests import read_model, switch


async def models(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(await context.node.models(everywhere=switch(request, "all", default=False)))


async def pull(context: ApiContext, request: web.Request) -> web.Response:
    """Accepted with 202, or answered when it has ended with ``?wait=true``; ``?dry_run=true`` says what would be fetched."""
    wait, dry_run = switch(request, "wait", default=False), switch(request, "dry_run", default=False)
    body = await read_model(request, ModelBody)
    if dry_run:
        return json_response(await context.keep(context.node.plan_pull(body.ref)))
    return await finish(context, context.node.pull_model(body.ref), wait)


async def bring(context: ApiContext, request: web.Request) -> web.Response:
    """Accepted with 202, or answered when it has ended with ``?wait=true``."""
    wait = switch(request, "wait", default=False)
    body = await read_model(request, ImportBody)
    return await finish(context, context.node.import_model(body.path, body.name, body.digests), wait)


async def verify(context: ApiContext, request: web.Request) -> web.Response:
    wait = switch(request, "wait", default=False)
    body = await read_model(request, ModelBody)
    return await finish(context, context.node.verify_model(body.ref), wait)


async def cancel(context: ApiContext, request: web.Request) -> web.Response:
    body = await read_model(request, ModelBody)
    return json_response((await context.keep(context.node.cancel_model(body.ref))).to_dict())


async def remove(context: ApiContext, request: web.Request) -> web.Response:
    body = await read_model(request, ModelBody)
    return json_response(await context.keep(context.node.remove_model(body.ref)))


async def pin(context: ApiContext, request: web.Request) -> web.Response:
    body = await read_model(request, ModelBody)
    return json_response(await context.keep(context.node.pin_model(body.ref)))


async def unpin(context: ApiContext, request: web.Request) -> web.Response:
    body = await read_model(request, ModelBody)
    return json_response(await context.keep(context.node.pin_model(body.ref, pinned=False)))


async def gc(context: ApiContext, request: web.Request) -> web.Response:
    """``?dry_run=true`` says what would be deleted, and why each of the others stays."""
    dry_run = switch(request, "dry_run", default=False)
    body = await read_model(request, ModelGcBody)
    older_than_s = None if body.older_than_ms is None else body.older_than_ms / 1000
    node = context.node
    return json_response(await context.keep((node.plan_model_gc if dry_run else node.collect_models)(older_than_s)))
