"""A gateway that serves a page of counters, and a daemon that waits on nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.cli.test_commands import Server


class Gateway(ThreadingHTTPServer):
    """Each time that it is asked for its counters there have been ten more requests of ``demo``, one of which goes on."""

    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def page(self) -> str:
        self.asked += 1
        count = 10 * self.asked
        labels = 'engine="llamacpp",pool_id="demo"'
        return (
            f"tasks_started_total{{{labels}}} {count + 1}.0\n"
            f'gateway_requests_total{{path="/v1/chat/completions",pool_id="demo",status="200"}} {count}.0\n'
            f"tokens_out_total{{{labels}}} {100 * count}.0\n"
            f"latency_first_token_ms_sum{{{labels}}} {182 * count}.0\nlatency_first_token_ms_count{{{labels}}} {count}.0\n"
        )


class Pages(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        body = self.server.page().encode()
        self.send_response(200 if self.path == "/metrics" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def node(server: Server) -> Server:
    """The fake node's daemon, with a queue and GPUs that are nobody else's."""
    return whole(server)


def whole(server: Server) -> Server:
    """With a queue in which nobody waits."""
    fake: Any = server.node
    fake.queue = fake.yields = list
    return server
