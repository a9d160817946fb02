"""Engines that answer oddly, late or not at all, and what comes of that for their clients."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import pytest

from pool_managerd.gateway.exchange import Exchange
from tests.gateway.lab import CHUNK, Lab, lab

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
ALIVE = b": still here\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n%s\r\n"
Script = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@asynccontextmanager
async def engine(script: Script) -> AsyncIterator[str]:
    """Hands each request's head to ``script``, and closes the connection behind it."""

    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await script(await reader.readuntil(b"\r\n\r\n"), writer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def behind(script: Script, **row: Any) -> AsyncIterator[Lab]:
    """A gateway before such an engine."""
    async with engine(script) as url, lab(**row) as made:
        made.node.pool("m", url, epoch=2, **row)
        await made.node.tell()
        await made.until(lambda: made.gateway.leasing.directory.open_launches() == {"m": 2}, "the gateway to know it")
        yield made


async def alive(one: Lab, other: Lab, times: int) -> None:
    """Returns when a stream that began now has seen so many signs of life."""
    other.engine.step = asyncio.Semaphore(0)
    async with other.session.post(other.url + "/v1/chat/completions", json=STREAM) as answer:
        for _ in range(times):
            assert await answer.content.readexactly(len(ALIVE)) == ALIVE


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: a\nSet-Cookie: b=c\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX: a\rb\r\n\r\ndata: x\n\n",
    ],
)
async def test_what_is_no_answer_is_an_error_and_never_an_empty_one(raw: bytes) -> None:
    async def script(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    async with behind(script) as one:
        status, answer = await one.ask(CHAT)
        assert status == 502 and "the engine sent what is no answer" in answer["error"]["message"]
        assert "the engine sent what is no answer" in await one.text(STREAM)


@pytest.mark.parametrize("kind", [b"audio/mpeg", b"application/json"])
async def test_signs_of_life_are_put_into_streams_of_events_alone(kind: bytes) -> None:
    goes_on = asyncio.Event()

    async def script(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD % (kind, b"") + chunk(b"first\n\n"))
        await goes_on.wait()
        writer.write(chunk(b"last") + b"0\r\n\r\n")

    async with behind(script) as one, lab() as other, one.session.post(one.url + "/v1/audio/speech", json=STREAM) as answer:
        assert await answer.content.readexactly(7) == b"first\n\n"
        await alive(one, other, 3)
        goes_on.set()
        assert await answer.read() == b"last" and answer.headers["Content-Type"] == kind.decode()


async def test_a_late_error_of_an_engine_keeps_its_status() -> None:
    goes_on = asyncio.Event()

    async def script(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        await goes_on.wait()
        writer.write(chunk(b'{"error": "busy"}') + b"0\r\n\r\n")

    async with behind(script) as one, lab() as other:
        asking = asyncio.create_task(one.ask(STREAM))
        await one.until(one.gateway.leasing.used, "it to be asked")
        await alive(one, other, 3)
        goes_on.set()
        assert await asking == (503, {"error": "busy"})


async def test_a_stream_is_not_asked_for_in_a_coding_that_nothing_can_be_put_into() -> None:
    heads: list[bytes] = []

    async def script(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head.lower())
        body = gzip.compress(CHUNK)
        writer.write(HEAD % (b"text/event-stream", b"Content-Encoding: gzip\r\n") + chunk(body) + b"0\r\n\r\n")

    async with behind(script) as one:
        assert await one.text(STREAM) == CHUNK.decode(), "one that does it all the same is passed on as it is"
        assert await one.text(CHAT) == CHUNK.decode()
    assert b"accept-encoding" not in heads[0] and b"accept-encoding" in heads[1]


@pytest.mark.parametrize(("status", "said"), [(b"200 OK", False), (b"400 Bad", True)])
async def test_what_an_engine_says_instead_of_a_stream_is_for_the_client_alone(status: bytes, said: bool) -> None:
    goes_on = asyncio.Event()

    async def script(_head: bytes, writer: asyncio.StreamWriter) -> None:
        await goes_on.wait()
        body = b'{"secret": "of the prompt"}'
        writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)

    async with behind(script) as one, one.session.post(one.url + "/v1/chat/completions", json=STREAM) as answer:
        assert await answer.content.readexactly(len(ALIVE)) == ALIVE
        goes_on.set()
        text = (await answer.read()).decode()
        async with one.session.get(one.url + "/v1/requests") as rows:
            kept = await rows.text()
    assert "the engine answered" in text and ("of the prompt" in text) is said
    assert "of the prompt" not in kept and "the engine answered" in kept


async def test_another_pool_of_the_name_serves_while_one_is_broken() -> None:
    async def script(_head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with engine(script) as broken, lab(names=["m", "both"]) as one:
        one.node.pool("a", broken, names=["a", "both"])
        await one.node.tell()
        await one.until(lambda: one.gateway.leasing.directory.place("a"), "the gateway to know both")
        for _ in range(6):
            assert (await one.ask({**CHAT, "model": "both"}))[0] == 200
        assert (await one.ask({**CHAT, "model": "a"}))[0] == 502, "whoever names it is told"


async def test_an_engine_that_is_away_keeps_no_other_model_waiting(one_of_many: Lab) -> None:
    one = one_of_many
    waiting = [asyncio.create_task(one.text({**CHAT, "model": f"away{number % 6}"})) for number in range(400)]
    await one.until(lambda: one.node.waits >= 6 * 16, "all of them to wait")
    assert (await one.ask(CHAT))[0] == 200
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.fixture
async def one_of_many() -> AsyncIterator[Lab]:
    async with lab() as made:
        made.session._connector._limit = 0  # type: ignore[union-attr]
        for number in range(6):
            made.node.pool(f"away{number}", "http://127.0.0.1:1", ready=False, loading=True)
        await made.node.tell()
        await made.until(lambda: made.gateway.leasing.directory.place("away5"), "the gateway to know all")
        yield made


async def test_watchers_do_not_keep_a_gateway_from_ending() -> None:
    async with aiohttp.ClientSession() as session:
        async with lab() as one:
            answer = await session.get(one.url + "/api/events")
            assert (await answer.content.readline()).startswith(b"event: message")
            began = asyncio.get_running_loop().time()
        rest = await answer.read()
    assert rest.endswith(b"\n\n") and asyncio.get_running_loop().time() - began < 5, "its end is one of its own"


async def test_a_silent_engine_is_not_covered_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "patience_s", 0.12)
    async with lab() as one, lab() as other:
        one.engine.step = asyncio.Semaphore(0)
        async with one.session.post(one.url + "/v1/chat/completions", json=STREAM) as answer:
            assert await answer.content.readexactly(len(ALIVE)) == ALIVE
            for _ in range(4):
                await alive(one, other, 2)
            for _ in range(3):
                one.engine.step.release()
            text = await answer.content.readuntil(CHUNK)
            assert text.count(ALIVE) <= 2
