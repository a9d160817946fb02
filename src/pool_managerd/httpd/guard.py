"""Connections under limits: how many there are, and how long one may take to send a request's head."""

from __future__ import annotations

import asyncio
import fcntl
import termios
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from pool_managerd.httpd.peers import is_loopback, uid_of_peer

MAX_STUCK = 64
CROWDED_TIMEOUT_S = 2.0
LEAST_TAKEN = 4096
_REFUSAL_BODY = (
    b'{"code":"TOO_MANY_CONNECTIONS","message":"cannot take another connection","error":"cannot take another connection",'
    b'"retriable":true,"retry_after_ms":1000,"correlation_id":"-"}'
)
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: " + str(len(_REFUSAL_BODY)).encode() + b"\r\n\r\n" + _REFUSAL_BODY
)


class Connections:
    """The connections of one listening socket.

    At ``limit`` the one idle for longest makes room; when all of them work, the new one is refused.

    The head of a request must be complete ``head_timeout`` seconds after its first byte (and after connecting);
    a client that dribbles is cut off (slowloris). So is one that takes next to nothing of its answer (``LEAST_TAKEN`` bytes)
    in ``write_timeout`` seconds, and sooner where many do.
    """

    def __init__(self, protocol: Callable[[], asyncio.Protocol], limit: int, head_timeout: float, write_timeout: float) -> None:
        self._protocol = protocol
        self.limit = limit
        self.head_timeout = head_timeout
        self.write_timeout = write_timeout
        self.open: set[GuardedConnection] = set()
        self.idle: dict[GuardedConnection, None] = {}  # oldest first
        self.stuck: dict[GuardedConnection, tuple[float, int]] = {}  # since when, and what was to be sent then; oldest first
        self._sweeper: asyncio.TimerHandle | None = None
        self.ended = asyncio.Event()
        """Set when a request has ended."""

    def __call__(self) -> asyncio.Protocol:
        return GuardedConnection(self, self._protocol)

    def start(self) -> None:
        """Begin to look for clients that take too long. To be called in the loop; ``stop`` ends it."""
        self._sweeper = asyncio.get_running_loop().call_later(self.head_timeout / 10, self._sweep)

    async def settled(self, seconds: float) -> bool:
        """Whether no request is at work any more, after this time at the latest."""
        try:
            async with asyncio.timeout(seconds):
                while self.open - self.idle.keys():
                    self.ended.clear()
                    await self.ended.wait()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """Those that are at work."""
        for connection in self.open - self.idle.keys():
            connection.abort()

    def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def admit(self) -> bool:
        """Whether one more connection may stay, after an idle one made room if need be."""
        if len(self.open) < self.limit:
            return True
        if not self.idle:
            return False
        next(iter(self.idle)).abort()
        return True

    def stops_reading(self, connection: GuardedConnection) -> None:
        """The peer takes no more for now: what it was to be sent is kept for it, but not for long."""
        self.stuck[connection] = asyncio.get_running_loop().time(), connection.unsent()
        self._cut_off_stuck()

    def _cut_off_stuck(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection, (since, before) in list(self.stuck.items()):
            crowded = len(self.stuck) > MAX_STUCK and now - since > CROWDED_TIMEOUT_S
            if not crowded and now - since < self.write_timeout:
                break
            unsent = connection.unsent()
            if before - unsent < LEAST_TAKEN * min(1.0, (now - since) / self.write_timeout):
                connection.abort()
            else:
                del self.stuck[connection]
                self.stuck[connection] = now, unsent

    def _sweep(self) -> None:
        limit = asyncio.get_running_loop().time() - self.head_timeout
        for connection in [c for c in self.open if 0 < c.head_since < limit]:
            connection.abort()
        self._cut_off_stuck()
        self.start()


@contextmanager
def at_work(transport: asyncio.BaseTransport | None) -> Iterator[GuardedConnection | None]:
    """A request whose head is complete is being answered: its connection, which is not idle meanwhile; None: not guarded."""
    connection = guarded(transport)
    if connection is not None:
        connection.request_begins()
    try:
        yield connection
    finally:
        if connection is not None:
            connection.request_ends()


def guarded(transport: asyncio.BaseTransport | None) -> GuardedConnection | None:
    """The connection that ``transport`` is of; None: of none that is guarded."""
    protocol = transport.get_protocol() if isinstance(transport, asyncio.Transport) else None
    return protocol if isinstance(protocol, GuardedConnection) else None


class GuardedConnection(asyncio.Protocol):
    """One connection: passes everything on to the HTTP protocol and keeps the time.

    The protocol is made when the first byte comes: ten thousand connections that say nothing cost next to nothing.
    """

    def __init__(self, owner: Connections, protocol: Callable[[], asyncio.Protocol]) -> None:
        self._owner = owner
        self._protocol = protocol
        self._inner: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._refused = False
        self.head_since = 0.0  # loop time at which the head that is being received began; 0 = none is
        self.peer_is_loopback = False
        self._uid: int | None = None
        self._uid_asked = False

    def peer_uid(self) -> int | None:
        """The user at the other end, asked once per connection; None when that is not known."""
        if not self._uid_asked and self._transport is not None:
            self._uid_asked = True
            if self.peer_is_loopback:
                self._uid = uid_of_peer(self._transport.get_extra_info("socket"))
        return self._uid

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._owner.admit():
            self._refused = True
            self._transport.write(_REFUSAL)
            self._transport.close()
            return
        self._owner.open.add(self)
        self._owner.idle[self] = None
        self.head_since = self._loop.time()
        peer: Any = transport.get_extra_info("peername")
        self.peer_is_loopback = isinstance(peer, tuple) and is_loopback(str(peer[0]))
        if (under := _under_tls(transport)) is not None:
            self._transport.set_write_buffer_limits(*under.get_write_buffer_limits()[::-1])

    def request_begins(self) -> None:
        """The head is complete and a handler runs."""
        self.head_since = 0.0
        self._owner.idle.pop(self, None)

    def request_ends(self) -> None:
        self._owner.ended.set()
        if self in self._owner.open:
            self._owner.idle[self] = None

    def unsent(self) -> int:
        """Bytes that the peer has not taken: those kept here, and those that the kernel keeps."""
        if self._transport is None:
            return 0
        kept = array("i", [0])
        with suppress(OSError, ValueError):  # it has just ended
            fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, kept)
        under = _under_tls(self._transport)
        return self._transport.get_write_buffer_size() + (0 if under is None else under.get_write_buffer_size()) + kept[0]

    def abort(self) -> None:
        """Close at once, without waiting for what is still to be sent."""
        self._forget()
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self.head_since == 0.0 and self in self._owner.idle:
            self.head_since = self._loop.time()
        if self._inner is None and self._transport is not None:
            self._inner = self._protocol()
            self._inner.connection_made(self._transport)
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._owner.stops_reading(self)
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._owner.stuck.pop(self, None)
            self._inner.resume_writing()

    def _forget(self) -> None:
        self._owner.ended.set()
        self._owner.stuck.pop(self, None)
        self._owner.open.discard(self)
        self._owner.idle.pop(self, None)


def _under_tls(transport: asyncio.BaseTransport) -> asyncio.WriteTransport | None:
    """What carries a TLS connection, and has bytes of its own to send, which asyncio does not tell; None: it is none."""
    found = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return found if isinstance(found, asyncio.WriteTransport) else None
