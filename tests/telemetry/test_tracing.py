"""When a process traces, and what it says where it cannot."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from structlog.testing import capture_logs

from pool_managerd.errors import NodeError, RequestError
from pool_managerd.telemetry import tracing
from pool_managerd.telemetry.logs import Logging
from pool_managerd.telemetry.otlp import Export, ToldOnce
from pool_managerd.telemetry.spans import carried, continued, refused, text
from tests.traces import TRACE, TRACEPARENT, recorded, told

HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, False),
        (HERE, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://h"}, False),
        ({**HERE, "OTEL_SDK_DISABLED": "True"}, False),
        ({**HERE, "OTEL_SDK_DISABLED": "false"}, True),
        ({**HERE, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**HERE, "OTEL_TRACES_EXPORTER": "console, otlp"}, True),
    ],
)
def test_it_is_on_where_the_environment_says_where_spans_go(env: dict[str, str], wanted: bool) -> None:
    assert tracing.is_wanted(env) is wanted


class Logs:
    """As far as tracing asks for logging."""

    trace_ids = None


@pytest.fixture
def logs() -> Logging:
    return cast(Logging, Logs())


def test_without_the_extra_it_says_how_to_have_it_and_goes_on(monkeypatch: pytest.MonkeyPatch, logs: Logging) -> None:
    monkeypatch.delitem(sys.modules, "pool_managerd.telemetry.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with capture_logs() as lines, tracing.exported(HERE, "s", logs, {}):
        pass
    (line,) = lines
    assert line["log_level"] == "warning" and "pip install 'pool-managerd[otel]'" in line["event"]
    assert "\n" not in line["event"] and logs.trace_ids is None


def test_an_environment_that_the_sdk_cannot_use_is_told_and_it_goes_on(monkeypatch: pytest.MonkeyPatch, logs: Logging) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with capture_logs() as lines, tracing.exported(HERE, "s", logs, {}):
        pass
    assert [line["event"].partition(":")[0] for line in lines] == ["Nothing is traced"]


@pytest.fixture
def no_global(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TracerProvider]]:
    """What would be set as the provider of this process."""
    found: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", found.append)
    levels = {name: logging.getLogger(name).level for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")}
    yield found
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_a_process_has_its_name_unless_the_environment_gives_it_one(
    monkeypatch: pytest.MonkeyPatch, no_global: list[TracerProvider]
) -> None:
    Export("pool-managerd", {"tenant_id": "t1"}).close()
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=h1,tenant_id=t2")
    Export("pool-managerd", {"tenant_id": "t1"}).close()
    plain, named = (provider.resource.attributes for provider in no_global)
    assert plain["service.name"] == "pool-managerd" and plain["tenant_id"] == "t1" and plain["service.version"]
    assert (named["service.name"], named["host.name"], named["tenant_id"]) == ("mine", "h1", "t2")


def test_a_protocol_that_is_not_spoken_is_told(logs: Logging, no_global: list[TracerProvider]) -> None:
    env = {**HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with capture_logs() as lines, tracing.exported(env, "s", logs, {}):
        assert logs.trace_ids is not None and logs.trace_ids() == {}
    assert ["http/protobuf" in line["event"] for line in lines] == [True] and len(no_global) == 1


class Away(SpanExporter):
    """Its collector is away while ``away``."""

    away = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE if self.away else SpanExportResult.SUCCESS


def test_a_collector_that_is_away_is_told_once_and_so_is_that_it_is_back() -> None:
    inner = Away()
    exporter = ToldOnce(inner)
    with capture_logs() as lines:
        for away in (True, True, False, False, True):
            inner.away = away
            exporter.export(())
    assert [line["log_level"] for line in lines] == ["warning", "info", "warning"]


def test_nobody_waits_at_the_end_for_a_collector_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, no_global: list[TracerProvider]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        export = Export("s", {})
        no_global[0].get_tracer("t").start_span("a").end()
        began = time.monotonic()
        export.close()
        assert time.monotonic() - began < 8, "the SDK by itself takes at least 10 s"


def test_a_trace_is_continued_within_the_block_alone() -> None:
    with recorded() as spans, continued({"traceparent": TRACEPARENT}):
        assert carried()["traceparent"] == TRACEPARENT
        with spans.provider.get_tracer("t").start_as_current_span("a"):
            assert carried()["traceparent"].startswith(f"00-{TRACE}-") and carried()["traceparent"] != TRACEPARENT
        with continued({}):
            assert carried() == {}
    assert carried() == {}


def test_what_a_caller_is_refused_is_no_error_of_the_server() -> None:
    with recorded() as spans:
        for problem in (RequestError("x", code="A", status=404), NodeError("x", code="B")):
            with spans.provider.get_tracer("t").start_as_current_span("a") as span:
                refused(span, problem)
    assert [(told(span)["error.type"], span.status.is_ok) for span in spans.named("a")] == [("A", True), ("B", False)]


def test_a_text_is_clipped_and_masked() -> None:
    assert text("a" * 1000) == "a" * 256 and "hunter22" not in text("http://me:hunter22@h/")
