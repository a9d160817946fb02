"""Every engine has its own port, and none that something listens on."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pool_managerd.core.instance_id import InstanceId
from pool_managerd.engines.ports import PortAllocator, is_free
from pool_managerd.errors import NodeError


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def three() -> int:
    """The first of three free ports in a row."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        start = int(probe.getsockname()[1])
    for low in range(min(start, 60_000), 20_000, -3):
        if all(is_free(low + offset) for offset in range(3)):
            return low
    pytest.fail("no three free ports in a row")


def test_ports_are_handed_out_from_the_bottom_and_never_twice(three: int) -> None:
    ports = PortAllocator(f"{three}-{three + 2}")
    assert [ports.claim(InstanceId(name)) for name in "abc"] == [three, three + 1, three + 2]
    with pytest.raises(NodeError, match="cannot find a free port for pool d") as caught:
        ports.claim(InstanceId("d"))
    assert caught.value.hint is not None
    assert "daemon.engine_ports" in caught.value.hint
    ports.release(InstanceId("b"))
    assert ports.claim(InstanceId("d")) == three + 1


def test_a_pool_keeps_its_port_over_a_restart(three: int) -> None:
    ports = PortAllocator(f"{three}-{three + 2}")
    ports.claim(InstanceId("a"))
    assert ports.claim(InstanceId("b")) == three + 1
    ports.release(InstanceId("a"))
    assert ports.claim(InstanceId("b")) == three + 1
    assert ports.all_claimed() == {three + 1}


def test_what_is_another_pools_own_is_given_to_others_last(three: int) -> None:
    ports = PortAllocator(f"{three}-{three + 2}", frozenset({three, three + 2}))
    assert [ports.claim(InstanceId("a")), ports.claim(InstanceId("b"), [three])] == [three + 1, three]
    assert ports.claim(InstanceId("c")) == three + 2, "nothing else is left"


def test_the_pools_own_ports_come_first(three: int) -> None:
    ports = PortAllocator(f"{three}-{three + 1}")
    assert ports.claim(InstanceId("a"), [three + 2]) == three + 2
    assert ports.claim(InstanceId("b"), [three + 2, three + 1]) == three + 1


def test_a_port_that_something_listens_on_is_passed_over(listener: int, three: int) -> None:
    assert not is_free(listener)
    ports = PortAllocator(f"{three}-{three + 2}")
    assert ports.claim(InstanceId("a"), [listener]) == three


def test_a_lingering_connection_does_not_make_a_port_taken() -> None:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", 0))
    server.listen()
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    accepted.close()  # this side closes first, so it keeps the connection in TIME_WAIT
    client.close()
    server.close()
    assert is_free(port)


def test_releasing_what_was_never_claimed_is_no_error() -> None:
    PortAllocator("8080-8999").release(InstanceId("nobody"))


def test_two_replicas_of_a_pool_have_a_port_each_until_the_pool_is_forgotten(three: int) -> None:
    ports = PortAllocator(f"{three}-{three + 2}")
    first, second = InstanceId("p"), InstanceId("p", "r1")
    assert [ports.claim(first), ports.claim(second), ports.claim(first)] == [three, three + 1, three]
    assert ports.all_claimed() == {three, three + 1}
    ports.release(first)
    assert ports.all_claimed() == {three + 1} and ports.claim(InstanceId("q")) == three
    ports.claim(first)
    ports.forget("p")
    assert ports.all_claimed() == {three}
