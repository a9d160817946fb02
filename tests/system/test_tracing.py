"""A trace through real processes: a client, the gateway, the daemon, an engine, and a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import http.client
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import free_port, wait_until
from tests.system.daemons import Daemon, in_time
from tests.traces import SPAN, TRACE, TRACEPARENT

ENGINE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer({"status": "ok"})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        print("traceparent", self.headers["traceparent"], flush=True)
        self.answer({"usage": {"prompt_tokens": 4, "completion_tokens": 2}})
    def answer(self, body):
        raw = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *_):
        pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Collector:
    """What was sent to ``url``, by service and span."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.resources: list[dict[str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
                collector.take(ExportTraceServiceRequest.FromString(raw))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, sent: ExportTraceServiceRequest) -> None:
        for of_process in sent.resource_spans:
            known = {one.key: one.value.string_value for one in of_process.resource.attributes}
            self.resources.append(known)
            self.spans += [(known["service.name"], span) for scope in of_process.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in tuple(self.spans) if span.name == name]

    def one(self, name: str) -> Span:
        wait_until(lambda: bool(self.named(name)), f"the span {name}")
        return self.named(name)[0][1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture(params=[pytest.param(1, id="one process"), pytest.param(2, id="two workers", marks=pytest.mark.slow)])
def home(open_dir: Path, collector: Collector, request: pytest.FixtureRequest) -> Iterator[Traced]:
    """With a gateway of one process, and of two."""
    made = Traced(open_dir / "home", request.param, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    yield made
    made.end()


class Traced(Daemon):
    """A daemon with a gateway, whose environment configures OpenTelemetry, and a pool ``p`` that is not loaded."""

    def __init__(self, folder: Path, workers: int = 1, **env: str) -> None:
        self.gateway_port = free_port()
        gateway = f'gateway: {{bind: "127.0.0.1:{self.gateway_port}", workers: {workers}}}'
        sections = f"{gateway}\ntelemetry: {{labels: {{tenant_id: t1}}}}\n"
        super().__init__(folder, sections, **{"OTEL_BSP_SCHEDULE_DELAY": "50", **env})

    def loadable(self) -> Traced:
        """Started, with ``p`` to be started on demand."""
        self.start()
        port = free_port()
        engine = {"binary_path": sys.executable, "flags": ["-I", "-c", ENGINE, str(port)], "port": port}
        assert self.post("/v1/pools/p/preload", engine)[0] == 200
        assert self.post("/v1/pools/p/evict?wait=true", {})[0] == 200
        return self

    def ask(self, **headers: str) -> int:
        """The status of one request to the gateway."""
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway_port, timeout=30)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps({"model": "p", "messages": []}), headers)
            return connection.getresponse().status
        finally:
            connection.close()

    def gateway_is_up(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway_port, timeout=5)
        try:
            connection.request("GET", "/health")
            return b"connected" in connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()


def test_a_request_is_one_trace_from_its_client_to_the_start_of_its_engine(home: Traced, collector: Collector) -> None:
    home.loadable()
    wait_until(home.gateway_is_up, "the gateway")
    assert home.ask(traceparent=TRACEPARENT) == 200
    request, slot, engine = (collector.one(name) for name in ("POST /v1/chat/completions", "slot", "chat p"))
    acquire = collector.one("acquire")

    def launched() -> list[Span]:
        return [span for _, span in collector.named("launch") if span.trace_id.hex() == TRACE]

    wait_until(lambda: bool(launched()), "the launch")
    (launch,) = launched()
    assert {span.trace_id.hex() for span in (request, slot, engine, acquire, launch)} == {TRACE}
    ways = [(request, SPAN), (slot, request.span_id.hex()), (engine, request.span_id.hex())]
    ways += [(acquire, slot.span_id.hex()), (launch, acquire.span_id.hex())]
    for span, parent in ways:
        assert span.parent_span_id.hex() == parent, span.name
    seen = f"traceparent 00-{TRACE}-{engine.span_id.hex()}-01"
    wait_until(lambda: seen in (home.run / "engine-p.log").read_text(), "what the engine was told")
    services = {span.name: service for service, span in collector.spans}
    assert services["acquire"] == services["launch"] == "pool-managerd" and services["slot"] == "pool-managerd-gateway"
    assert {known["tenant_id"] for known in collector.resources} == {"t1"}
    of_the_launch = [line for line in home.lines() if line.get("trace_id") == TRACE]
    assert {"start", "staged", "spawn"} <= {line["action"] for line in of_the_launch}
    assert {line["span_id"] for line in of_the_launch} >= {acquire.span_id.hex()}


def test_what_is_left_is_sent_at_the_end(open_dir: Path, collector: Collector) -> None:
    home = Traced(open_dir / "home", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="3600000")
    try:
        home.loadable()
        wait_until(home.gateway_is_up, "the gateway")
        assert home.ask() == 200 and not collector.spans
        assert home.terminate() == 0
    finally:
        home.end()
    assert {"launch", "acquire", "slot", "chat p"} <= {span.name for _, span in collector.spans}


def test_a_collector_that_is_away_is_told_once_and_costs_nothing(open_dir: Path) -> None:
    home = Traced(
        open_dir / "home", OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}", OTEL_EXPORTER_OTLP_TIMEOUT="1"
    )
    try:
        home.loadable()
        wait_until(home.gateway_is_up, "the gateway")
        for _ in range(3):
            assert home.ask() == 200
        wait_until(lambda: len(home.lines("tracing")) >= 2, "both processes to have told it")
        for _ in range(20):
            assert home.ask() == 200
        in_time(8, home.terminate)
        told = home.lines("tracing")
        assert len(told) == 2 and all("takes no spans" in line["human"] for line in told)
        assert "opentelemetry" not in home.text()
    finally:
        home.end()


def test_without_an_endpoint_nothing_is_traced(open_dir: Path) -> None:
    home = Traced(open_dir / "home", OTEL_SERVICE_NAME="x")
    try:
        home.loadable()
        wait_until(home.gateway_is_up, "the gateway")
        assert home.ask(traceparent=TRACEPARENT) == 200
        wait_until(lambda: f"traceparent {TRACEPARENT}" in (home.run / "engine-p.log").read_text(), "the client's, as it came")
        assert not home.lines("tracing") and not any("trace_id" in line for line in home.lines())
    finally:
        home.end()
