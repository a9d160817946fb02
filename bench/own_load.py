"""How long engines take to answer when nobody supervises them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

from bench.processes import end

_ASK = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


def load_times_ms(argvs: Sequence[Sequence[str]], ports: Sequence[int], every_s: float, timeout_s: float = 60.0) -> list[float]:
    """Start all at once, ask each in turn each ``every_s``, end them. Raises TimeoutError."""
    children = []
    began: dict[int, float] = {}
    ready: dict[int, float] = {}
    try:
        for argv, port in zip(argvs, ports, strict=True):
            began[port] = time.monotonic()
            children.append(start_bare(argv))
        deadline = time.monotonic() + timeout_s
        while len(ready) < len(began):
            if time.monotonic() > deadline:
                raise TimeoutError(f"an engine did not answer within {timeout_s:g} s")
            for port in began.keys() - ready.keys():
                if healthy(port):
                    ready[port] = time.monotonic()
            time.sleep(every_s)
    finally:
        for child in children:
            end(child)
    return [(ready[port] - began[port]) * 1000 for port in ports]


def start_bare(argv: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """The engine as a plain child; its output goes nowhere."""
    null = subprocess.DEVNULL
    return subprocess.Popen(argv, stdin=null, stdout=null, stderr=null, env=None if env is None else dict(env))


def healthy(port: int) -> bool:
    """One look at /health."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(_ASK)
        return connection.recv(64).split(b" ", 2)[1:2] == [b"200"]
    return False
