"""Reads about the node as a whole."""

from __future__ import annotations

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import CORRELATION_KEY, envelope, json_response
from pool_managerd.api.pool_reads import shown
from pool_managerd.errors import NodeError
from pool_managerd.telemetry.metrics import CONTENT_TYPE


async def health(context: ApiContext, _request: web.Request) -> web.Response:
    """200 while the daemon serves at all; ``degraded`` while its state cannot be written and changes are refused."""
    status = "ok" if context.node.events.state_trouble is None else "degraded"
    return json_response({"status": status, "version": context.node.version})


async def ready(context: ApiContext, request: web.Request) -> web.Response:
    """200 when every pool that is to be preloaded is ready; else 503 with those that are not."""
    is_ready, missing = context.node.readiness()
    # No token is asked for here: ids and states alone, nothing that an engine or the configuration said.
    answer = {"ready": is_ready, "pools": [{key: pool.get(key) for key in ("pool_id", "state")} for pool in missing]}
    if is_ready:
        return json_response(answer)
    names = ", ".join(str(pool.get("pool_id")) for pool in missing[:8])
    error = NodeError(f"cannot serve yet: not ready: {names}", code="POOL_UNREADY")
    return json_response(envelope(error, request[CORRELATION_KEY]) | answer, 503)


async def metrics(context: ApiContext, _request: web.Request) -> web.Response:
    return web.Response(body=context.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def snapshots(context: ApiContext, request: web.Request) -> web.Response:
    found = context.node.snapshots()
    return json_response(found | {"pools": [shown(request, pool) for pool in found["pools"]]})


async def capabilities(context: ApiContext, _request: web.Request) -> web.Response:
    return json_response(context.node.capabilities())
