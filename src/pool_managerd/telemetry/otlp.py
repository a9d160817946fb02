"""Spans on their way to a collector (OTLP over HTTP), by OpenTelemetry's SDK and its standard environment.

Imported only where that is configured. The SDK's own thread sends what a bounded queue holds; what does not fit is dropped.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from pool_managerd._version import __version__

_CLOSE_S = 2.0
_TOLD_OF_EACH_TRY = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")
log = structlog.get_logger("pool_managerd.tracing")


class Export:
    """Of this process, from now on, until it is closed. Raises what the SDK does for an environment that it cannot use."""

    def __init__(self, service: str, labels: Mapping[str, str]) -> None:
        for name in _TOLD_OF_EACH_TRY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._provider = TracerProvider(resource=_resource(service, labels), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(ToldOnce(OTLPSpanExporter())))
        trace.set_tracer_provider(self._provider)

    def ids(self) -> Mapping[str, str]:
        """Of the span that is current: for log lines."""
        found = trace.get_current_span().get_span_context()
        if not found.is_valid:
            return {}
        return {"trace_id": trace.format_trace_id(found.trace_id), "span_id": trace.format_span_id(found.span_id)}

    def close(self) -> None:
        """Send what is left, in a moment: nobody waits for a collector that is away."""
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def _resource(service: str, labels: Mapping[str, str]) -> Resource:
    """What the environment says of this process goes before what is known here."""
    here: dict[str, str | int] = {"service.version": __version__, "host.name": socket.gethostname(), "process.pid": os.getpid()}
    known = Resource({**here, **labels}).merge(Resource.create())
    if str(known.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        known = known.merge(Resource({SERVICE_NAME: service}))
    return known


class ToldOnce(SpanExporter):
    """``inner``, whose collector may be away: that is told once, and that it is back."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._failed:
            log.warning(
                "The collector at OTEL_EXPORTER_OTLP_ENDPOINT takes no spans: they are dropped until it does",
                action="tracing",
            )
        elif self._failed and not failed:
            log.info("Spans reach the collector again", action="tracing")
        self._failed = failed
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
