"""Whom the daemon asks by itself: engines at their addresses; no proxy, no redirect, no metadata service."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.system.daemons import Daemon, engine


class Listener:
    """A server that notes who asks it for what. ``to``: where it sends them instead of answering."""

    def __init__(self, to: str | None = None) -> None:
        heard = self.heard = list[str]()

        class Answers(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                heard.append(f"{self.command} {self.path}")
                self.send_response(200 if to is None else 307)
                if to is not None:
                    self.send_header("Location", to + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_CONNECT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def victim() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def daemon(open_dir: Path, victim: Listener) -> Iterator[Daemon]:
    names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    started = Daemon(open_dir / "d", **dict.fromkeys(names, victim.url))
    yield started.start()
    started.end()


def test_neither_proxies_of_the_environment_nor_redirects_of_an_engine_lead_the_daemon_elsewhere(
    daemon: Daemon, victim: Listener
) -> None:
    lying = Listener(to=victim.url)
    try:
        (daemon.run / "engines" / "lying.json").write_text(json.dumps({"pool_id": "lying", "url": lying.url, "slots": 1}))
        daemon.preload("p")
        assert daemon.post("/v1/pools/r/preload?wait=false", engine("--health", "redirect"))[0] == 202
        wait_until(lambda: len(lying.heard) > 3, "the daemon to ask the announced engine again and again", 20)
        assert [daemon.status(pool)["ready"] for pool in ("lying", "r")] == [False, False]
        assert daemon.status("p")["ready"] is True
        assert victim.heard == []
    finally:
        lying.close()


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254:80", "http://2852039166:80", "http://[fd00:ec2::254]:80", "file:///etc/passwd"]
)
def test_an_announced_engine_at_a_metadata_service_is_refused_and_never_asked(daemon: Daemon, url: str) -> None:
    (daemon.run / "engines" / "cloud.json").write_text(json.dumps({"pool_id": "cloud", "url": url}))
    wait_until(lambda: "cannot use the handoff file" in daemon.text(), "the refusal", 10)
    assert daemon.get("/v1/pools/cloud/status")[0] == 404
