"""Many hostile clients at once: /health is answered within a second all the while, and nothing is kept of them (FAULTS H1–H7)."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import descriptors, wait_until
from tests.system.daemons import Daemon

HEAD = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
AT_ONCE = int(os.environ.get("POOL_MANAGERD_ATTACK_CONNECTIONS", "10000"))
"""H1 has ten thousand; fewer where the limit of open files is lower."""
GROWTH_BYTES = 48 << 20
SLOWEST_S = 1.0
POOL_IDS = (
    "..%2f..%2fetc%2fpasswd", "%00", "a%00b", ".", "..", "a" * 300, "%E2%88%95etc", "%EF%BC%8F", "%c0%af", "a%5cb", "%252e%252e",
    "~root", "a;b",
)  # fmt: skip
BODIES = {
    "deep": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "digits": b'{"ttl_ms":' + b"9" * 900_000 + b"}",
    "duplicates": b"{" + b",".join(b'"ttl_ms":1' for _ in range(50_000)) + b"}",
    "nan": b'{"ttl_ms":NaN}',
    "not utf-8": b'{"holder":"' + b"\xff\xfe\xc0\xaf" * 1000 + b'"}',
    "escapes": b'{"holder":"' + b"\\u0000" * 100_000 + b'"}',
    "keys": b"{" + b",".join(b'"k%d":1' % n for n in range(60_000)) + b"}",
    "a quote": b'{"a":' + b"[" * 40 + b'"' + b'\\"' * 300_000,
}


class Watch:
    """Asks for /health the whole time, on a connection of its own for each."""

    def __init__(self, port: int) -> None:
        self.took: list[float] = []
        self.failed: list[str] = []
        self._port, self._over = port, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
                with contextlib.closing(connection):
                    connection.request("GET", "/health")
                    if (status := connection.getresponse().status) != 200:
                        self.failed.append(str(status))
            except (OSError, http.client.HTTPException) as problem:
                self.failed.append(repr(problem))
            self.took.append(time.monotonic() - began)
            self._over.wait(0.01)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(15)

    def p99(self) -> float:
        return sorted(self.took)[int(len(self.took) * 0.99)]


def held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(status["VmRSS"].split()[0]) * 1024, descriptors(pid), int(status["Threads"])


@pytest.fixture(scope="module")
def daemon(session_dir: Path, closed_to_engines: str | None) -> Iterator[Daemon]:
    if closed_to_engines:
        pytest.skip(closed_to_engines)
    started = Daemon(session_dir / "storms")
    try:
        started.start()
        started.preload("p", slots_total=4)
        for storm in (bodies, paths, headers):  # what is grown once is not leaked
            storm(started.port)
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module", autouse=True)
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def said(port: int, *parts: bytes, timeout_s: float = 10.0) -> int:
    """The status of the answer to these bytes; 0 when the connection was closed without one."""
    data = b""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as peer:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                peer.sendall(part)
        while b"\r\n" not in data and (chunk := peer.recv(4096)):
            data += chunk
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/") else 0


def post(path: str, body: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\nConnection: close\r\n\r\n"
    return head % (path.encode(), HEAD, JSON, len(body)) + body


def bodies(port: int) -> list[int]:
    paths = ("/v1/pools/p/leases", "/v1/pools/p/preload", "/v1/pools/p/drain")
    return [said(port, post(path, body)) for path in paths for body in BODIES.values()]


def huge(port: int) -> list[int]:
    """A number of 10⁹ digits, announced or in chunks without end."""
    announced = b"POST /v1/pools/p/leases HTTP/1.1\r\n%s%sContent-Length: 1000000012\r\n\r\n" % (HEAD, JSON)
    chunked = b"POST /v1/pools/p/leases HTTP/1.1\r\n%s%sTransfer-Encoding: chunked\r\n\r\n" % (HEAD, JSON)
    digits = b"100000\r\n" + b"9" * (1 << 20) + b"\r\n"
    return [said(port, announced, b'{"ttl_ms":'), said(port, chunked, *[digits] * 64)]


def paths(port: int) -> list[int]:
    routes = (
        "/v1/pools/%s/status", "/v1/pools/%s/crashes", "/v1/pools/%s/logs", "/v1/crashes?pool_id=%s", "/v1/operations/%s",
        "/v1/pools/p/leases/%s", "/%s", "/v1/devices/%s/cordon",
    )  # fmt: skip
    asked = ((route % bad).encode() for route in routes for bad in POOL_IDS)
    return [said(port, b"GET %s HTTP/1.1\r\n%sConnection: close\r\n\r\n" % (path, HEAD)) for path in asked]


def headers(port: int) -> list[int]:
    floods = (
        b"X-Big: " + b"x" * 1_000_000 + b"\r\n", b"".join(b"X-%d: y\r\n" % n for n in range(30_000)), b"X\r\n" * 10_000,
        b"Cookie: " + b"a=b; " * 20_000 + b"\r\n", b"Content-Length: 5\r\n" * 3, b"Transfer-Encoding: chunked, chunked\r\n",
    )  # fmt: skip
    return [said(port, b"GET /health HTTP/1.1\r\n" + HEAD + flood + b"\r\n") for flood in floods]


def noise(port: int) -> list[int]:
    """Requests with a few bytes turned into others."""
    chance = random.Random(9)
    template = post("/v1/pools/p/leases?wait=true", b'{"holder":"a","ttl_ms":1000,"idempotency_key":"k"}')
    found = []
    for _ in range(300):
        request = bytearray(template)
        for _ in range(chance.randint(1, 6)):
            request[chance.randrange(len(request))] = chance.randrange(256)
        with contextlib.suppress(TimeoutError):  # it waits for the rest of a request, and may
            found.append(said(port, bytes(request), timeout_s=0.2))
    return found


@pytest.mark.parametrize("storm", [bodies, huge, paths, headers, noise])
def test_no_request_is_a_fault_and_health_is_quick_all_the_while(daemon: Daemon, storm: Callable[[int], list[int]]) -> None:
    with Watch(daemon.port) as watch:
        found = storm(daemon.port)
    assert [status for status in found if status >= 500 and status != 503] == []
    assert not watch.failed and watch.p99() < SLOWEST_S, (watch.failed[:5], watch.p99())


def test_hostile_bodies_are_refused_and_never_taken(daemon: Daemon) -> None:
    assert {400, 413} >= set(bodies(daemon.port)) - {409, 415}
    assert set(huge(daemon.port)) <= {413, 0}
    assert {404} >= set(paths(daemon.port)) - {400, 405}


def test_ten_thousand_connections_leave_room_for_health_and_are_not_kept(daemon: Daemon) -> None:
    """Half of them say nothing, half a head that never ends; and the daemon has fewer descriptors than that."""
    assert daemon.process is not None
    before = held(daemon.process.pid)
    peers: list[socket.socket] = []
    count = min(AT_ONCE, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 500)
    try:
        with Watch(daemon.port) as watch:
            for number in range(count):
                peer = socket.socket()
                peer.setblocking(False)
                peer.connect_ex(("127.0.0.1", daemon.port))
                peers.append(peer)
                if number % 2 and number % 64 == 1:
                    _dribble(peers[-64:])
            wait_until(lambda: len(watch.took) > 100, "a hundred answers", 60)  # some of them while it still takes them
            _dribble(peers)
        during = held(daemon.process.pid)
    finally:
        for peer in peers:
            peer.close()
    assert watch.p99() < SLOWEST_S, (watch.p99(), watch.failed[:5])
    assert not watch.failed
    assert during[1] < before[1] + 1500
    _nothing_is_kept(daemon, before)


def test_readers_that_do_not_read_are_cut_off_and_cost_little(daemon: Daemon) -> None:
    assert daemon.process is not None
    before = held(daemon.process.pid)
    peers = []
    with Watch(daemon.port) as watch:
        for number in range(100):
            path = (b"/v1/events?after=0", b"/v1/pools/p/logs?follow=true&lines=10000")[number % 2]
            peer = socket.create_connection(("127.0.0.1", daemon.port), timeout=5)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.sendall(b"GET %s HTTP/1.1\r\n%s\r\n" % (path, HEAD))
            peers.append(peer)
        wait_until(lambda: len(watch.took) > 50, "fifty answers", 30)
    assert not watch.failed and watch.p99() < SLOWEST_S
    for peer in peers:
        peer.close()
    _nothing_is_kept(daemon, before)


def test_after_all_of_it_the_daemon_is_well(daemon: Daemon) -> None:
    assert daemon.process is not None and daemon.process.poll() is None
    assert daemon.status()["ready"] and daemon.get("/v1/pools/p/crashes") == (200, [])
    assert not daemon.lines("internal_error") and "Traceback" not in daemon.text()


def _dribble(peers: list[socket.socket]) -> None:
    for peer in peers[::2]:
        with contextlib.suppress(OSError):
            peer.send(b"GET /health HTTP/1.1\r\nX: ")


def _nothing_is_kept(daemon: Daemon, before: tuple[int, int, int]) -> None:
    assert daemon.process is not None
    pid = daemon.process.pid
    wait_until(lambda: held(pid)[1] <= before[1] + 4, f"the descriptors to go back from {held(pid)} to {before}", 30)
    after = held(pid)
    assert after[0] < before[0] + GROWTH_BYTES, (before, after)
    assert after[2] <= before[2] + 8, (before, after)
