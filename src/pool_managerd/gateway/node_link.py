"""The node as the gateway asks it: over its control API, from another process, so that neither's end is the other's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import aiohttp

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.gateway.link import UnansweredError, held
from pool_managerd.telemetry import tracing

_ANSWER_S, _ENDS_S = 10.0, 60.0
_CALLS, _WAITING = 24, 512
"""Connections for what is answered at once, and for what waits for a slot: the daemon has others to answer, too."""
_ABANDONED_S = 0.2
_MAX_EVENT_BYTES = 8 << 20
SILENCE_S = 45.0
"""Of a stream that shows signs of life every 15 s."""


class NodeLink:
    """``token`` is asked anew for each call, as it may be changed while the gateway runs."""

    def __init__(self, url: str, token: Callable[[], str | None]) -> None:
        self._url, self._token = url.rstrip("/") + "/v1", token
        self._session: aiohttp.ClientSession | None = None
        self._waiting: aiohttp.ClientSession | None = None
        self._abandoned: set[asyncio.Task[None]] = set()
        self._carried: Callable[[], dict[str, str]] | None = None

    async def __aenter__(self) -> NodeLink:
        self._session, self._waiting = _session(_CALLS), _session(_WAITING)
        if tracing.is_on():
            from pool_managerd.telemetry.spans import carried

            self._carried = carried
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._abandoned:
            task.cancel()
        await asyncio.gather(*self._abandoned, return_exceptions=True)
        for session in (self._session, self._waiting):
            if session is not None:
                await session.close()

    async def acquire(self, model: str, holder: str, ttl_ms: int, wait_ms: int | None = None) -> HeldLease:
        """A slot, waited for. Who goes away while waiting has no lease, and its place in the queue is free.

        Raises what the node refuses with; NodeError NODE_UNAVAILABLE when it cannot be reached, UnansweredError when it could.
        """
        body = {"model": model, "holder": holder, "ttl_ms": ttl_ms} | ({} if wait_ms is None else {"wait_ms": wait_ms})
        timeout_s = None if wait_ms is None else wait_ms / 1000 + _ANSWER_S
        asking = asyncio.ensure_future(self._call("POST", "acquire", body, timeout_s=timeout_s, waits=True))
        try:
            given = await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._keep(self._abandon(asking))
            raise
        started = given.get("started") is True
        return HeldLease(given["lease_id"], given["pool_id"], str(given["url"]), int(given["epoch"] or 0), started=started)

    async def give_back(self, lease: HeldLease) -> None:
        """Raises NodeError NODE_UNAVAILABLE when the node cannot be reached; that it knows the lease no more is no error."""
        with suppress(RequestError):
            await self._call("DELETE", f"pools/{lease.pool_id}/leases/{lease.lease_id}", None)

    async def renew(self, lease: HeldLease, ttl_ms: int) -> bool:
        """False: it is over. Raises NodeError NODE_UNAVAILABLE."""
        try:
            await self._call("PUT", f"pools/{lease.pool_id}/leases/{lease.lease_id}", {"ttl_ms": ttl_ms})
        except RequestError as problem:
            if problem.status in (404, 409):
                return False
            raise
        return True

    async def held_by(self, holds: Callable[[str], bool]) -> list[HeldLease]:
        """Raises PoolError."""
        pools = [pool["pool_id"] for pool in await self._call("GET", "pools", None)]
        rows = {one: await self._call("GET", f"pools/{one}/leases", None) for one in pools}
        return [lease for one in pools for lease in held(one, rows[one], holds)]

    async def evict(self, pool_id: str) -> None:
        """It ends where nothing is in flight on it, and starts again on demand. Raises PoolError."""
        await self._call("POST", f"pools/{pool_id}/evict?wait=true", {}, timeout_s=_ENDS_S)

    async def queue(self) -> list[dict[str, Any]]:
        """Those who wait, in their order. Raises PoolError."""
        rows: list[dict[str, Any]] = await self._call("GET", "queue", None)
        return rows

    def routes(self) -> AsyncIterator[dict[str, Any]]:
        """All pools, then each change, until the connection ends. Raises NodeError NODE_UNAVAILABLE."""
        return self._events(self._open, "routes")

    async def log(self, pool_id: str, lines: int) -> AsyncIterator[bytes]:
        """The last ``lines`` lines of its engine's log, then what is written, until the connection ends. Raises PoolError."""
        async for told in self._events(self._waiting or self._open, f"pools/{pool_id}/logs?follow=true&lines={lines}"):
            yield str(told["text"]).encode()

    async def _events(self, session: aiohttp.ClientSession, path: str) -> AsyncIterator[dict[str, Any]]:
        """The data of each, until the connection ends. Raises PoolError."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S)
        headers = {**self._headers(), "Accept": "text/event-stream"}
        try:
            async with session.get(f"{self._url}/{path}", headers=headers, timeout=timeout) as answer:
                if answer.status != 200:
                    raise _problem(answer.status, await _json(answer))
                pending = bytearray()
                async for chunk in answer.content.iter_any():
                    pending += chunk
                    if len(pending) > _MAX_EVENT_BYTES:
                        raise NodeError(f"cannot follow the node: an event of {path} has no end")
                    while (end := pending.find(b"\n\n")) >= 0:
                        for line in bytes(pending[:end]).splitlines():
                            if line.startswith(b"data: "):
                                yield json.loads(line[6:])
                        del pending[: end + 2]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as problem:
            raise self._unreachable(problem) from problem

    async def _abandon(self, asking: asyncio.Future[dict[str, Any]]) -> None:
        """Whoever asked has gone. A lease that is on its way already is given back; else the call is broken off, at which the
        node knows that nobody waits.
        """
        await asyncio.wait({asking}, timeout=_ABANDONED_S)
        if not asking.done():
            asking.cancel()
            await asyncio.wait({asking})
        if not asking.cancelled() and asking.exception() is None:
            given = asking.result()
            with suppress(PoolError):  # it ends by itself, as nobody renews it
                await self._call("DELETE", f"pools/{given['pool_id']}/leases/{given['lease_id']}", None)

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def _call(
        self, method: str, path: str, body: Any, timeout_s: float | None = _ANSWER_S, *, waits: bool = False
    ) -> Any:  # fmt: skip
        try:
            status, value = await self._exchange(method, path, body, timeout_s, waits=waits)
        except (aiohttp.ClientError, OSError, TimeoutError) as problem:
            raise self._unreachable(problem) from problem
        if status < 400:
            return value
        raise _problem(status, value)

    async def _exchange(
        self, method: str, path: str, body: Any, timeout_s: float | None, *, waits: bool
    ) -> tuple[int, Any]:  # fmt: skip
        """The status and the body of the answer. Raises what the way there raises."""
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=5)
        session = self._open if not waits or self._waiting is None else self._waiting
        async with session.request(method, f"{self._url}/{path}", json=body, headers=self._headers(), timeout=timeout) as answer:
            return answer.status, await _json(answer)

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise NodeError("cannot ask the node: the link was not entered")
        return self._session

    def _headers(self) -> dict[str, str]:
        token, headers = self._token(), {} if self._carried is None else self._carried()
        return headers if token is None else {**headers, "Authorization": f"Bearer {token}"}

    def _unreachable(self, problem: BaseException) -> NodeError:
        never_asked = isinstance(problem, aiohttp.ClientConnectorError | ConnectionRefusedError)
        return (NodeError if never_asked else UnansweredError)(
            f"cannot reach the daemon at {self._url.removesuffix('/v1')}: {str(problem) or type(problem).__name__}",
            hint="it may be restarting: try again", retry_after_ms=1000,
        )  # fmt: skip


def _session(connections: int) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=connections, keepalive_timeout=15)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5))


async def _json(answer: aiohttp.ClientResponse) -> Any:
    raw = await answer.read()
    try:
        return json.loads(raw)
    except ValueError:
        return None


def _problem(status: int, value: Any) -> PoolError:
    """The node's error as it was raised there."""
    body = value if isinstance(value, dict) else {}
    message = str(body.get("message") or f"cannot do it: the daemon answered {status}")
    if status in (401, 403):  # it is the gateway that is refused, and none of its clients
        return NodeError(f"the daemon refuses this gateway: {message}", hint=body.get("hint"))
    kind = RequestError if status < 500 else PoolError
    return kind(
        message, code=str(body.get("code") or "INTERNAL"), status=status, hint=body.get("hint"), pool_id=body.get("pool_id"),
        retriable=body.get("retriable") is True, retry_after_ms=body.get("retry_after_ms"),
    )  # fmt: skip
