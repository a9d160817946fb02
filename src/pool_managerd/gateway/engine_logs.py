"""``GET /logs/stream[/MODEL]``: what engines write, as tools for llama-swap read it: text, what there is first."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from aiohttp import web

from pool_managerd.errors import PoolError, RequestError
from pool_managerd.gateway.access import Access, Caller, require_own_user
from pool_managerd.gateway.dialects import Dialect
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.link import Link
from pool_managerd.gateway.watchers import Watchers

_HISTORY_LINES = 1000
_AHEAD = 8
_MOST = 16
"""Logs that one stream has: each is a stream of the daemon's."""
_TEXT = {
    "Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",
}  # fmt: skip
_Pieces = asyncio.Queue[bytes | PoolError | None]
"""None: there is no more."""


class EngineLogs:
    """Without keys what engines write is for the gateway's own user and root, as it is at the control API."""

    def __init__(self, link: Link, leasing: Leasing, access: Access, watchers: Watchers) -> None:
        self._link, self._leasing, self._access, self._watchers = link, leasing, access, watchers

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Until the client goes, or the node does. ``?no-history``: only what is written from now on."""
        try:
            caller = self._access.caller(request.headers)
            if caller.key is None:
                require_own_user(request, "what engines write")
            await self._leasing.learnt()
            pools = self._pools(caller, request.match_info.get("model"))
            with self._watchers.one():
                return await self._streamed(request, pools, 0 if "no-history" in request.query else _HISTORY_LINES)
        except PoolError as problem:
            return await Exchange(request, Dialect.OPENAI, 0.0).fail(problem)

    def _pools(self, caller: Caller, model: str | None) -> list[str]:
        """Those of ``model``, or all that the caller may ask for. Raises RequestError."""
        directory = self._leasing.directory
        if model is not None:
            caller.require(model)
            found = list(directory.pools(model))
        else:
            found = [place.pool_id for place in directory.all() if caller.may_see(place)]
        if len(found) > _MOST:
            raise RequestError(f"cannot show the logs of {len(found)} pools in one stream", hint="ask for /logs/stream/MODEL")
        return found

    async def _streamed(self, request: web.Request, pools: Iterable[str], lines: int) -> web.StreamResponse:
        pieces = _Pieces(_AHEAD)
        reading = [asyncio.create_task(self._read(pool_id, lines, pieces)) for pool_id in pools]
        tasks = [*reading, asyncio.create_task(self._close(pieces))]
        response = web.StreamResponse(headers=_TEXT)
        try:
            piece = await pieces.get() if reading else b""
            if isinstance(piece, PoolError):
                raise piece
            await response.prepare(request)
            while isinstance(piece, bytes):
                if piece:
                    await response.write(piece)
                piece = await pieces.get()
            await response.write_eof()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return response

    async def _read(self, pool_id: str, lines: int, pieces: _Pieces) -> None:
        try:
            async for piece in self._link.log(pool_id, lines):
                await pieces.put(piece)
            await pieces.put(None)
        except PoolError as problem:
            await pieces.put(problem)

    async def _close(self, pieces: _Pieces) -> None:
        await self._watchers.closing.wait()
        await pieces.put(None)
