"""A lean client: ``python -m bench.lease_client PORT PATH CONNECTIONS SECONDS`` takes leases and gives them back.

One thread, one epoll, requests built beforehand. Prints one JSON object: requests, seconds, p50, p99 and max in ms, errors.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

from bench.result import quantile

_END = b"\r\n\r\n"


class Connection:
    """One keep-alive connection: POST, then DELETE what was given, for ever."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host = f" HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        self._take = f"POST {path}{host}Content-Length: 0\r\n\r\n".encode()
        self._give = f"DELETE {path}/".encode()
        self._rest = f"{host}\r\n".encode()
        self._lease: bytes | None = None
        self._buffer = b""
        self.sent_at = 0.0

    def send(self) -> None:
        request = self._take if self._lease is None else self._give + self._lease + self._rest
        self.sent_at = time.perf_counter()
        self.socket.sendall(request)

    def receive(self) -> int | None:
        """The status of a whole answer; None while it is not whole. Raises ConnectionError at its end."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed a connection")
        self._buffer = buffer = self._buffer + data if self._buffer else data
        end = buffer.find(_END)
        if end < 0:
            return None
        head = buffer[:end].lower()
        at = head.find(b"content-length:") + 15
        length = int(head[at : head.find(b"\r", at) if head.find(b"\r", at) > 0 else end])
        body = buffer[end + 4 :]
        if len(body) < length:
            return None
        self._buffer = b""
        status = int(buffer[9:12])
        if self._lease is None and status == 201:
            self._lease = json.loads(body)["lease_id"].encode()
        else:
            self._lease = None
        return status


def drive(port: int, path: str, connections: int, seconds: float) -> dict[str, float]:
    """Closed loop: each connection has one request under way."""
    poll = select.epoll()
    by_fd: dict[int, Connection] = {}
    for _ in range(connections):
        connection = Connection(port, path)
        by_fd[connection.socket.fileno()] = connection
        poll.register(connection.socket.fileno(), select.EPOLLIN)
    took: list[float] = []
    errors = 0
    began = time.perf_counter()
    until = began + seconds
    for connection in by_fd.values():
        connection.send()
    while (now := time.perf_counter()) < until:
        for fd, _ in poll.poll(1.0):
            connection = by_fd[fd]
            status = connection.receive()
            if status is None:
                continue
            took.append(time.perf_counter() - connection.sent_at)
            errors += status >= 400
            connection.send()
    spent = now - began
    for connection in by_fd.values():
        connection.socket.close()
    at = {f"p{share * 100:g}": quantile(took, share) * 1000 for share in (0.5, 0.99, 1.0)}
    return {"requests": len(took), "seconds": spent, "errors": errors, **at}


if __name__ == "__main__":
    _port, _path, _connections, _seconds = sys.argv[1:]
    print(json.dumps(drive(int(_port), _path, int(_connections), float(_seconds))))
