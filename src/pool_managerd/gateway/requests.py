"""The requests of this gateway: those in flight and the last ones, counted and told as they end."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import structlog

from pool_managerd.core.narration import duration
from pool_managerd.errors import NodeError, PoolError, RequestError
from pool_managerd.gateway.budgets import Budgets
from pool_managerd.gateway.captures import Capture, Captures, Headers
from pool_managerd.gateway.record import Record
from pool_managerd.telemetry.gateway_metrics import NO_POOL, GatewayMetrics, OfPool

log = structlog.get_logger("pool_managerd.gateway")
RECENT = 200


class Requests:
    """``metrics`` counts them, ``budgets`` the tokens of each key; ``captures`` None: what they say is kept nowhere; ``narrate``:
    those that are served have their line in the log, too.
    """

    def __init__(
        self, metrics: GatewayMetrics, budgets: Budgets | None = None, captures: Captures | None = None, *, narrate: bool = False
    ) -> None:  # fmt: skip
        self.metrics, self._budgets, self.captures, self._narrate = metrics, budgets, captures, narrate
        self._live: dict[str, tuple[Record, asyncio.Task[Any] | None]] = {}
        self._recent: deque[Record] = deque()
        self._cancelled: dict[str, PoolError] = {}

    @contextmanager
    def under_way(self, record: Record) -> Iterator[None]:
        """From its arrival to its end. Who goes away meanwhile has cancelled it."""
        if record.request_id in self._live:  # a client may give two of its requests one name
            record.request_id += f"-{time.monotonic_ns():x}"
        self._live[record.request_id] = (record, asyncio.current_task())
        try:
            yield
        except asyncio.CancelledError:
            record.state = "cancelled"
            raise
        finally:
            del self._live[record.request_id]
            self._cancelled.pop(record.request_id, None)
            self._over(record)

    def rows(self) -> list[dict[str, Any]]:
        """Those that ended last, oldest first, and then those in flight."""
        return [record.to_dict() for record in (*self._recent, *(record for record, _ in self._live.values()))]

    def one_if_here(self, request_id: str, key: str | None) -> dict[str, Any] | None:
        """The newest of that ``key``, with what is captured of it."""
        newest_first = itertools.chain((record for record, _ in self._live.values()), reversed(self._recent))
        found = (record for record in newest_first if record.request_id == request_id and record.key == key)
        return next(({**record.to_dict(), **self._captured(record.capture)} for record in found), None)

    def _captured(self, capture: Capture | None) -> dict[str, Any]:
        if capture is not None and not capture.forgotten:
            answer = None if capture.answer is None else capture.answer.to_dict()
            return {"captured": {"request": capture.request.to_dict(), "answer": answer}, "not_captured": None}
        if self.captures is None:
            return {"captured": None, "not_captured": "captures are off: set gateway.capture_bytes"}
        why = "it had no body, or there was no room" if capture is None else "newer ones needed the room"
        return {"captured": None, "not_captured": why}

    def capture(self, record: Record, headers: Headers, body: bytes) -> None:
        """Its body has come."""
        if self.captures is not None and body:
            record.capture = self.captures.begin(headers, body)

    def typical_s(self, model: str | None) -> float | None:
        """How long requests for ``model`` had their slot of late; None: there were none."""
        took = [one.ended - one.leased for one in self._recent if one.model == model and one.leased and one.ended]
        return median(took) if took else None

    def cancel_if_here(self, request_id: str, key: str | None) -> bool:
        """It ends now, and its engine stops working on it. False when none of that ``key`` is in flight here."""
        record, task = self._live.get(request_id, (None, None))
        if record is None or task is None or record.key != key:
            return False
        self._cancelled[request_id] = RequestError("the request was cancelled", code="OPERATION_CANCELLED", status=409)
        task.cancel()
        return True

    def end(self) -> None:
        """All that are in flight end now: their clients are told that the gateway does."""
        for request_id, (_, task) in self._live.items():
            self._cancelled[request_id] = NodeError("the gateway is shutting down")
            if task is not None:
                task.cancel()

    def why_cancelled(self, record: Record) -> PoolError | None:
        """Why it was, where that is not because its client has gone."""
        return self._cancelled.get(record.request_id)

    def failed(self, record: Record, problem: PoolError) -> None:
        """It is told why it was not served."""
        record.state, record.error = "failed", problem.message
        if record.leased is None:
            self.metrics.rejected(problem.code)

    def leased(self, record: Record, pool_id: str, engine: str) -> None:
        """It has its slot."""
        record.pool_id, record.engine, record.state = pool_id, engine, "running"
        if record.leased is None:
            record.leased = time.monotonic()
            counted = self.metrics.of_pool(engine, pool_id)
            counted.started.inc()
            counted.admission.observe((record.leased - record.began) * 1000)

    # --- inside ---

    def _over(self, record: Record) -> None:
        record.over()
        if record.state in ("queued", "running"):
            record.state = "ended"
        if record.capture is not None:
            record.capture.over()
        self._recent.append(record)
        if len(self._recent) > RECENT and (oldest := self._recent.popleft().capture) is not None:
            oldest.forget()
        if self._budgets is not None and record.key is not None:
            self._budgets.count(record.key, record.spent())
        self.metrics.answered(record.pool_id or NO_POOL, record.path, record.status or 499)
        if record.pool_id is not None:
            counted = self.metrics.of_pool(record.engine, record.pool_id)
            if record.state == "cancelled":
                counted.cancelled.inc()
            elif record.first is not None and record.state == "ended":
                _measure(record, counted)
        if record.state != "ended" or self._narrate:
            _tell(record)


def _measure(record: Record, counted: OfPool) -> None:
    first, ended, found = record.first or record.began, record.ended or record.began, record.tokens()
    counted.first.observe((first - record.began) * 1000)
    counted.decode.observe((ended - first) * 1000)
    if found.prompt:
        counted.tokens_in.inc(found.prompt)
    if found.cached:
        counted.tokens_cached.inc(found.cached)
    if found.answer:
        counted.tokens_out.inc(found.answer)


def _tell(record: Record) -> None:
    level = {"failed": log.warning, "cancelled": log.info}.get(record.state, log.debug)
    took = duration((record.ended or record.began) - record.began)
    what = {"failed": f"was not served: {record.error}", "cancelled": f"was cancelled after {took}"}
    human = f"A request for {record.model or 'no model'} {what.get(record.state, f'was answered in {took}')}"
    level(human, action="request", **{key: value for key, value in record.to_dict().items() if value is not None})
