"""One connection to an engine, with one question at a time on it: its answer is read piece by piece as it comes.

Of a connection that breaks, everything that came before is passed on first. Whatever an engine sends is bounded and checked; what
is odd ends the connection, so that no answer is ever taken for another one's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pool_managerd.errors import EngineError

_MAX_HEAD = 64 << 10
_MAX_LINE = 256
_MAX_BUFFERED = 256 << 10
_END_OF_HEAD = b"\r\n\r\n"
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\r\n]*)?")
_ODD = re.compile(rb"\x00|\r(?!\n)|(?<!\r)\n")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})[ \t]*(?:;[^\r\n]*)?")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_WITHOUT_BODY = frozenset({204, 304})
_MIDDLE = "the engine ended in the middle of its answer"
_WITHOUT = "the engine closed the connection without an answer"
Headers = Sequence[tuple[bytes, bytes]]


class BrokenEngineError(EngineError):
    """The engine cannot be reached, ended, or sent what is no answer."""

    code = "ENGINE_GONE"
    status = 502
    retriable = True


class OddEngineError(BrokenEngineError):
    """It is there, and what it sent is no answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """``target`` is the path with its query; ``headers`` without Host and Content-Length."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes | None = None


class EngineConnection(asyncio.Protocol):
    """One question at a time."""

    def __init__(self, url: str, host: bytes) -> None:
        self.url, self._host = url, host
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self._renew(head_only=False)

    def _renew(self, *, head_only: bool) -> None:
        """For the next answer."""
        self.status, self.headers = 0, list[tuple[bytes, bytes]]()
        self.length: int | None = None
        self._head_only, self._keeps = head_only, True
        self._rest = b""
        self._left, self._chunked, self._between, self._trailer = 0, False, False, False
        self._whole = False
        self.heard = False
        self._error: BrokenEngineError | None = None

    @property
    def ended(self) -> bool:
        """All of its answer was taken."""
        return self._whole and not self._pieces

    @property
    def reusable(self) -> bool:
        """Its answer was read to the end, and it may have another question."""
        return self.ended and self._keeps and not self.closed and not self._rest

    # --- for whoever asks ---

    async def ask(self, question: Question) -> None:
        """Returns when the head of the answer is there. Raises BrokenEngineError."""
        self._renew(head_only=question.method == b"HEAD")
        if self._transport is None or self.closed:
            raise BrokenEngineError(_WITHOUT)
        lines = [b"%s %s HTTP/1.1\r\nHost: %s\r\n" % (question.method, question.target, self._host)]
        lines += [b"%s: %s\r\n" % header for header in question.headers]
        if question.body is not None:
            lines.append(b"Content-Length: %d\r\n" % len(question.body))
        lines.append(b"\r\n")
        if question.body is not None:
            lines.append(question.body)
        self._transport.writelines(lines)
        while not self.status:
            await self._news()

    async def piece(self) -> bytes:
        """What has come since, at least a byte; empty at the end. Raises BrokenEngineError."""
        while not self._pieces and not self._whole:
            await self._news()
        pieces, self._pieces, self._buffered = self._pieces, [], 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _news(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def abort(self) -> None:
        """At once: what it works on is wanted no more."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # --- from the loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            if self._whole:
                raise ValueError("more than an answer")
            self._parse(data)
        except ValueError as problem:
            self._error = self._error or OddEngineError(f"the engine sent what is no answer: {problem}")
            self.abort()
        self._wake()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._error is None and self.status and self.length is None and not self._chunked:
            self._whole = True  # the end of the connection is that of the answer
        elif not self._whole:
            self._fail(_MIDDLE if self.status else _WITHOUT)
        self._wake()

    def _fail(self, why: str) -> None:
        self._error = self._error or BrokenEngineError(why)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- reading ---

    def _parse(self, data: bytes) -> None:
        """Raises ValueError for what is no answer."""
        if self._rest:
            data, self._rest = self._rest + data, b""
        while not self.status:
            end = data.find(_END_OF_HEAD)
            if end < 0:
                if len(data) > _MAX_HEAD:
                    raise ValueError(f"a head of more than {_MAX_HEAD} bytes")
                self._rest = data
                return
            self._read_head(data[:end])
            data = data[end + 4 :]
        if self._whole:
            self._rest = data
        elif self._chunked:
            self._read_chunks(data)
        elif self.length is None:
            self._keep(data)
        else:
            self._keep(data[: self._left])
            self._rest = data[self._left :]
            self._left -= len(data) - len(self._rest)
            self._whole = self._left == 0
        if self._buffered > _MAX_BUFFERED and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _keep(self, data: bytes) -> None:
        if data:
            self._pieces.append(data)
            self._buffered += len(data)

    def _read_head(self, head: bytes) -> None:
        """Of an informational answer nothing is kept: the real one follows."""
        if _ODD.search(head) is not None:
            raise ValueError("a header with an end of line in it")
        first, *lines = head.split(b"\r\n")
        line = _STATUS.fullmatch(first)
        if line is None:
            raise ValueError("no HTTP")
        status, headers = int(line[2]), []
        for text in lines:
            name, colon, value = text.partition(b":")
            if not colon or _NAME.fullmatch(name) is None:
                raise ValueError("a header without a name")
            headers.append((name, value.strip(b" \t")))
        if status >= 200:
            self.headers = headers
            self._frame(status, version=line[1])
            self.status = status

    def _frame(self, status: int, version: bytes) -> None:
        """How long its body is, and whether the connection lives on."""
        found: dict[bytes, set[bytes]] = {}
        for name, value in self.headers:
            found.setdefault(name.lower(), set()).add(value)
        tokens = b",".join(found.get(b"connection", ())).lower()
        self._keeps = b"close" not in tokens and (version == b"1" or b"keep-alive" in tokens)
        lengths, coding = found.get(b"content-length", set()), b",".join(found.get(b"transfer-encoding", ())).lower()
        if self._head_only or status in _WITHOUT_BODY:
            self.length, self._whole = 0, True
        elif coding:
            if coding.strip() != b"chunked" or lengths:
                raise ValueError("a body whose end cannot be told")
            self._chunked = True
        elif lengths:
            (length,) = lengths if len(lengths) == 1 else (b"",)
            if _LENGTH.fullmatch(length) is None:
                raise ValueError("a Content-Length that is none")
            self.length = self._left = int(length)
            self._whole = self._left == 0
        else:
            self._keeps = False

    def _read_chunks(self, data: bytes) -> None:
        at, size = 0, len(data)
        pieces = []
        while at < size and not self._whole:
            if self._left:
                pieces.append(data[at : at + self._left])
                at += len(pieces[-1])
                self._left -= len(pieces[-1])
                self._between = not self._left
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > _MAX_LINE:
                    raise ValueError("a chunk without a size")
                break
            line, at = data[at:end], end + 2
            if self._between:
                if line:
                    raise ValueError("a chunk that is longer than its size")
                self._between = False
            elif self._trailer:
                self._whole = not line
            else:
                number = _SIZE.fullmatch(line)
                if number is None:
                    raise ValueError("a chunk without a size")
                self._left = int(number[1], 16)
                self._trailer = not self._left
        self._rest = data[at:]
        self._keep(pieces[0] if len(pieces) == 1 else b"".join(pieces))
