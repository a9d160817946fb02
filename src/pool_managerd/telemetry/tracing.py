"""Whether this process traces its work (OpenTelemetry), and where its spans go.

Nothing of OpenTelemetry is imported until that is known: a process that does not trace pays nothing for it. A program that embeds
a node or a gateway sets its own provider of tracers, before it makes them; only our own processes ever set one, by the standard
environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from pool_managerd.telemetry.logs import Logging

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SPOKEN = "http/protobuf"
log = structlog.get_logger("pool_managerd.tracing")


def is_on() -> bool:
    """A provider of tracers was set in this process."""
    trace = sys.modules.get("opentelemetry.trace")
    return trace is not None and not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def is_wanted(env: Mapping[str, str]) -> bool:
    """The environment says where spans are to go, and not that there are to be none."""
    exporters = {name.strip() for name in (env.get("OTEL_TRACES_EXPORTER") or "otlp").split(",")}
    disabled = env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not disabled and "otlp" in exporters and any(env.get(name) for name in _ENDPOINTS)


@contextmanager
def exported(env: Mapping[str, str], service: str, logs: Logging, labels: Mapping[str, str]) -> Iterator[None]:
    """The spans of this process go where ``env`` says, until the block ends. ``service`` is what it is called unless ``env`` says
    so, too; ``labels`` go on all of them. What is in the way of that is told, and nothing is traced then.
    """
    if not is_wanted(env):
        yield
        return
    protocol = next((env[name] for name in _PROTOCOLS if env.get(name)), _SPOKEN)
    if protocol != _SPOKEN:
        log.warning(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol[:40]} is not spoken here: spans are sent as {_SPOKEN}", action="tracing"
        )
    try:
        from pool_managerd.telemetry.otlp import Export
    except ImportError as problem:
        log.warning(
            f"Nothing is traced: an OTLP endpoint is configured, but {problem.name or 'OpenTelemetry'} is not installed: "
            "pip install 'pool-managerd[otel]'", action="tracing",
        )  # fmt: skip
        yield
        return
    try:
        export = Export(service, labels)
    except Exception as problem:  # noqa: BLE001 - whatever the SDK makes of its environment: that must not keep a node from running
        log.warning(f"Nothing is traced: cannot use the OTEL_* environment: {problem}", action="tracing")
        yield
        return
    logs.trace_ids = export.ids
    try:
        yield
    finally:
        export.close()
