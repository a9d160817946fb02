"""Spans of this process, kept for tests to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"


class Spans:
    """Those that have ended."""

    def __init__(self) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False)
        self._exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """As they began."""
        return sorted((span for span in self.all() if span.name == name), key=lambda span: span.start_time or 0)

    def one(self, name: str) -> ReadableSpan:
        (found,) = self.named(name)
        return found

    def clear(self) -> None:
        self._exporter.clear()

    def told(self) -> str:
        """All that they tell, as one text."""
        return "\n".join(span.to_json() for span in self.all())


@contextmanager
def recorded() -> Iterator[Spans]:
    """As a program does that has set its own provider of tracers."""
    spans = Spans()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trace, "get_tracer_provider", lambda: spans.provider)
        yield spans


def _context(span: ReadableSpan) -> trace.SpanContext:
    found = span.get_span_context()
    assert found is not None
    return found


def span_id(span: ReadableSpan) -> str:
    return trace.format_span_id(_context(span).span_id)


def trace_id(span: ReadableSpan) -> str:
    return trace.format_trace_id(_context(span).trace_id)


def traceparent(span: ReadableSpan) -> str:
    """What whoever is asked within ``span`` is told."""
    return f"00-{trace_id(span)}-{span_id(span)}-{_context(span).trace_flags:02x}"


def parent_id(span: ReadableSpan) -> str | None:
    return None if span.parent is None else trace.format_span_id(span.parent.span_id)


def told(span: ReadableSpan) -> dict[str, object]:
    """Its attributes."""
    return dict(span.attributes or {})
