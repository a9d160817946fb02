"""Who holds a port: this process, another one, nobody; on IPv4 and IPv6; with and without netlink."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pool_managerd.runtime import listener
from pool_managerd.runtime.listener import owns_port

WAIT = "import socket,sys; s=socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_of_ones_own_is_told_from_anothers_and_from_nobodys(family: socket.AddressFamily, address: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        childs = int(child.stdout.readline())
        try:
            mine = socket.create_server((address, 0), family=family)
        except OSError as problem:
            child.kill()
            pytest.skip(f"no {address} here: {problem}")
        with mine:
            port = mine.getsockname()[1]
            assert owns_port(os.getpid(), port) is True
            assert owns_port(os.getpid(), childs) is True, "a child's port is the family's"
            assert owns_port(child.pid, childs) is True
            if os.getsid(child.pid) != child.pid:
                assert owns_port(child.pid, port) is False
        assert owns_port(os.getpid(), port) is None
        child.kill()


def test_the_kernel_and_the_tables_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mine:
        port = mine.getsockname()[1]
        asked = listener._listening_inodes(port)
        assert asked == listener._read_tables(port) != set()

        def refused(family: int, port: int) -> list[int]:
            raise PermissionError("no netlink here")

        monkeypatch.setattr(listener, "_ask_kernel", refused)
        assert listener._listening_inodes(port) == asked
