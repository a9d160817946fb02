"""A gateway that serves a page of counters, and a daemon that waits on nobody."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from tests.cli.pages import Page, answering
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


class Pages(Page):
    server: Gateway

    def do_GET(self) -> None:
        self.answer(200 if self.path == "/metrics" else 404, self.server.page().encode(), "text/plain")


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with answering(Gateway(("127.0.0.1", 0), Pages)) as server:
        yield server


@pytest.fixture
def node(server: Server) -> Server:
    """The fake node's daemon, with a queue and GPUs that are nobody else's."""
    return whole(server)


def whole(server: Server) -> Server:
    """With a queue in which nobody waits."""
    fake: Any = server.node
    fake.queue = fake.yields = list
    return server
