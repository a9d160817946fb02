"""What one worker of a gateway asks the others: what each knows is shown as one gateway's, whoever was asked for it."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import structlog

log = structlog.get_logger("pool_managerd.gateway")
Answers = Mapping[str, Callable[..., Any]]
"""What may be asked, and what answers it, by words that JSON knows; an async one is awaited."""
_ANSWER_S = 1.0
_MAX_QUESTION_BYTES = 64 << 10
_MAX_ANSWER_BYTES = 256 << 20
_PEER = struct.Struct("3i")


def new_name() -> str:
    """Of the sockets of one gateway: nobody else can have taken it."""
    return f"\0pool-managerd-gateway-{secrets.token_hex(16)}"


def socket_of(name: str, number: int) -> socket.socket:
    """On which worker ``number`` is asked."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(_address(name, number))
    listener.listen(64)
    listener.setblocking(False)
    return listener


class Siblings:
    """Of worker ``number``, one of ``of``, which is asked on ``listener``. Without a name there are none."""

    def __init__(self, name: str = "", number: int = 0, of: int = 1, listener: socket.socket | None = None) -> None:
        self._name, self._number, self._of, self._listener = name, number, of, listener
        self._answers: Answers = {}
        self._server: asyncio.Server | None = None

    @property
    def any(self) -> bool:
        return self._of > 1

    async def start(self, answers: Answers) -> None:
        """Be asked, from now on."""
        self._answers = answers
        if self._listener is not None:
            self._server = await asyncio.start_unix_server(self._asked, sock=self._listener, limit=_MAX_QUESTION_BYTES)

    def close(self) -> None:
        """Be asked no more."""
        if self._server is not None:
            self._server.close()
        elif self._listener is not None:
            self._listener.close()

    async def ask(self, what: str, *given: Any) -> list[Any]:
        """What each of the others answers; one that does not, as it has just ended, is left out."""
        others = [number for number in range(self._of) if number != self._number]
        answers = await asyncio.gather(*(self._ask(number, what, given) for number in others), return_exceptions=True)
        for number, answer in zip(others, answers, strict=True):
            if isinstance(answer, Exception):
                log.debug(f"Worker {number} of the gateway does not answer: {answer!r}", action="siblings")
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def _ask(self, number: int, what: str, given: tuple[Any, ...]) -> Any:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_unix_connection(_address(self._name, number))
            try:
                writer.write(json.dumps([what, *given]).encode() + b"\n")
                pieces, size = [], 0
                while piece := await reader.read(1 << 20):
                    pieces.append(piece)
                    size += len(piece)
                    if size > _MAX_ANSWER_BYTES:
                        raise ValueError("too long an answer")
                return json.loads(b"".join(pieces))
            finally:
                writer.close()

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not _is_ours(writer.get_extra_info("socket")):
                return
            async with asyncio.timeout(_ANSWER_S):
                what, *given = json.loads(await reader.readline())
                answer = self._answers[what](*given)
                if asyncio.iscoroutine(answer):
                    answer = await answer
                writer.write(json.dumps(answer).encode())
                await writer.drain()
        except (OSError, ValueError, KeyError, TypeError, TimeoutError) as problem:
            log.debug(f"Another worker's question was not answered: {problem!r}", action="siblings")
        finally:
            with suppress(OSError):
                writer.close()


def _is_ours(connection: Any) -> bool:
    """The other end is of this user, or root: names of this kind have no owner."""
    _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (os.geteuid(), 0)


def _address(name: str, number: int) -> str:
    return f"{name}-{number}"
