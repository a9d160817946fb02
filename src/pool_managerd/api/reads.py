"""Reads of the node, its pools and devices: none of them waits for anything but ``explain``, which looks at the machine."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from pool_managerd.api.context import ApiContext
from pool_managerd.api.envelope import CORRELATION_KEY, TRUSTED_KEY, envelope, json_response
from pool_managerd.api.requests import number, pool_id, possible_pool_id, token_id
from pool_managerd.errors import NodeError, RequestError
from pool_managerd.telemetry.families import CONTENT_TYPE

PAGE, MAX_PAGE = 100, 1_000
WITHHELD = "shown to the daemon's own user, to root, and with the token"
_TEXTS = ("last_error", "model_path", "unapplied")

# --- the node ---


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


async def devices(context: ApiContext, _request: web.Request) -> web.Response:
    return json_response(context.node.devices())


# --- pools ---


def shown(request: web.Request, status: dict[str, Any]) -> dict[str, Any]:
    """``status`` as the caller may see it: without the words of engines and paths for other users of an open daemon."""
    if request.get(TRUSTED_KEY, True):
        return status
    texts: dict[str, Any] = {key: WITHHELD for key in _TEXTS if status.get(key) is not None}
    if isinstance(preload := status.get("preload"), dict):
        texts["preload"] = preload | {"last_probe": None}
    if isinstance(crash := status.get("last_crash"), dict):
        texts["last_crash"] = crash | {"human": WITHHELD, "last_error": WITHHELD, "evidence": []}
    if isinstance(activity := status.get("activity"), dict):
        texts["activity"] = activity | {"why": None}
    return status | texts


async def pools(context: ApiContext, request: web.Request) -> web.Response:
    return json_response([shown(request, status) for status in context.node.statuses()])


async def status(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(shown(request, context.node.status(pool_id(request))))


async def pool_health(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(shown(request, context.node.health(pool_id(request))))


async def leases(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(context.node.leases(pool_id(request)))


async def command(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(context.node.command(pool_id(request)))


async def explain(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(await context.node.explain(pool_id(request)))


async def crashes(context: ApiContext, request: web.Request) -> web.Response:
    wanted = request.query.get("pool_id")
    return json_response(context.node.crashes(None if wanted is None else possible_pool_id(wanted)))


async def pool_crashes(context: ApiContext, request: web.Request) -> web.Response:
    wanted = pool_id(request)
    context.node.status(wanted)  # 404 for a pool that does not exist
    return json_response(context.node.crashes(wanted))


async def history(context: ApiContext, _request: web.Request) -> web.Response:
    return json_response([] if context.configuration is None else context.configuration.history())


async def operations(context: ApiContext, request: web.Request) -> web.Response:
    """The newest ``limit``, oldest first; with ``after``, those that began behind that operation."""
    limit = number(request, "limit", PAGE, 1, MAX_PAGE) or PAGE
    after = request.query.get("after")
    found = context.node.operations()
    if after is None:
        return json_response(found[-limit:])
    at = next((index for index, operation in enumerate(found) if operation["operation_id"] == after), None)
    if at is None:
        raise RequestError(
            "cannot list operations after this one: it is not known (any more)", code="OPERATION_NOT_FOUND", status=404
        )
    return json_response(found[at + 1 : at + 1 + limit])


async def operation(context: ApiContext, request: web.Request) -> web.Response:
    return json_response(context.node.operation(token_id(request, "operation")))


async def pool_operation(context: ApiContext, request: web.Request) -> web.Response:
    wanted, operation_id = pool_id(request), token_id(request, "operation")
    found = context.node.operation(operation_id)
    if found.get("pool_id") != wanted:
        raise RequestError(f"operation {operation_id} of pool {wanted} not found", code="OPERATION_NOT_FOUND", status=404)
    return json_response(found)
