"""Who holds a port: this process, another one, nobody; on IPv4 and IPv6; with and without netlink."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pool_managerd.runtime import listener
from pool_managerd.runtime.listener import Listeners
from tests.runtime.support import Bench, alive, fake

_SERVE = """
import os, socket, sys
address, port, uid, flags = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
if uid:
    os.setresuid(uid, uid, uid)
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
for flag in flags:
    s.setsockopt(socket.IPPROTO_IPV6 if flag == "IPV6_V6ONLY" else socket.SOL_SOCKET, getattr(socket, flag), 1)
s.bind((address, port))
s.listen()
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""

_NOT_DUMPABLE = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
sys.stdin.read()
"""

Serve = Callable[..., tuple[int, int]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a process that listens, of a session of its own; its pid and port. An address that is missing skips."""
    started: list[subprocess.Popen[str]] = []

    def start(address: str = "127.0.0.1", port: int = 0, uid: int = 0, *flags: str) -> tuple[int, int]:
        argv = [sys.executable, "-I", "-S", "-c", _SERVE, address, str(port), str(uid), *flags]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line and ":" in address:
            pytest.skip(f"no {address} here")
        return child.pid, int(line)

    yield start
    for child in started:
        child.kill()
        child.communicate()


def owner(pid: int, host: str, port: int) -> str:
    return Listeners().find(pid, host, port).owner


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_of_ones_own_is_told_from_anothers_and_from_nobodys(serve: Serve, address: str) -> None:
    pid, port = serve(address)
    other, others = serve(address)
    assert owner(pid, address, port) == "engine"
    assert owner(os.getpid(), address, port) == "engine", "a child's port is the family's"
    found = Listeners().find(pid, address, others)
    assert found.owner == "other"
    assert found.who.startswith(f"pid {other} (python")
    os.kill(other, 9)
    while alive(other):
        pass
    assert owner(pid, address, others) == "nobody"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change users")
def test_a_socket_of_another_user_is_another_programs_though_nobody_may_look_at_it(serve: Serve) -> None:
    pid, _ = serve("127.0.0.1")
    _, theirs = serve("127.0.0.1", 0, 65534)
    assert owner(pid, "127.0.0.1", theirs) == "other"


def test_the_socket_that_takes_the_connection_counts_not_one_beside_it(serve: Serve) -> None:
    pid, port = serve("127.0.0.1")
    stranger, _ = serve("::1", port)
    assert owner(pid, "127.0.0.1", port) == "engine"
    assert owner(pid, "::1", port) == "other"
    assert owner(stranger, "127.0.0.1", port) == "other"
    assert owner(stranger, "localhost", port) == "other"


def test_a_wildcard_takes_what_no_other_address_does(serve: Serve) -> None:
    pid, port = serve("0.0.0.0")
    assert owner(pid, "127.0.0.1", port) == owner(pid, "0.0.0.0", port) == "engine"
    stranger, port = serve("::")
    assert owner(stranger, "127.0.0.1", port) == "engine", "it takes IPv4 as well"
    assert owner(pid, "127.0.0.1", port) == "other"


def test_a_port_that_is_shared_is_not_the_engines(serve: Serve) -> None:
    pid, port = serve("127.0.0.1", 0, 0, "SO_REUSEPORT")
    assert owner(pid, "127.0.0.1", port) == "engine"
    other, _ = serve("127.0.0.1", port, 0, "SO_REUSEPORT")
    for asked in (pid, other):
        assert owner(asked, "127.0.0.1", port) == "other"


def test_an_engine_that_cannot_be_looked_into_is_not_believed_against_a_holder_that_can(serve: Serve) -> None:
    """As in the moment between its exec and its end."""
    secret = subprocess.Popen([sys.executable, "-I", "-S", "-c", _NOT_DUMPABLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert secret.stdout is not None
        port = int(secret.stdout.readline())
        other, others = serve("127.0.0.1")
        assert owner(secret.pid, "127.0.0.1", others) == "other"
        assert owner(secret.pid, "127.0.0.1", port) == ("engine" if os.geteuid() == 0 else "unknown")
        assert owner(other, "127.0.0.1", port) == "other"
    finally:
        secret.kill()
        secret.communicate()


def test_what_was_seen_is_kept_only_while_the_socket_is_the_same(serve: Serve) -> None:
    listeners = Listeners()
    pid, port = serve("127.0.0.1", 0, 0, "SO_REUSEADDR")
    assert [listeners.find(pid, "127.0.0.1", port).owner for _ in range(2)] == ["engine"] * 2
    os.kill(pid, 9)
    while alive(pid):
        pass
    serve("127.0.0.1", port, 0, "SO_REUSEADDR")
    assert listeners.find(pid, "127.0.0.1", port).owner == "other"


async def test_a_socket_of_a_descendant_that_left_its_session_is_the_engines(bench: Bench) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "1", "--setsid"))
    await bench.says("listens on port")
    port = int(bench.log().split(b"listens on port ")[1].split()[0])
    assert (await Listeners()(process.pid, "127.0.0.1", port)).owner == "engine"


def test_the_kernel_and_the_tables_say_the_same(monkeypatch: pytest.MonkeyPatch, serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
        serve("::1", port)
        asked = listener.listening_sockets(port)
        assert asked == listener._read_tables(port) != []

        def refused(family: int, port: int) -> Any:
            raise PermissionError("no netlink here")

        monkeypatch.setattr(listener, "_ask_kernel", refused)
        assert listener.listening_sockets(port) == asked


async def test_where_an_engine_listens_is_seen_wherever_it_is(serve: Serve) -> None:
    pid, port = serve()
    six, six_port = serve("::1")
    find = Listeners()
    assert await find.elsewhere(pid) == [f"127.0.0.1:{port}"]
    assert await find.elsewhere(six) == [f"[::1]:{six_port}"]
    assert {f"127.0.0.1:{port}", f"[::1]:{six_port}"} <= set(await find.elsewhere(os.getpid())), "a descendant's are its own"


async def test_a_port_without_a_listener_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "in_own_thread", None)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        assert (await Listeners()(os.getpid(), "127.0.0.1", unheard.getsockname()[1])).owner == "nobody"
