"""A GET of our own against a real socket: the same answers as the standard library's client, however they are cut up."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.supervision import plain_http
from pool_managerd.supervision.plain_http import Answer, target

LIMIT = 4096


async def ask(pieces: list[bytes], *, stays_open: bool = False) -> Answer:
    """What is made of an answer that comes in ``pieces``."""
    asked, over = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)  # so that the other end reads it alone, as a rule
        if stays_open:
            await asked.wait()
        writer.close()
        over.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        to = target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/health")
        assert to is not None
        async with asyncio.timeout(10):
            return await plain_http.get(to, LIMIT)
    finally:
        asked.set()
        server.close()
        async with asyncio.timeout(10):
            await over.wait()


class Whole:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any) -> io.BytesIO:
        return io.BytesIO(self.data)


def by_the_standard_library(data: bytes) -> bytes:
    response = http.client.HTTPResponse(Whole(data))  # type: ignore[arg-type]
    response.begin()
    return response.read()


def chunked(parts: list[bytes], trailer: bytes) -> bytes:
    chunks = b"".join(b"%X;x=y\r\n%s\r\n" % (len(part), part) for part in parts if part)
    return b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailer + b"\r\n"


PARTS = st.lists(st.binary(max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=6)


@given(PARTS, st.sampled_from(["length", "chunks", "trailer", "end"]), st.lists(st.integers(0, 400), max_size=6), st.booleans())
def test_an_answer_is_the_same_however_it_is_framed_and_cut_up(
    parts: list[bytes], framing: str, cuts: list[int], stays_open: bool
) -> None:
    body = b"".join(parts)
    rest = {
        "length": b"Content-Length: %d\r\n\r\n" % len(body) + body,
        "chunks": chunked(parts, b""),
        "trailer": chunked(parts, b"X-Sum: 1\r\n"),
        "end": b"\r\n" + body,
    }[framing]
    data = b"HTTP/1.1 200 OK\r\nServer: e\r\nContent-Type: a/b\r\n" + rest
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(edges)]
    answer = asyncio.run(ask(pieces, stays_open=stays_open and framing != "end"))  # no answer is waited for longer than needed
    assert answer == Answer(200, "a/b", "e", body)
    assert by_the_standard_library(data) == body


NAMES = st.sampled_from(
    [b"Server", b"server", b"Content-Type", b"CONTENT-LENGTH", b"Content-Length", b"X-A", b"Transfer-Encoding"]
)
VALUES = st.sampled_from([b"3", b"03", b"-1", b"3, 3", b"a/b; c=d", b"identity", b"", b"a  b"]) | st.binary(max_size=6).filter(
    lambda value: b"\n" not in value and b"\r" not in value
)
HEADS = st.builds(
    lambda line, fields: line + b"\r\n" + b"".join(b"%s:%s%s\r\n" % field for field in fields) + b"\r\n",
    st.sampled_from(
        [b"HTTP/1.1 200 OK", b"HTTP/1.1 503 ", b"HTTP/1.1 204 No Content", b"HTTP/1.0 200 OK", b"HTTP/1.1 100 Continue"]
    ),
    st.lists(st.tuples(NAMES, st.sampled_from([b"", b" ", b"  ", b"\t"]), VALUES), max_size=5),
)


@given(HEADS, st.integers(0, 5))
def test_a_head_without_surprises_means_what_the_standard_library_makes_of_it(head: bytes, length: int) -> None:
    quick = plain_http._measured(head)
    if quick is None:
        return
    body = bytearray(b"x" * length)
    outcomes: list[tuple[bool, object]] = []
    for answer in (quick, plain_http._Received(head)):
        try:
            outcomes.append((answer.is_whole(body), answer.content(body)))
        except http.client.HTTPException as problem:
            outcomes.append((answer.is_whole(body), type(problem)))
    assert outcomes[0] == outcomes[1]


def test_what_engines_answer_is_a_head_without_surprises() -> None:
    llamacpp = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Type: application/json; charset=utf-8\r\nServer: llama.cpp\r\n\r\n"
    )
    vllm = b"HTTP/1.1 200 OK\r\ndate: Thu, 26 Nov 2026 10:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: 0\r\n\r\n"
    assert plain_http._measured(llamacpp) and plain_http._measured(vllm)


@pytest.mark.parametrize("rest", [b"Content-Length: 9000\r\n\r\n", b"\r\n", b"Transfer-Encoding: chunked\r\n\r\n2000\r\n"])
async def test_more_than_the_limit_is_not_read(rest: bytes) -> None:
    answer = await ask([b"HTTP/1.1 200 OK\r\n" + rest, *[b"a" * 1000] * 8], stays_open=True)
    assert (answer.status, answer.body) == (200, None)


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"H",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 600,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * plain_http.HEAD_LIMIT,
    ],
)
async def test_what_is_no_whole_answer_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        await ask([data])


async def test_a_program_that_speaks_first_and_waits_is_known_for_no_engine_at_once() -> None:
    with pytest.raises(ValueError, match="no HTTP"):
        await ask([b"SSH-2.0-OpenSSH_9.2\r\n"], stays_open=True)


async def test_a_connection_that_ends_without_a_byte_was_cut_off() -> None:
    with pytest.raises(ConnectionAbortedError):
        await ask([])


async def test_the_request_names_host_and_path_and_asks_for_nothing_to_be_kept() -> None:
    to = target("http://[::1]:8080/v2/health/ready?a=b")
    assert to is not None
    assert to.address == ("::1", 8080)
    assert to.request.split(b"\r\n") == [
        b"GET /v2/health/ready?a=b HTTP/1.1", b"Host: [::1]:8080", b"Accept: */*", b"Connection: close", b"", b"",
    ]  # fmt: skip
    short = target("http://127.0.0.1")
    assert short is not None
    assert short.address == ("127.0.0.1", 80)
    assert short.request.startswith(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "http://gpu-7:8080/", "http://me:secret@127.0.0.1/", "http://127.0.0.1:99999/", "127.0.0.1:80",
        "http://127.0.0.1/a b", "http://127.0.0.1/ü", "http://127.0.0.1/\r\nX: y",
    ],
)  # fmt: skip
def test_what_takes_more_than_an_address_is_left_to_a_real_client(url: str) -> None:
    assert target(url) is None
