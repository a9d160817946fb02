"""What tools for llama-swap ask for, so that they work unchanged: what runs, unload, and the stream of the models' states."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from aiohttp import web

from pool_managerd.errors import PoolError
from pool_managerd.gateway.access import Access, Caller
from pool_managerd.gateway.dialects import STILL_HERE, Dialect
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.watchers import Watchers

_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_LOOK_S = 0.5
_HEARTBEAT_S = 12.0


class Faces:
    """Of one gateway. Unloading asks the node to evict: what is in use stays."""

    def __init__(self, leasing: Leasing, access: Access, watchers: Watchers) -> None:
        self._leasing, self._access, self._watchers = leasing, access, watchers

    async def running(self, request: web.Request) -> web.StreamResponse:
        """``GET /running``: the models that are loaded, or on their way."""
        try:
            places = self._visible(self._access.caller(request.headers))
        except PoolError as problem:
            return await _exchange(request).fail(problem)
        rows = [
            {
                "model": place.name, "state": _state(place), **_shown(place), "cmd": "", "proxy": "", "ttl": 0,
            }
            for place in places
            if place.open or place.loading
        ]  # fmt: skip
        return web.json_response({"running": rows})

    async def unload(self, request: web.Request) -> web.StreamResponse:
        """``/unload`` and ``/api/models/unload[/ID]``: idle models end, and come back when they are asked for."""
        try:
            caller, wanted = self._access.caller(request.headers), request.match_info.get("model")
            if wanted is not None:
                caller.require(wanted)
                for pool_id in self._leasing.directory.pools(wanted):
                    await self._leasing.unload(pool_id)
            else:
                await self._all(caller)
        except PoolError as problem:
            return await _exchange(request).fail(problem)
        return web.Response(text="OK") if request.method == "GET" else web.json_response({"msg": "ok"})

    async def _all(self, caller: Caller) -> None:
        """Those that are in use stay, and nobody is told."""
        ends = [self._leasing.unload(place.pool_id) for place in self._visible(caller) if place.open]
        for found in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(found, BaseException) and not isinstance(found, PoolError):
                raise found

    async def events(self, request: web.Request) -> web.StreamResponse:
        """``GET /api/events``: the models' states, at first and whenever one has changed."""
        try:
            caller = self._access.caller(request.headers)
            with self._watchers.one():
                return await self._watched(request, caller)
        except PoolError as problem:
            return await _exchange(request).fail(problem)

    async def _watched(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        response, told, silent_s = web.StreamResponse(headers=_SSE), "", 0.0
        await response.prepare(request)
        closing = self._watchers.closing
        while not closing.is_set():
            found = json.dumps([_model(place) for place in self._visible(caller)])
            if found != told:
                told, silent_s = found, 0.0
                event = json.dumps({"type": "modelStatus", "data": found})
                await response.write(f"event: message\ndata: {event}\n\n".encode())
            elif silent_s >= _HEARTBEAT_S:
                silent_s = 0.0
                await response.write(STILL_HERE)
            with suppress(TimeoutError):
                await asyncio.wait_for(closing.wait(), _LOOK_S)
            silent_s += _LOOK_S
        await response.write_eof()
        return response

    def _visible(self, caller: Caller) -> Iterable[Place]:
        return [place for place in self._leasing.directory.all() if caller.may_see(place)]


def _exchange(request: web.Request) -> Exchange:
    return Exchange(request, Dialect.OPENAI, _HEARTBEAT_S)


def _state(place: Place) -> str:
    """In llama-swap's words."""
    return "ready" if place.open else "starting" if place.loading else "stopped"


def _model(place: Place) -> dict[str, Any]:
    unlisted = not place.card.get("listed", True)
    return {"id": place.name, **_shown(place), "state": _state(place), "unlisted": unlisted, "peerID": ""}


def _shown(place: Place) -> dict[str, str]:
    """For people."""
    return {"name": place.card.get("name") or place.name, "description": place.card.get("description") or ""}
