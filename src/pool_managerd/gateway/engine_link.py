"""Engines by their URLs: questions to them over connections that are kept."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from functools import lru_cache
from time import monotonic
from urllib.parse import urlsplit

from pool_managerd.gateway.engine_connection import BrokenEngineError, EngineConnection, Question

_CONNECT_S = 5.0
_IDLE_S = 3.0
"""A connection is not used again after it: llama.cpp and uvicorn close theirs after 5 s."""


@lru_cache(maxsize=1024)
def _parts(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")


def engine_place(url: str, target: str) -> tuple[str, str]:
    """Whom to ask for what: the engine's address, and the path below its base URL."""
    address, base = _parts(url)
    return address, base + target


class EngineAnswer:
    """The head of an answer, and its body piece by piece. ``close`` it in any case."""

    def __init__(self, connection: EngineConnection, links: EngineLinks) -> None:
        self._connection, self._links = connection, links
        self.status, self.headers = connection.status, connection.headers

    def header(self, name: bytes) -> bytes:
        """The first of that lower-case name; empty where there is none."""
        return next((value for given, value in self.headers if given.lower() == name), b"")

    @property
    def length(self) -> int | None:
        """Of the whole body, where it is known in advance."""
        return self._connection.length

    @property
    def ended(self) -> bool:
        """There will be no further piece."""
        return self._connection.ended

    async def piece(self) -> bytes:
        """What has come since, at least a byte; empty at the end. Raises BrokenEngineError."""
        return await self._connection.piece()

    async def whole(self) -> bytes:
        """All of it. Raises BrokenEngineError."""
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """The connection is used again where the answer was read to its end; else it ends, and the engine's work with it."""
        self._links.take_back(self._connection)


class EngineLinks:
    """Connections to engines, by address."""

    def __init__(self) -> None:
        self._idle: dict[str, deque[tuple[EngineConnection, float]]] = {}
        self._tls: ssl.SSLContext | None = None

    async def ask(self, url: str, question: Question) -> EngineAnswer:
        """``question`` to the engine whose base URL is ``url``; its answer, once its head is there. Raises BrokenEngineError.

        An engine may close a kept connection just as it is used: the question is sent once more then, over a new one.
        """
        kept = self._kept(url)
        if kept is not None:
            try:
                return await self._asked(kept, question)
            except BrokenEngineError:
                if kept.heard:
                    raise
        return await self._asked(await self._connect(url), question)

    async def _asked(self, connection: EngineConnection, question: Question) -> EngineAnswer:
        try:
            await connection.ask(question)
        except BaseException:
            connection.abort()
            raise
        return EngineAnswer(connection, self)

    def take_back(self, connection: EngineConnection) -> None:
        """It is kept for the next question where it can be."""
        if not connection.reusable:
            connection.abort()
            return
        self._idle.setdefault(connection.url, deque()).append((connection, monotonic()))

    def close(self) -> None:
        """Those that are kept end."""
        for kept in self._idle.values():
            for connection, _ in kept:
                connection.abort()
        self._idle.clear()

    def _kept(self, url: str) -> EngineConnection | None:
        """The one that was used last; those that were idle for too long end."""
        kept, now = self._idle.get(url), monotonic()
        while kept and (kept[0][0].closed or now - kept[0][1] > _IDLE_S):
            kept.popleft()[0].abort()
        while kept:
            connection, _ = kept.pop()
            if not connection.closed:
                return connection
        self._idle.pop(url, None)
        return None

    async def _connect(self, url: str) -> EngineConnection:
        parts = urlsplit(url)
        tls = self._context() if parts.scheme == "https" else None
        port = parts.port or (80 if tls is None else 443)
        try:
            async with asyncio.timeout(_CONNECT_S):
                _, made = await asyncio.get_running_loop().create_connection(
                    lambda: EngineConnection(url, parts.netloc.rpartition("@")[2].encode()), parts.hostname or "", port, ssl=tls
                )
        except TimeoutError:
            raise BrokenEngineError(f"cannot reach the engine within {_CONNECT_S:g} s") from None
        except OSError as problem:
            raise BrokenEngineError(f"cannot reach the engine: {problem.strerror or problem}") from problem
        return made

    def _context(self) -> ssl.SSLContext:
        self._tls = self._tls or ssl.create_default_context()
        return self._tls
