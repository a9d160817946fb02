"""How long the connections to a port have been silent, by the kernel's word on real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from pool_managerd.runtime import sock_diag
from pool_managerd.runtime.clients import silent_clients
from tests.conftest import wait_until


@pytest.fixture(params=["127.0.0.1", "::"])
def listening(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family, dualstack_ipv6=":" in request.param) as made:
        yield made


def test_a_connection_is_silent_since_what_it_last_brought_until_it_ends(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    assert silent_clients(port) == ()
    with socket.create_connection(("127.0.0.1", port)) as client:
        accepted = listening.accept()[0]
        with accepted:
            client.sendall(b"GET / HTTP/1.1")
            asked = time.monotonic()
            time.sleep(0.3)
            accepted.sendall(b"HTTP/1.1 200 OK")  # what is sent to it does not count
            (silent_s,) = silent_clients(port)
            assert 0.25 <= silent_s <= time.monotonic() - asked + 0.05
            client.sendall(b"more")
            wait_until(lambda: silent_clients(port)[0] < 0.25, "the new bytes to count", 5)
            client.close()
            wait_until(lambda: silent_clients(port) == (), "the client to be gone", 5)
    assert silent_clients(port) == ()


def test_where_the_kernel_does_not_tell_nobody_is_held_to_wait(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(sock_diag, "sockets", refuse)
    with socket.create_connection(("127.0.0.1", listening.getsockname()[1])):
        assert silent_clients(listening.getsockname()[1]) == ()


def test_a_question_that_failed_does_not_spoil_the_next_one(listening: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    family, port = listening.family, listening.getsockname()[1]
    (before,) = sock_diag.sockets(family, port, sock_diag.LISTEN)
    with monkeypatch.context() as patch:
        patch.setattr(sock_diag, "_SOCK_DIAG_BY_FAMILY", 999)  # the kernel knows no such question
        with pytest.raises(OSError, match="refused"):
            sock_diag.sockets(family, port, sock_diag.LISTEN)
    assert sock_diag.sockets(family, port, sock_diag.LISTEN) == [before]
