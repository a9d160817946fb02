"""What can be seen of a gateway: how it is, its series, who waits, its requests; of all its workers, whichever is asked."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from pool_managerd.errors import PoolError, RequestError
from pool_managerd.gateway.access import Access, require_own_user
from pool_managerd.gateway.dialects import Dialect
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.requests import RECENT, Requests
from pool_managerd.gateway.siblings import Answers, Siblings
from pool_managerd.telemetry.families import CONTENT_TYPE, together

_HEARTBEAT_S = 12.0


class Views:
    """Of one worker, which asks its ``siblings`` for what they know."""

    def __init__(self, leasing: Leasing, access: Access, requests: Requests, siblings: Siblings) -> None:
        self._leasing, self._access, self._requests, self._siblings = leasing, access, requests, siblings

    def answers(self) -> Answers:
        """To what siblings ask."""
        return {
            "metrics": lambda: self._series().decode(), "requests": self._requests.rows, "cancel": self._requests.cancel_if_here,
            "let_go": self._leasing.let_go, "request": self._requests.one_if_here,
        }  # fmt: skip

    async def health(self, _request: web.Request) -> web.StreamResponse:
        """The gateway is up; whether it follows the daemon is told beside that."""
        return web.json_response({"status": "ok", "daemon": "connected" if self._leasing.connected else "away"})

    async def metrics(self, _request: web.Request) -> web.StreamResponse:
        """Of every worker, each with its number."""
        others = [str(text).encode() for text in await self._siblings.ask("metrics")]
        return web.Response(body=together([self._series(), *others]), headers={"Content-Type": CONTENT_TYPE})

    async def queue(self, request: web.Request) -> web.StreamResponse:
        """Those who wait for a slot, in their order, whoever asked for it."""
        return await self._told(request, self._queue(request))

    async def requests(self, request: web.Request) -> web.StreamResponse:
        """Those of the caller's key, in flight and recent."""
        return await self._told(request, self._rows(request))

    async def request(self, request: web.Request) -> web.StreamResponse:
        """One of them, with its bodies where they are captured: without keys those are for the gateway's own user and root."""
        return await self._told(request, self._one(request))

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        """One of the caller's own requests ends now."""
        return await self._told(request, self._cancelled(request))

    # --- inside ---

    def _series(self) -> bytes:
        metrics = self._requests.metrics
        metrics.keep({place.pool_id for place in self._leasing.directory.all()})
        return metrics.render()

    async def _queue(self, request: web.Request) -> web.StreamResponse:
        self._access.caller(request.headers)
        return web.json_response(await self._leasing.queue())

    async def _rows(self, request: web.Request) -> web.StreamResponse:
        caller = self._access.caller(request.headers)
        rows = [row for row in self._requests.rows() if row["key"] == caller.name]
        if self._siblings.any:
            for theirs in await self._siblings.ask("requests"):
                rows += [row for row in theirs if row["key"] == caller.name]
            rows = _in_order(rows)
        return web.json_response(rows)

    async def _one(self, request: web.Request) -> web.StreamResponse:
        caller, wanted = self._access.caller(request.headers), request.match_info["request_id"]
        theirs = await self._siblings.ask("request", wanted, caller.name)
        found = [row for row in (self._requests.one_if_here(wanted, caller.name), *theirs) if row is not None]
        if not found:
            why = "" if self._requests.captures else ", and captures are off: set gateway.capture_bytes"
            raise RequestError(f"request {wanted[:64]!r} is none of the last {RECENT}{why}", code="NOT_FOUND", status=404)
        row = max(found, key=lambda row: row["began_at_ms"])
        if caller.key is None and row["captured"] is not None:
            require_own_user(request, "what requests say")
        return web.json_response(row, headers={"Cache-Control": "no-store"})

    async def _cancelled(self, request: web.Request) -> web.StreamResponse:
        caller, wanted = self._access.caller(request.headers), request.match_info["request_id"]
        if not self._requests.cancel_if_here(wanted, caller.name) and not any(
            await self._siblings.ask("cancel", wanted, caller.name)
        ):
            raise RequestError(f"request {wanted[:64]!r} is not in flight", code="TICKET_NOT_FOUND", status=404)
        return web.json_response({"request_id": wanted, "cancelled": True})

    async def _told(self, request: web.Request, work: Awaitable[web.StreamResponse]) -> web.StreamResponse:
        """``work``, with every error in our shape."""
        try:
            return await work
        except PoolError as problem:
            if problem.status >= 500 and self._access.keys is not None:
                problem.hint = None  # it is for whoever runs the node, and may say what is on it
            return await Exchange(request, Dialect.OPENAI, _HEARTBEAT_S).fail(problem)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As one worker shows them: the last ones that are over, by when they ended, and then those in flight."""
    over = [row for row in rows if row["state"] not in ("queued", "running")]
    over.sort(key=lambda row: row["began_at_ms"] + row["duration_ms"])
    live = sorted((row for row in rows if row["state"] in ("queued", "running")), key=lambda row: row["began_at_ms"])
    return over[-RECENT:] + live
