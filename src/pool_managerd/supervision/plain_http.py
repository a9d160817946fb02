"""One small GET over a socket of its own: a loading engine is asked dozens of times a second, and a client session costs ten
times as much for each question.

Only for ``http`` to an address: names and TLS are the session's business. An answer that is odd in the least is parsed by the
standard library; here is decided only when enough of it has come, in time that is linear in what an engine sends, and within a
bound of bytes.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import io
import os
import re
import socket
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

HEAD_LIMIT = 16 * 1024
_CHUNK = 64 * 1024
_END_OF_HEAD = b"\r\n\r\n"
_CHUNK_LINE = 256
_NO_SURPRISE = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2}) [ -~]*\r\n((?:[A-Za-z0-9-]+: ?[!-~](?:[ -~]*[!-~])?\r\n)+)\r\n")
_FIELDS, _DIGITS = 32, 9


@dataclass(frozen=True, slots=True)
class Answer:
    """``body`` as it was sent, never decompressed. None: there was more of it than the limit."""

    status: int
    content_type: str
    server: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Target:
    """Where to ask, and the request in full."""

    family: socket.AddressFamily
    address: tuple[str, int]
    request: bytes


@lru_cache(maxsize=1024)
def target(url: str) -> Target | None:
    """None when it takes more than a connection to an address: TLS, credentials, a name to look up, anything that is odd."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.inet_pton(family, host)
        where = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        request = f"GET {where} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode("ascii")
    except (ValueError, OSError):  # a name is no address; not ASCII; a port that is none
        return None
    if parts.scheme != "http" or "@" in parts.netloc or request.count(b"\r\n") != 5 or b" " in where.encode():
        return None
    return Target(family, (host, port), request)


async def get(asked: Target, limit: int) -> Answer:
    """The answer, with at most ``limit`` bytes of body. The caller bounds the time.

    Raises ConnectionError or another OSError when there is none (ConnectionAbortedError: it was cut off before its first byte),
    ValueError when it is not HTTP.
    """
    with socket.socket(asked.family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        await _connect(connection, asked.address)
        await asyncio.get_running_loop().sock_sendall(connection, asked.request)
        try:
            head, body = await _read_head(connection)
            answer = _measured(head) or _Received(head)
            while not answer.is_whole(body) and len(body) <= limit:
                more = await asyncio.get_running_loop().sock_recv(connection, _CHUNK)
                if not more:
                    break
                body += more
            return answer.content(body if len(body) <= limit else None)
        except http.client.HTTPException as problem:
            raise ValueError(type(problem).__name__) from problem


async def _connect(connection: socket.socket, address: tuple[str, int]) -> None:
    under_way = (errno.EINPROGRESS, errno.EALREADY)
    if (code := connection.connect_ex(address)) in under_way:
        code = connection.connect_ex(address)  # on one machine it is known by now how the first call ended
    if code in under_way:
        await asyncio.get_running_loop().sock_connect(connection, address)
    elif code:
        raise OSError(code, os.strerror(code))


async def _read_head(connection: socket.socket) -> tuple[bytes, bytearray]:
    """All up to the blank line, and what came with it."""
    loop, data = asyncio.get_running_loop(), bytearray()
    while True:
        more = await loop.sock_recv(connection, _CHUNK)
        if not more:
            raise ValueError("cut off in its head") if data else ConnectionAbortedError(errno.ECONNABORTED, "cut off")
        begin = max(0, len(data) - len(_END_OF_HEAD))
        data += more
        if not data.startswith(b"HTTP/"[: len(data)]):
            raise ValueError("no HTTP")
        if (end := data.find(_END_OF_HEAD, begin, HEAD_LIMIT)) >= 0:
            end += len(_END_OF_HEAD)
            return bytes(data[:end]), data[end:]
        if len(data) >= HEAD_LIMIT:
            raise ValueError(f"a head of more than {HEAD_LIMIT} bytes")


@dataclass(frozen=True, slots=True)
class _Measured:
    """What nearly all engines answer: a head without surprises, and a body of the length that it says."""

    status: int
    content_type: str
    server: str
    length: int

    def is_whole(self, body: bytearray) -> bool:
        return len(body) >= self.length

    def content(self, body: bytearray | None) -> Answer:
        """Raises http.client.IncompleteRead when it ended too early."""
        if body is not None and not self.is_whole(body):
            raise http.client.IncompleteRead(bytes(body), self.length - len(body))
        return Answer(self.status, self.content_type, self.server, None if body is None else bytes(body[: self.length]))


def _measured(head: bytes) -> _Measured | None:
    """None for whatever is odd in the least: the standard library decides on that."""
    if (seen := _NO_SURPRISE.fullmatch(head)) is None:
        return None
    fields: dict[str, str] = {}
    for line in seen[2].decode("ascii").splitlines():
        name, _, value = line.partition(":")
        if name.lower() in fields or len(fields) == _FIELDS:
            return None
        fields[name.lower()] = value.strip()
    length, status = fields.get("content-length", ""), int(seen[1])
    if not length.isdigit() or len(length) > _DIGITS or "transfer-encoding" in fields or status in (204, 304):
        return None
    return _Measured(status, fields.get("content-type", ""), fields.get("server", ""), int(length))


class _Received:
    """An answer under a parser that believes to read from a socket."""

    def __init__(self, head: bytes) -> None:
        self._file = io.BytesIO(head)
        self._parser = http.client.HTTPResponse(self)  # type: ignore[arg-type]
        self._parser.begin()
        self._next_chunk = 0

    def makefile(self, *_: Any) -> io.BytesIO:
        return self._file

    def is_whole(self, body: bytearray) -> bool:
        """No more has to come. Of what has no length only the end of the connection tells."""
        if not self._parser.chunked:
            return self._parser.length is not None and len(body) >= self._parser.length
        while (line_end := body.find(b"\r\n", self._next_chunk, self._next_chunk + _CHUNK_LINE)) >= 0:
            size = int(body[self._next_chunk : line_end].partition(b";")[0], 16)
            if size <= 0:
                return body.endswith(_END_OF_HEAD)
            self._next_chunk = line_end + 2 + size + 2
        if len(body) - self._next_chunk > _CHUNK_LINE:
            raise ValueError("chunks without a size")
        return False

    def content(self, body: bytearray | None) -> Answer:
        """Raises http.client.HTTPException when it ended too early."""
        if body is not None:
            head_ends = self._file.tell()
            self._file.write(body)
            self._file.seek(head_ends)
        headers = self._parser.headers
        return Answer(
            self._parser.status, headers.get("Content-Type", ""), headers.get("Server", ""),
            None if body is None else self._parser.read(),
        )  # fmt: skip
