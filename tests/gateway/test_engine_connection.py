"""Answers of engines, read as they come: in any pieces the same, in bounds, and odd ones never taken for whole."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool_managerd.gateway.engine_connection import BrokenEngineError, EngineConnection, Question
from pool_managerd.gateway.engine_link import EngineLinks, engine_place
from tests.gateway.lab import served

ASKED = Question(b"POST", b"/v1/x", [(b"A", b"b")], b"{}")


class Wire:
    """A transport that remembers."""

    def __init__(self) -> None:
        self.written, self.reading, self.aborted = b"", True, False

    def writelines(self, lines: list[bytes]) -> None:
        self.written += b"".join(lines)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        self.aborted = True


async def answered(pieces: list[bytes], *, ends: bool = False, question: Question = ASKED) -> tuple[int, bytes, EngineConnection]:
    """What comes of an answer in these pieces; ``ends``: the connection does after them."""
    connection, wire = EngineConnection("http://e", b"e"), Wire()
    connection.connection_made(cast("asyncio.Transport", wire))
    asking = asyncio.create_task(connection.ask(question))
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    if ends:
        connection.connection_lost(None)
    await asking
    body = b""
    while piece := await connection.piece():
        body += piece
    return connection.status, body, connection


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"data: a\n\n", b"x" * 300, b"\r\n0\r\n\r\n")
WHOLE = b"data: a\n\n" + b"x" * 300 + b"\r\n0\r\n\r\n"
MEASURED = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\nX: y\r\n\r\nhello"


@settings(max_examples=200)
@given(st.lists(st.integers(0, len(CHUNKED)), max_size=12), st.sampled_from([CHUNKED, MEASURED]))
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(cuts: list[int], raw: bytes) -> None:
    places = [0, *sorted(cut for cut in cuts if cut <= len(raw)), len(raw)]
    pieces = [raw[begin:end] for begin, end in itertools.pairwise(places) if begin < end]
    status, body, connection = asyncio.run(answered(pieces))
    assert (status, body) == ((200, WHOLE) if raw is CHUNKED else (404, b"hello")) and connection.reusable


@settings(max_examples=200)
@given(st.integers(1, len(CHUNKED) - 1), st.sampled_from([CHUNKED, MEASURED]))
def test_one_that_is_cut_off_is_never_taken_for_whole(at: int, raw: bytes) -> None:
    if at < len(raw):
        with pytest.raises(BrokenEngineError, match=r"in the middle|without an answer"):
            asyncio.run(answered([raw[:at]], ends=True))


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, len(CHUNKED)))
def test_whatever_an_engine_sends_ends_in_an_answer_or_an_error(noise: bytes, at: int) -> None:
    for raw in (noise, CHUNKED[:at] + noise + CHUNKED[at:], MEASURED[:at] + noise):
        try:
            status, _, _ = asyncio.run(asyncio.wait_for(answered([raw], ends=True), 5))
        except BrokenEngineError:
            continue
        assert 200 <= status < 600


async def test_what_came_before_the_break_is_passed_on_first() -> None:
    connection = EngineConnection("http://e", b"e")
    connection.connection_made(cast("asyncio.Transport", Wire()))
    asking = asyncio.create_task(connection.ask(ASKED))
    await asyncio.sleep(0)
    connection.data_received(CHUNKED[:70])
    connection.connection_lost(None)
    await asking
    assert await connection.piece() == b"data: a\n\nxxxx"
    with pytest.raises(BrokenEngineError, match="in the middle"):
        await connection.piece()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 300,
    ],
)
async def test_what_is_no_answer_is_refused_and_its_connection_ends(raw: bytes) -> None:
    for ends in (False, True):  # what it is does not depend on what comes of the connection afterwards
        with pytest.raises(BrokenEngineError, match="no answer"):
            await answered([raw], ends=ends)


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    status, body, connection = await answered([b"HTTP/1.0 200 OK\r\n\r\nab", b"c"], ends=True)
    assert (status, body) == (200, b"abc") and not connection.reusable


async def test_some_answers_have_no_body_and_some_heads_are_not_the_last() -> None:
    assert (await answered([b"HTTP/1.1 100 Continue\r\n\r\n" + MEASURED]))[:2] == (404, b"hello")
    assert (await answered([b"HTTP/1.1 204 No Content\r\n\r\n"]))[:2] == (204, b"")
    head = Question(b"HEAD", b"/", [])
    assert (await answered([b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"], question=head))[:2] == (200, b"")


async def test_what_follows_an_answer_is_nobodys() -> None:
    *_, connection = await answered([MEASURED + b"HTTP/1.1 200 OK\r\n"])
    assert not connection.reusable


async def test_an_engine_is_not_read_faster_than_its_client_takes_it() -> None:
    connection, wire = EngineConnection("http://e", b"e"), Wire()
    connection.connection_made(cast("asyncio.Transport", wire))
    asking = asyncio.create_task(connection.ask(ASKED))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n" + b"x" * 300_000)
    await asking
    paused = wire.reading
    assert len(await connection.piece()) == 300_000 and wire.reading and not paused
    assert wire.written == b"POST /v1/x HTTP/1.1\r\nHost: e\r\nA: b\r\nContent-Length: 2\r\n\r\n{}"


async def test_connections_are_kept_and_one_that_was_closed_meanwhile_is_not_noticed() -> None:
    from aiohttp import web

    peers: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        peers.append(request.transport)
        return web.Response(body=await request.read())

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    async with served(app) as url:
        links = EngineLinks()

        async def ask(body: bytes) -> bytes:
            address, target = engine_place(url + "/base/", "/x")
            assert target == "/base/x"
            found = await links.ask(address, Question(b"POST", target.encode(), [], body))
            try:
                return await found.whole()
            finally:
                found.close()

        assert [await ask(b"1"), await ask(b"2")] == [b"1", b"2"] and peers[0] is peers[1]
        peers[1].abort()
        assert await ask(b"3") == b"3" and peers[2] is not peers[1]
        links.close()
    with pytest.raises(BrokenEngineError, match="cannot reach the engine: "):
        await links.ask(url, ASKED)
