"""The spans of a gateway's requests: the request, its wait for a slot, and its engine's part. Imported only where it traces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from opentelemetry.trace import Span, SpanKind, Tracer, use_span

from pool_managerd.core.demand.kept_leases import HeldLease
from pool_managerd.errors import PoolError
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.engine_connection import Headers
from pool_managerd.gateway.record import Record
from pool_managerd.telemetry.spans import CANCELLED, POOL_ID, carried, failed, given, refused, text, tracer

_CARRYING = frozenset({b"traceparent", b"tracestate"})
_OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat", "/v1/completions": "text_completion",
    "/completion": "text_completion", "/infill": "text_completion", "/v1/embeddings": "embeddings", "/embedding": "embeddings",
}  # fmt: skip
"""OpenTelemetry's names of what a path does; others have none."""
Attributes = dict[str, str | int | bool]
Answering = Coroutine[Any, Any, web.StreamResponse]


class RequestSpans:
    """Of one gateway."""

    def __init__(self) -> None:
        self._tracer = tracer()

    @contextmanager
    def request(self, request: web.Request, record: Record) -> Iterator[TracedRequest]:
        """From its arrival to its end, as a part of its client's trace where that has one."""
        asked: Attributes = {
            "http.request.method": request.method, "http.route": record.path, "url.path": record.path,
            "url.scheme": request.scheme,
        }  # fmt: skip
        sockname = None if request.transport is None else request.transport.get_extra_info("sockname")
        if sockname is not None:
            asked |= {"server.address": sockname[0], "server.port": sockname[1]}
        span = self._tracer.start_span(f"{request.method} {record.path}", given(request.headers), SpanKind.SERVER, asked)
        traced = TracedRequest(self._tracer, span, record)
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield traced
        except Exception as problem:
            failed(span, type(problem).__name__)
            raise
        finally:
            traced.end()


class TracedRequest:
    """One request. What is told of it at its end is what is recorded of every request, and never what it says."""

    def __init__(self, tracer: Tracer, span: Span, record: Record) -> None:
        self._tracer, self._span, self._record = tracer, span, record
        self._engines_asked = 0
        self._model_id: str | None = None

    async def slot(self, taking: Coroutine[Any, Any, HeldLease]) -> HeldLease:
        """The node is asked for a slot, which may be waited for: its start, too."""
        with self._part("slot", {}) as span:
            lease = await taking
            span.set_attributes({POOL_ID: lease.pool_id, "pool_managerd.started": lease.started})
            return lease

    async def engine(self, url: str, place: Place | None, answering: Answering) -> web.StreamResponse:
        """An engine is asked, and its answer passed on."""
        record, engine = self._record, urlsplit(url)
        asked: Attributes = {**self._gen_ai(), POOL_ID: record.pool_id or "", "gen_ai.provider.name": record.engine}
        if engine.hostname is not None:
            asked["server.address"] = engine.hostname
        if engine.port is not None:
            asked["server.port"] = engine.port
        if self._engines_asked:
            asked["http.request.resend_count"] = self._engines_asked
        self._engines_asked += 1
        self._model_id = None if place is None else place.model_id
        name = f"{asked.get('gen_ai.operation.name', 'engine')} {record.model}"
        with self._part(text(name), asked) as span:
            try:
                answer = await answering
                span.set_attribute("http.response.status_code", record.status)
                if record.status >= 400:
                    failed(span, str(record.status))
                return answer
            finally:
                if record.first is not None:
                    span.add_event("first byte", timestamp=_unix_ns(record.first))

    def for_engine(self, headers: Headers) -> Headers:
        """``headers`` of a request, by which its engine goes on with this part of the trace."""
        own = [(name.encode(), value.encode()) for name, value in carried().items()]
        return [header for header in headers if header[0].lower() not in _CARRYING] + own

    def refused(self, problem: PoolError) -> None:
        """It is told why it was not served, or not to its end."""
        refused(self._span, problem)

    def end(self) -> None:
        """It is over."""
        if self._span.is_recording():
            self._tell()
        self._span.end()

    # --- inside ---

    def _tell(self) -> None:
        record, found = self._record, self._record.tokens()
        model_id = None if record.first is None or self._model_id is None else text(self._model_id)
        told: dict[str, str | int | None] = {
            **self._gen_ai(), "http.response.status_code": record.status or None, POOL_ID: record.pool_id,
            "pool_managerd.request_id": text(record.request_id), "gen_ai.response.model": model_id,
            "gen_ai.usage.input_tokens": found.prompt, "gen_ai.usage.output_tokens": found.answer,
            "gen_ai.usage.cache_read.input_tokens": found.cached,
        }  # fmt: skip
        self._span.set_attributes({name: value for name, value in told.items() if value is not None})
        if record.state == "cancelled":
            failed(self._span, CANCELLED, error=False)
        elif record.state == "ended" and record.status >= 500:
            failed(self._span, str(record.status))

    @contextmanager
    def _part(self, name: str, asked: Attributes) -> Iterator[Span]:
        """A call of somebody else, who goes on with the trace from here."""
        with self._tracer.start_as_current_span(
            name, kind=SpanKind.CLIENT, attributes=asked, record_exception=False, set_status_on_exception=False
        ) as span:  # fmt: skip
            try:
                yield span
            except PoolError as problem:
                failed(span, problem.code)
                raise
            except (asyncio.CancelledError, ConnectionError):  # of the client, which has gone
                failed(span, CANCELLED, error=False)
                raise

    def _gen_ai(self) -> Attributes:
        operation, model = _OPERATIONS.get(self._record.path), self._record.model
        told = {"gen_ai.operation.name": operation, "gen_ai.request.model": None if model is None else text(model)}
        return {name: value for name, value in told.items() if value is not None}


def _unix_ns(monotonic_s: float) -> int:
    return time.time_ns() - round((time.monotonic() - monotonic_s) * 1e9)
