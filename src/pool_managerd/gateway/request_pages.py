"""``/v1/requests``: those of the caller's key, in flight and recent; what one of them says, where that is captured; its end."""

from __future__ import annotations

from aiohttp import web

from pool_managerd.errors import PoolError
from pool_managerd.gateway.access import Access, require_own_user
from pool_managerd.gateway.dialects import Dialect
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.requests import Requests

_NOT_STORED = {"Cache-Control": "no-store"}


class RequestPages:
    """Of one gateway. Without keys what was captured is for the gateway's own user and root."""

    def __init__(self, requests: Requests, access: Access) -> None:
        self._requests, self._access = requests, access

    async def all(self, request: web.Request) -> web.StreamResponse:
        """The last ones, and those in flight."""
        try:
            caller = self._access.caller(request.headers)
        except PoolError as problem:
            return await _failed(request, problem)
        return web.json_response([row for row in self._requests.rows() if row["key"] == caller.name])

    async def one(self, request: web.Request) -> web.StreamResponse:
        """With its bodies, where they are captured."""
        try:
            caller = self._access.caller(request.headers)
            found = self._requests.one(request.match_info["request_id"], caller.name)
            if caller.key is None and found["captured"] is not None:
                require_own_user(request, "what requests say")
        except PoolError as problem:
            return await _failed(request, problem)
        return web.json_response(found, headers=_NOT_STORED)

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """It ends now."""
        wanted = request.match_info["request_id"]
        try:
            self._requests.cancel(wanted, self._access.caller(request.headers).name)
        except PoolError as problem:
            return await _failed(request, problem)
        return web.json_response({"request_id": wanted, "cancelled": True})


async def _failed(request: web.Request, problem: PoolError) -> web.StreamResponse:
    return await Exchange(request, Dialect.OPENAI, 0.0).fail(problem)
