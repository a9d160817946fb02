"""Between a download and its server: each answer may be cut, held, changed or replaced, at a chosen byte of its body.

It speaks TLS to the client and plain HTTP to the server, one request on each connection.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from yarl import URL

PIECE_BYTES = 32 << 10
TAKEN_S = 0.03
"""What was sent is with the client by then, for whom it is lost with the connection otherwise."""


@dataclass
class Exchange:
    """One request, and the answer to it."""

    path: str
    start: int
    head: bytes
    _client: asyncio.StreamWriter
    _gone: asyncio.StreamReader
    _server: asyncio.StreamReader
    _ask: asyncio.StreamWriter
    sent: int = 0

    async def ask(self, *without: str) -> bytes:
        """Pass the request on, ``without`` some of its headers; the head of the answer."""
        lines = self.head.split(b"\r\n")
        dropped = tuple(f"{name}:".lower().encode() for name in (*without, "Connection"))
        kept = [line for line in lines[:-2] if not line.lower().startswith(dropped)]
        self._ask.write(b"\r\n".join([*kept, b"Connection: close", b"", b""]))
        return await self._server.readuntil(b"\r\n\r\n")

    async def tell(self, data: bytes) -> None:
        self._client.write(data)
        await self._client.drain()

    async def body(self, most: int | None = None, change: Callable[[bytes, int], bytes] = lambda data, _: data) -> None:
        """Pass the body of the answer on, ``most`` bytes of it."""
        while most is None or self.sent < most:
            data = await self._server.read(PIECE_BYTES if most is None else min(PIECE_BYTES, most - self.sent))
            if not data:
                return
            await self.tell(change(data, self.sent))
            self.sent += len(data)

    async def reset(self) -> None:
        await asyncio.sleep(TAKEN_S)
        found: socket.socket = self._client.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.transport.abort()

    async def until_gone(self) -> None:
        with suppress(ConnectionError):
            await self._gone.read()


Fault = Callable[[Exchange], Awaitable[None]]


@dataclass
class FaultProxy:
    """``faults``: what happens to the next requests for what ``hit`` is the end of, one each; None is nothing."""

    server: URL
    hit: str = ""
    faults: list[Fault | None] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    """Where each request for ``hit`` begins in the file."""
    there: Callable[[], int] | None = None
    """How much of the file is there: each request must begin just behind it, so that nothing is fetched twice or passed over."""
    wrong: list[str] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ask = None
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = URL(head.split(b" ", 2)[1].decode(), encoded=True).path
            found = re.search(rb"\r\nrange: bytes=(\d+)-\r\n", head, re.IGNORECASE)
            server, ask = await asyncio.open_connection(self.server.host, self.server.port)
            one = Exchange(path, int(found[1]) if found else 0, head, writer, reader, server, ask)
            await (self._next(one) or passed)(one)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            for each in (writer, ask):
                if each is not None:
                    each.close()

    def _next(self, one: Exchange) -> Fault | None:
        if not one.path.endswith(self.hit):
            return None
        self.asked.append(one.start)
        if self.there is not None and (there := self.there()) != one.start:
            self.wrong.append(f"asked for from {one.start} on, and {there} bytes are there")
        return self.faults.pop(0) if self.faults else None


@asynccontextmanager
async def fault_proxy(server: str, hit: str, tls: ssl.SSLContext) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(URL(server), hit)
    listening = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, ssl=tls)
    proxy.url = f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        listening.close()


# --- what may go wrong ---


async def passed(one: Exchange) -> None:
    await one.tell(await one.ask())
    await one.body()


def reset_after(count: int) -> Fault:
    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(count)
        await one.reset()

    return fault


def ended_after(count: int) -> Fault:
    """The connection is closed as if all had come."""

    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(count)

    return fault


def flipped_at(offset: int) -> Fault:
    """A bit of the body is another one."""

    def flip(data: bytes, begins: int) -> bytes:
        at = offset - begins
        return data if not 0 <= at < len(data) else data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(change=flip)

    return fault


async def range_ignored(one: Exchange) -> None:
    await one.tell(await one.ask("Range", "If-Range"))
    await one.body()


async def another_version(one: Exchange) -> None:
    """The range that was asked for, of what has another ETag now."""
    head = await one.ask("If-Range")
    head = re.sub(rb"\r\netag: [^\r]*", b"", head, flags=re.IGNORECASE)
    await one.tell(head.replace(b"\r\n\r\n", b'\r\nETag: "another"\r\n\r\n'))
    await one.body()


def held_after(count: int) -> Fault:
    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(count)
        await one.until_gone()

    return fault


def waiting_at(count: int, reached: asyncio.Event, gate: asyncio.Event) -> Fault:
    """The rest comes when the gate is opened."""

    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(count)
        reached.set()
        await gate.wait()
        await one.body()

    return fault


def trickling_after(count: int, every_s: float) -> Fault:
    async def fault(one: Exchange) -> None:
        await one.tell(await one.ask())
        await one.body(count)
        gone = asyncio.ensure_future(one.until_gone())
        while not gone.done():
            await one.body(one.sent + 1)
            await asyncio.wait([gone], timeout=every_s)

    return fault


def answering(head: str, body: bytes = b"") -> Fault:
    """As it stands, whatever was asked."""

    async def fault(one: Exchange) -> None:
        await one.tell(head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body)
        await asyncio.sleep(0)

    return fault


def redirecting(location: str) -> Fault:
    return answering(f"HTTP/1.1 302 Found\nLocation: {location}\nContent-Length: 0")


def refusing(status: int, *headers: str) -> Fault:
    return answering("\n".join([f"HTTP/1.1 {status} No", "Content-Length: 0", *headers]))
