"""Changes of pools, accepted durably and answered with an operation or waited for; of leases, and of devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from aiohttp import web

from pool_managerd.api.bodies import ApplyBody, BenchBody, DrainBody, LeaseBody, NoBody, PurgeBody, ReloadBody, RenewBody
from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import OWNER_KEY, Handover, json_response
from pool_managerd.api.requests import device_id, new_pool_id, pool_id, read_model, read_object, switch, token_id
from pool_managerd.api.routing import Handler
from pool_managerd.core.bench import BenchRequest
from pool_managerd.core.purge import PurgeRequest
from pool_managerd.core.reload import ReloadRequest
from pool_managerd.errors import RequestError
from pool_managerd.node import Operation, PoolManager

# --- pools ---


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
    return await finish(context, context.node.drain(wanted, body.deadline_ms), wait)


async def reload(context: ApiContext, request: web.Request) -> web.Response:
    """Accepted with 202, or answered when it has ended with ``?wait=true``; ``?dry_run=true`` answers with the plan alone."""
    wanted = pool_id(request)
    wait, dry_run = switch(request, "wait", default=False), switch(request, "dry_run", default=False)
    body = await read_model(request, ReloadBody)
    engine = None if body.engine is None else context.node.parse_prepared(body.engine, wanted)
    asked = ReloadRequest(
        wanted, body.new_model_ref, body.changes, engine, body.drain_deadline_ms, body.strategy, body.idempotency_key, body.reset
    )
    if dry_run:
        return json_response(await context.keep(context.node.plan_reload(asked)))
    return await finish(context, context.node.reload(asked), wait)


async def bench(context: ApiContext, request: web.Request) -> web.Response:
    """Accepted with 202; with ``?wait=true`` it is for that caller alone, and ends when they go."""
    wanted = pool_id(request)
    wait = switch(request, "wait", default=False)
    body = await read_model(request, BenchBody)
    operation = await context.keep(context.node.bench(BenchRequest(wanted, body.tokens, body.prompt_tokens, body.runs)))
    if not wait:
        return json_response(operation.to_dict(), 202)
    try:
        await operation.wait()
    except asyncio.CancelledError:
        with suppress(RequestError):  # it was over already
            context.node.cancel_bench(wanted)
        raise
    return json_response(operation.to_dict())


async def cancel_bench(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    await read_model(request, NoBody)
    return json_response(context.node.cancel_bench(wanted).to_dict(), 202)


async def purge(context: ApiContext, request: web.Request) -> web.Response:
    """Accepted with 202, or answered when it has ended with ``?wait=true``; ``?dry_run=true`` says what would be freed."""
    wanted = pool_id(request)
    wait, dry_run = switch(request, "wait", default=False), switch(request, "dry_run", default=False)
    body = await read_model(request, PurgeBody)
    asked = PurgeRequest(
        wanted, body.purge_engine, tuple(body.purge_models), body.drain_first, body.delete_cache_dirs, body.force
    )
    if dry_run:
        return json_response(await context.keep(context.node.plan_purge(asked)))
    return await finish(context, context.node.purge(asked), wait)


def change(call: Callable[[PoolManager, str], Coroutine[Any, Any, Operation]]) -> Handler:
    """The handler of a change that takes nothing but the pool."""

    async def handler(context: ApiContext, request: web.Request) -> web.Response:
        wanted = pool_id(request)
        wait = switch(request, "wait", default=False)
        await read_model(request, NoBody)
        return await finish(context, call(context.node, wanted), wait)

    return handler


cancel_preload = change(lambda node, wanted: node.cancel_preload(wanted))
start = change(lambda node, wanted: node.start(wanted))
stop = change(lambda node, wanted: node.stop(wanted))
evict = change(lambda node, wanted: node.evict(wanted))
restart = change(lambda node, wanted: node.restart(wanted))
hold = change(lambda node, wanted: node.hold(wanted))
release = change(lambda node, wanted: node.release(wanted))
undrain = change(lambda node, wanted: node.undrain(wanted))
reset_breaker = change(lambda node, wanted: node.reset_breaker(wanted))


async def register(context: ApiContext, request: web.Request) -> web.Response:
    wanted = new_pool_id(request)
    await read_model(request, NoBody)
    await context.keep(context.node.register(wanted))
    return json_response({"pool_id": wanted, "registered": True})


async def deregister(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    await read_model(request, NoBody)
    if not await context.keep(context.node.deregister(wanted)):
        raise RequestError(f"pool {wanted} not found", code="POOL_NOT_FOUND", status=404, pool_id=wanted)
    return json_response({"pool_id": wanted, "registered": False})


async def finish(context: ApiContext, change: Coroutine[Any, Any, Operation], wait: bool) -> web.Response:
    """The operation that ``change`` begins: accepted with 202, or with ``wait`` how it ended."""
    operation = await context.keep(change)
    if not wait:
        return json_response(operation.to_dict(), 202)
    await context.keep(operation.wait())
    return json_response(operation.to_dict())


async def apply(context: ApiContext, request: web.Request) -> web.Response:
    """As ``reload``: 202, the end with ``?wait=true``, the plan with ``?dry_run=true``."""
    wait, dry_run = switch(request, "wait", default=False), switch(request, "dry_run", default=False)
    body = await read_model(request, ApplyBody)
    own = context.configuration
    if own is None:
        why = "cannot apply a configuration: this daemon was started without a file"
        raise RequestError(why, code="NO_CONFIGURATION", status=409)
    brought = body.text is not None or body.number is not None
    if body.text is not None and body.number is not None:
        raise RequestError("cannot apply both a text and a configuration of the history: give one")
    if brought and not request.get(OWNER_KEY, False):
        raise RequestError(
            "cannot take a configuration from you: it names programs to run, and is written into the daemon's file, which is for"
            " the daemon's own user and root, on its machine", code="POLICY_DENIED", status=403,
            hint="write the daemon's file, and apply that (pool-managerd apply, without a file)",
        )  # fmt: skip
    if dry_run:
        return json_response(await context.keep(own.plan(text=body.text, number=body.number, prune=body.prune)))
    origin = "apply" if body.number is None else "rollback"
    asked = own.apply(text=body.text, number=body.number, prune=body.prune, expect=body.expect, origin=origin)
    return await finish(context, asked, wait)


# --- leases: the hot path, so nothing here waits or builds more than it must ---


async def allocate_lease(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    body = await read_model(request, LeaseBody) if request.body_exists else LeaseBody()
    given = await context.node.take_lease(wanted, body.holder, body.ttl_ms, key=body.idempotency_key)
    if body.idempotency_key is not None:  # whoever names its request asks again
        return json_response(given, 201)
    return Handover(given, lambda: context.node.release_lease(wanted, given["lease_id"]))


async def renew_lease(context: ApiContext, request: web.Request) -> web.Response:
    wanted, lease = pool_id(request), token_id(request, "lease")
    body = await read_model(request, RenewBody)
    return json_response(await context.node.prolong_lease(wanted, lease, body.ttl_ms))


async def release_lease(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(await context.node.give_lease_back(pool_id(request), token_id(request, "lease")))


# --- devices ---


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
release_devices = node_change(lambda node: node.release_devices())
resume_devices = node_change(lambda node: node.resume_devices())


async def preflight(context: ApiContext, request: web.Request) -> web.Response:
    await read_model(request, NoBody)
    found = await context.keep(context.node.preflight())
    return json_response(context.node.events.redactor.mapping(found))
