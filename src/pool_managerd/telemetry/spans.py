"""What all spans here have in common, and a trace on its way between processes (W3C Trace Context).

Imported only where ``tracing.is_on``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import context, trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pool_managerd._version import __version__
from pool_managerd.core.redaction import masked_text
from pool_managerd.errors import PoolError

MAX_TEXT_CHARS = 256
POOL_ID = "pool_managerd.pool_id"
ERROR = "error.type"
CANCELLED = "cancelled"
_W3C = TraceContextTextMapPropagator()


def tracer() -> Tracer:
    """Of the provider that this process has."""
    return trace.get_tracer("pool_managerd", __version__)


def carried() -> dict[str, str]:
    """The headers by which whoever is asked now goes on with the trace; none where there is none."""
    headers: dict[str, str] = {}
    _W3C.inject(headers)
    return headers


def given(headers: Mapping[str, str]) -> context.Context:
    """What a caller's headers say of its trace."""
    return _W3C.extract(headers, context.Context())


@contextmanager
def continued(headers: Mapping[str, str]) -> Iterator[None]:
    """What is done here goes on with the caller's trace, where there is one."""
    token = context.attach(given(headers))
    try:
        yield
    finally:
        context.detach(token)


def text(value: str) -> str:
    """``value`` as it may be told, and no longer than anybody reads."""
    return masked_text(value)[:MAX_TEXT_CHARS]


def failed(span: Span, kind: str, *, error: bool = True) -> None:
    """It did not lead to what was asked for; ``error`` false: that is nobody's fault here."""
    span.set_attribute(ERROR, kind[:MAX_TEXT_CHARS])
    if error:
        span.set_status(Status(StatusCode.ERROR))


def refused(span: Span, problem: PoolError) -> None:
    """As ``failed``; what a caller is refused is no error of the server."""
    failed(span, problem.code, error=problem.status >= 500)
