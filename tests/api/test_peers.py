"""Who is at the other end of a loopback connection, and what an open daemon lets them do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pool_managerd.api.auth import Access, local_token, with_local_token
from pool_managerd.cli.client import Daemon
from pool_managerd.cli.exits import CommandFailed
from pool_managerd.errors import NodeError
from pool_managerd.httpd import peers
from pool_managerd.httpd.peers import LOCAL_TOKEN
from tests.api.conftest import Served, close, serve
from tests.api.fake_node import FakeNode
from tests.conftest import wait_until

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can call as somebody else")
_CALL = """
import http.client, json, os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for line in sys.stdin:
    port, method, path, headers = json.loads(line)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, None, headers)
    response = connection.getresponse()
    print(json.dumps([response.status, response.read().decode()]), flush=True)
"""
READS = ["/v1/pools", "/v1/pools/demo", "/v1/pools/demo/status", "/v1/pools/demo/health", "/v1/snapshots", "/v1/devices",
         "/v1/capabilities", "/v1/pools/demo/leases", "/health", "/ready", "/metrics", "/openapi.json"]  # fmt: skip
PRIVATE = ["/v1/pools/demo/logs", "/v1/pools/demo/command", "/v1/pools/demo/explain", "/v1/pools/demo/crashes", "/v1/crashes",
           "/v1/operations", "/v1/events?follow=false", "/v2/pools/demo/logs"]  # fmt: skip
CHANGES = [("POST", "/v1/pools/demo/preload"), ("POST", "/pools/demo/preload"), ("POST", "/v1/pools/demo/stop"),
           ("DELETE", "/v1/pools/demo"), ("POST", "/v1/pools/demo/leases"), ("POST", "/v1/devices/0/cordon"),
           ("POST", "/v1/preflight"), ("PUT", "/v1/pools/demo/leases/x"), ("PATCH", "/v1/pools/demo")]  # fmt: skip
ASKED = [peers._ask, peers._read]


@pytest.fixture
def pairs() -> Iterator[Callable[[str], tuple[socket.socket, socket.socket]]]:
    with ExitStack() as stack:

        def connect(host: str) -> tuple[socket.socket, socket.socket]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = stack.enter_context(socket.socket(family))
            try:
                listener.bind((host, 0))
            except OSError:
                pytest.skip(f"{host} cannot be had here")
            listener.listen()
            client = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
            return client, stack.enter_context(listener.accept()[0])

        yield connect


@pytest.mark.parametrize("ask", ASKED, ids=["the kernel", "its table"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "::1"])
def test_the_peer_of_a_connection_is_the_user_who_made_it(
    pairs: Callable[[str], tuple[socket.socket, socket.socket]], host: str, ask: Callable[..., int | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    client, server = pairs(host)
    monkeypatch.setattr(peers, "_ask", ask)
    assert peers.uid_of_peer(server) == os.geteuid()
    assert peers.can_tell(server)
    client.close()
    assert peers.uid_of_peer(server) is None


@pytest.mark.parametrize("ask", ASKED, ids=["the kernel", "its table"])
def test_a_peer_that_has_closed_its_end_is_nobody_rather_than_root(
    pairs: Callable[[str], tuple[socket.socket, socket.socket]], ask: Callable[..., int | None]
) -> None:
    client, server = pairs("127.0.0.1")
    source, target = client.getsockname(), server.getsockname()
    server.close()  # its end is closed, the client's is not: both are waiting for a while
    client.close()
    assert ask(socket.AF_INET, source, target) is None


def test_an_ipv6_socket_that_calls_an_ipv4_address_is_known_too() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        try:
            client = socket.socket(socket.AF_INET6)
            client.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        except OSError:
            pytest.skip("no IPv6 here")
        server, _ = listener.accept()
        with client, server:
            source, target = server.getpeername(), server.getsockname()
            assert [ask(socket.AF_INET, source, target) for ask in ASKED] == [os.geteuid()] * 2


class Stranger:
    """Another local user."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CALL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )

    async def call(self, method: str, path: str, **headers: str) -> tuple[int, str]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([self.port, method, path, headers]) + "\n")
        self._process.stdin.flush()
        status, body = json.loads(await asyncio.to_thread(self._process.stdout.readline))
        return status, body

    def close(self) -> None:
        self._process.communicate(timeout=10)


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Served]:
    node = FakeNode()
    node.pools["demo"]["last_error"] = "its log ends with CANARY"
    served = await serve(node, with_local_token(Access("127.0.0.1"), tmp_path))
    yield served
    await close(served)


@pytest.fixture
async def stranger(opened: Served) -> AsyncIterator[Stranger]:
    caller = Stranger(opened.port)
    yield caller
    caller.close()


@as_root
async def test_another_user_reads_ids_and_states_and_nothing_that_an_engine_said(opened: Served, stranger: Stranger) -> None:
    for path in READS:
        status, body = await stranger.call("GET", path)
        assert status in (200, 503), path
        assert "CANARY" not in body, path
    for path in PRIVATE:
        status, body = await stranger.call("GET", path)
        assert (status, json.loads(body)["code"]) == (401, "MISSING_TOKEN"), path
        assert (await stranger.call("HEAD", path))[0] == 401, path
    assert opened.node.calls == []


@as_root
async def test_another_user_changes_nothing_and_is_told_what_to_do(opened: Served, stranger: Stranger) -> None:
    for method, path in CHANGES:
        status, body = await stranger.call(method, path)
        assert status == 401, (method, path)
        assert "auth.token_file" in json.loads(body)["hint"], body
        assert f"uid {NOBODY}" in json.loads(body)["message"]
        assert (await stranger.call(method, path, Authorization="Bearer wrong"))[0] == 401
    assert opened.node.calls == []


@as_root
async def test_another_user_who_was_given_the_local_token_may(opened: Served, stranger: Stranger, tmp_path: Path) -> None:
    token = (tmp_path / LOCAL_TOKEN).read_text().strip()
    assert (await stranger.call("POST", "/v1/pools/demo/hold", Authorization=f"Bearer {token}"))[0] == 202
    assert (await stranger.call("GET", "/v1/pools/demo/logs", Authorization=f"Bearer {token}"))[0] == 200
    _, body = await stranger.call("GET", "/v1/pools/demo", Authorization=f"Bearer {token}")
    assert "CANARY" in body


@as_root
async def test_a_token_that_may_be_left_out_on_loopback_may_be_left_out_by_the_owner_alone(tmp_path: Path) -> None:
    access = Access("0.0.0.0", b"d" * 32, optional_on_loopback=True)
    served = await serve(FakeNode(), with_local_token(access, tmp_path))
    caller = Stranger(served.port)
    try:
        assert (await caller.call("POST", "/v1/pools/demo/hold"))[0] == 401
        assert (await served.call("POST", "/v1/pools/demo/hold"))[0] == 202
        headers = {"Host": "evil.example", "Origin": "http://evil.example"}
        for path in ("/v1/pools/demo/hold", "/health", "/v1/pools"):
            for method in ("GET", "POST"):
                assert (await served.call(method, path, headers=headers))[0] == 421, path
        headers |= {"Authorization": "Bearer guessed"}
        assert (await served.call("POST", "/v1/pools/demo/hold", headers=headers))[0] == 421
    finally:
        caller.close()
        await close(served)


async def test_the_own_user_needs_no_token(opened: Served) -> None:
    assert (await opened.call("POST", "/v1/pools/demo/hold"))[0] == 202
    assert "CANARY" in (await opened.call("GET", "/v1/pools/demo"))[1]["last_error"]


async def test_a_peer_that_cannot_be_known_may_not(opened: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int | None:
        raise OSError(13, "no")

    monkeypatch.setattr(peers, "_ask", refuse)
    monkeypatch.setattr(peers, "_read", refuse)
    status, body = await opened.call("POST", "/v1/pools/demo/hold")
    assert status == 401
    assert "unknown user" in body["message"]


async def test_who_closes_before_the_answer_is_not_taken_for_root(opened: Served) -> None:
    """The kernel lists a closed socket with uid 0."""
    reader, writer = await asyncio.open_connection("127.0.0.1", opened.port)
    writer.write(b"POST /v1/pools/demo/hold HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b" 202 " not in answer
    assert opened.node.calls == []


def test_the_local_token_is_the_owners_alone_and_made_anew_when_others_could_read_it(tmp_path: Path) -> None:
    path, old = tmp_path / LOCAL_TOKEN, os.umask(0)
    try:
        first = local_token(tmp_path)
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert local_token(tmp_path) == first
    path.chmod(0o644)
    second = local_token(tmp_path)
    assert second != first
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("short\n")
    assert len(local_token(tmp_path).value) >= 32
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    local_token(tmp_path)
    assert not path.is_symlink()
    with pytest.raises(NodeError, match="cannot keep the local token"):
        local_token(tmp_path / "missing")


async def test_the_command_line_finds_the_local_token_by_itself_where_the_kernel_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int | None:
        raise OSError(13, "no")

    monkeypatch.setattr(peers, "_ask", refuse)
    monkeypatch.setattr(peers, "_read", refuse)
    served = await serve(FakeNode(), with_local_token(Access("127.0.0.1"), tmp_path))
    try:
        daemon = Daemon(served.url, state_dir=tmp_path)
        answer = await asyncio.to_thread(daemon.request, "POST", "pools", "demo", "hold")
        assert answer["operation_id"]
        with pytest.raises(CommandFailed) as caught:
            await asyncio.to_thread(Daemon(served.url, state_dir=tmp_path / "none").request, "POST", "pools", "demo", "hold")
        assert "control.token" in (caught.value.hint or "")
    finally:
        await close(served)


@as_root
def test_the_command_line_gives_the_local_token_to_nobody_else(tmp_path: Path) -> None:
    """Whoever has the port while the daemon is down would otherwise be told it."""
    local_token(tmp_path)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    thief = (
        "import http.server, os, sys, socket\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    protocol_version = 'HTTP/1.1'\n"
        "    def do_POST(self):\n"
        "        open(sys.argv[2], 'a').write(str(self.headers))\n"
        "        self.send_response(401); self.send_header('Content-Length', '2'); self.end_headers(); self.wfile.write(b'{}')\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    listener.close()
    other = tempfile.mkdtemp()
    Path(other).chmod(0o777)
    process = subprocess.Popen([sys.executable, "-c", thief, str(port), f"{other}/heard"])

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, "the thief to listen", 10)
        with pytest.raises(CommandFailed):
            Daemon(f"http://127.0.0.1:{port}", state_dir=tmp_path).request("POST", "pools", "demo", "hold")
        assert "Bearer" not in Path(other, "heard").read_text()
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(other)
