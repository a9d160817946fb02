"""What a stream waits for, told to its reader as the model's reasoning, which chat clients show: place, state, estimate."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from pool_managerd.core.narration import duration
from pool_managerd.errors import PoolError
from pool_managerd.gateway.exchange import Exchange
from pool_managerd.gateway.leasing import Leasing
from pool_managerd.gateway.unanswered import asked_for

_PATH = "/v1/chat/completions"
"""The one API whose streams have a place for it."""


class LoadingText:
    """``by_default``: of models whose pools do not say (``pools[].requests.loading_text``). What waits for less than ``after_s``
    tells nothing; then there is a line where it is another one than the last, one in ``every_s`` at most.
    """

    after_s = 0.5
    every_s = 1.0

    def __init__(self, leasing: Leasing, *, by_default: bool = False) -> None:
        self._leasing, self._by_default = leasing, by_default
        self._rows: dict[str, Mapping[str, Any]] = {}
        """Of the node's queue, by holder."""
        self._asked_at = 0.0
        self._asking = asyncio.Lock()

    @asynccontextmanager
    async def shown(self, exchange: Exchange, model: str) -> AsyncIterator[None]:
        """While a slot of ``model`` is waited for. All of it has been sent at the end."""
        if not (exchange.stream and exchange.record.path == _PATH and self._wanted(model)):
            yield
            return
        began, told = time.monotonic(), list[str]()
        telling = asyncio.create_task(self._tell(exchange, model, told))
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.wait({telling})
        if told:
            await exchange.aside(_chunk(exchange, model, f"{model} is ready after {duration(time.monotonic() - began)}\n\n"))

    def _wanted(self, model: str) -> bool:
        """Of any of its pools."""
        directory = self._leasing.directory
        places = [directory.place(pool_id) for pool_id in directory.pools(model)] if directory.known else [None]
        own = [((place and place.rules) or {}).get("loading_text") for place in places]
        return any(self._by_default if said is None else said for said in own)

    async def _tell(self, exchange: Exchange, model: str, told: list[str]) -> None:
        await asyncio.sleep(self.after_s)
        while True:
            line = _line(model, await self._row(exchange.request_id), frank=exchange.record.key is None)
            if line != (told[-1] if told else None):
                told.append(line)
                await exchange.aside(_chunk(exchange, model, line + "\n"))
            await asyncio.sleep(self.every_s)

    async def _row(self, request_id: str) -> Mapping[str, Any] | None:
        """Its own in the node's queue, which is asked for once, however many look; None: it is not there."""
        async with self._asking:
            if time.monotonic() - self._asked_at >= self.every_s / 2:
                try:
                    rows = await self._leasing.queue()
                except PoolError:  # the node is away
                    rows = []
                self._rows, self._asked_at = {asked_for(row["holder"] or ""): row for row in rows}, time.monotonic()
        return self._rows.get(asked_for(self._leasing.holder_of(request_id)))


def _line(model: str, row: Mapping[str, Any] | None, *, frank: bool) -> str:
    """``frank``: what it waits for, which names other models, is told, too."""
    if row is None:
        return f"{model}: waiting in line"
    if row["state"] == "ready":
        return f"{model} is busy: number {row['place']} in line for a slot"
    place = f"; number {row['place']} in line" if row["place"] > 1 else ""
    if row["step"]:
        return f"{model} is loading ({row['step']}){_left(row['estimate_ms'])}{place}"
    why = f", waiting for {row['waits_for']}" if frank else ""
    return f"{model} is not loaded yet{why}{place}"


def _left(estimate_ms: int | None) -> str:
    """Coarse where it is long, so that there is not a line every second."""
    if not estimate_ms:
        return ""
    seconds = -(-estimate_ms // 1000)
    step = 1 if seconds <= 5 else 5 if seconds <= 60 else 15
    return f", about {duration(-(-seconds // step) * step)} left"


def _chunk(exchange: Exchange, model: str, text: str) -> bytes:
    chunk = {
        "id": f"chatcmpl-{exchange.request_id}", "object": "chat.completion.chunk", "created": exchange.record.began_ms // 1000,
        "model": model, "choices": [{"index": 0, "delta": {"reasoning_content": text}, "finish_reason": None}],
    }  # fmt: skip
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
