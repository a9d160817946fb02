"""One aiohttp application on listening sockets: connections under limits, and our shape of errors for what is no request."""

from __future__ import annotations

import asyncio
import functools
import logging
import resource
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_protocol import RequestHandler

from pool_managerd.config import split_address
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.httpd.guard import Connections

_BACKLOG = 4096
_WRITES_S = 1.0
"""For the answers of requests that are over."""
_ACCEPTS_AT_ONCE = 64
"""Few: what was accepted is read before so many follow that it would have to make room for them."""
Refusal = Callable[[PoolError], web.Response]
"""How an error is told to a client that sent no request."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """``shutdown_s`` bounds how long running requests may finish, ``write_timeout_s`` how long a reader may take nothing.
    ``descriptors`` are what this process needs for each connection: there are no more of these than that allows.
    """

    max_connections: int = 1024
    head_timeout_s: float = 10.0
    keepalive_s: float = 75.0
    shutdown_s: float = 2.0
    write_timeout_s: float = 30.0
    descriptors: int = 2


class HttpServer:
    """Serves ``app`` on sockets that are already listening; with ``tls`` to clients that speak it alone."""

    def __init__(self, app: web.Application, limits: HttpLimits, refusal: Refusal, tls: ssl.SSLContext | None = None) -> None:
        self._limits, self._refusal, self._tls = limits, refusal, tls
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, keepalive_timeout=limits.keepalive_s,
            shutdown_timeout=_WRITES_S, auto_decompress=False, logger=_protocol_log(),
        )  # fmt: skip
        self._server: asyncio.Server | None = None
        self._guard: Connections | None = None

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return 0 if self._guard is None else len(self._guard.open)

    async def start(self, listener: socket.socket) -> None:
        """Begin to answer on ``listener``."""
        await self._runner.setup()
        server = self._runner.server
        if server is None:  # pragma: no cover - setup() made it
            raise NodeError("cannot serve HTTP: the server is gone")
        protocol = functools.partial(_HttpProtocol.of, server, self._refusal)
        limits = self._limits
        guard = Connections(protocol, _possible(limits), limits.head_timeout_s, limits.write_timeout_s)
        self._server = await asyncio.get_running_loop().create_server(
            guard, sock=listener, backlog=_ACCEPTS_AT_ONCE, ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else limits.head_timeout_s,
            ssl_shutdown_timeout=None if self._tls is None else _WRITES_S,
        )  # fmt: skip
        listener.listen(_BACKLOG)  # asyncio takes one number for what waits in the kernel and for what it accepts in one go
        self._guard = guard
        guard.start()

    def stop_listening(self) -> None:
        """Nobody new comes in; what is open goes on."""
        if self._server is not None:
            self._server.close()

    async def close(self, at_last: Callable[[], None] = lambda: None) -> None:
        """Stop listening, give running requests a moment, close every connection. ``at_last`` tells those that take longer."""
        self.stop_listening()
        if self._guard is not None:
            self._guard.stop()
            if not await self._guard.settled(self._limits.shutdown_s):
                at_last()
                await self._guard.settled(_WRITES_S)
            self._guard.cut_off()
        await self._runner.cleanup()
        for connection in () if self._guard is None else list(self._guard.open):
            connection.abort()


def listen_together(address: str, number: int) -> list[socket.socket]:
    """So many sockets on HOST:PORT, among which the kernel spreads connections: the first one listens, the others do as soon as
    somebody serves them. Raises NodeError as ``listen``, and where anybody else listens there.
    """
    first = listen(address)
    if number > 1:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # only now: nobody else may have had the port before
    same = f"{address.rpartition(':')[0]}:{first.getsockname()[1]}"
    return [first, *(listen(same, beside=True) for _ in range(number - 1))]


def listen(address: str, *, beside: bool = False) -> socket.socket:
    """A listening socket on HOST:PORT; ``beside`` another one that is there, one that does not listen yet. Raises NodeError when
    it cannot be had (the port is taken, no such address).
    """
    host, port = split_address(address)
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, proto)
    except OSError as error:
        raise NodeError(f"cannot listen on {address}: {error.strerror or error}", hint="choose another --bind") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(beside))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        if not beside:
            listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        hint = (
            "another program has this port: stop it, or choose another with --bind HOST:PORT"
            if error.errno == 98
            else "choose another --bind"
        )
        raise NodeError(f"cannot listen on {address}: {error.strerror}", hint=hint) from error
    return listener


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """Where clients reach it."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _HttpProtocol(RequestHandler):
    """aiohttp's, with our shape of errors for what never becomes a request."""

    _refusal: Refusal

    @classmethod
    def of(cls, server: web.Server, refusal: Refusal) -> _HttpProtocol:
        made = cls(server, loop=asyncio.get_running_loop(), **server._kwargs)
        made._refusal = refusal
        return made

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to bytes that are no request, and to what no handler caught; the connection ends with it."""
        if status >= 500 or request.writer.output_size > 0:
            super().handle_error(request, status, exc, message)
        why = "cannot read the request: it is not valid HTTP" if status < 500 else "cannot serve the request"
        response = self._refusal(PoolError(why, code="INVALID_PARAMS" if status < 500 else "INTERNAL", status=status))
        response.headers["Server"] = "pool-managerd"
        response.force_close()
        return response


class _NotOurTrouble(logging.Filter):
    """Drops the traceback for bytes that are no HTTP request: the sender gets a 400, but the log is not his to fill."""

    def filter(self, record: logging.LogRecord) -> bool:
        problem = record.exc_info[1] if record.exc_info else None
        return not isinstance(problem, HttpProcessingError)


def _protocol_log() -> logging.Logger:
    log = logging.getLogger("pool_managerd.http")
    if not any(isinstance(known, _NotOurTrouble) for known in log.filters):
        log.addFilter(_NotOurTrouble())
    return log


def _possible(limits: HttpLimits) -> int:
    """Engines, logs and databases need descriptors too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.max_connections
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft // limits.descriptors))
