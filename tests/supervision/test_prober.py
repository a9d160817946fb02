"""The prober against a real socket that answers as told: what it believes, and how long and how much it listens."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Literal

import pytest

from pool_managerd.core.artifacts import AttachedEngine
from pool_managerd.core.engines import CounterNames
from pool_managerd.core.health import Counters, ProbeOutcome
from pool_managerd.supervision.prober import LATE_S, HttpProber, _os_result

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def engine(answer: Answer) -> AsyncIterator[str]:
    """A server that gives every connection to ``answer`` after the request's head."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def says(data: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return answer


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK + b"Content-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.fixture
async def prober() -> AsyncIterator[HttpProber]:
    made = HttpProber()
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("answer", "outcome", "words"),
    [
        (says(OK + b'Content-Length: 15\r\n\r\n{"status":"ok"}'), ProbeOutcome.SUCCESS, ""),
        (says(b"HTTP/1.0 200 OK\r\n\r\nOK"), ProbeOutcome.SUCCESS, ""),
        (says(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), ProbeOutcome.ERROR, "answered 503"),
        (says(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"), ProbeOutcome.ERROR, "302"),
        (says(b"SSH-2.0-OpenSSH_9.2\r\n"), ProbeOutcome.ERROR, "not HTTP"),
        (says(b""), ProbeOutcome.ERROR, "cut off"),
        (says(OK + b"Content-Length: 200000\r\n\r\n" + b"a" * 200_000), ProbeOutcome.ERROR, "more than 64 KiB"),
        (says(OK + b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"), ProbeOutcome.ERROR, "garbage"),
        (hang, ProbeOutcome.TIMEOUT, "no answer within"),
        (drip, ProbeOutcome.TIMEOUT, "no answer within"),
    ],
)  # fmt: skip
async def test_only_a_prompt_and_proper_200_is_believed(
    prober: HttpProber, answer: Answer, outcome: ProbeOutcome, words: str
) -> None:
    async with engine(answer) as url:
        result = await prober.probe(f"{url}/health", 0.4)
    assert result.outcome is outcome, result
    assert words in result.reason


async def test_a_refused_connection_is_told_from_our_own_trouble(prober: HttpProber) -> None:
    async with engine(hang) as url:
        pass
    assert "nothing listens" in (await prober.probe(url, 1)).reason
    assert _os_result(OSError(errno.EMFILE, "Too many open files")).outcome is ProbeOutcome.DISCARDED
    assert _os_result(ConnectionResetError()).reason == "was reset"


async def test_a_time_out_that_came_late_because_our_own_loop_stood_says_nothing_of_the_engine(prober: HttpProber) -> None:
    async with engine(hang) as url:
        asked = asyncio.create_task(prober.probe(f"{url}/health", 0.2))
        await asyncio.sleep(0.05)
        time.sleep(0.2 + LATE_S)  # noqa: ASYNC251 - this is the fault
        result = await asked
    assert result.outcome is ProbeOutcome.DISCARDED and "the daemon itself stood" in result.reason


async def test_counters_are_read_and_an_engine_without_them_is_told_from_one_that_is_silent(prober: HttpProber) -> None:
    names = CounterNames(("x_total",), ("x_now",))
    body = b"# TYPE x_total counter\nx_total 7\nx_now 2\n"
    async with engine(says(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)) as url:
        assert await prober.counters(url, names, 2) == Counters(7, 2)
    for nothing in (b"HTTP/1.1 501 No\r\nContent-Length: 0\r\n\r\n", OK + b"Content-Length: 2\r\n\r\n{}"):
        async with engine(says(nothing)) as url:
            assert await prober.counters(url, names, 2) is None
    async with engine(says(OK + b"Content-Length: 2000000\r\n\r\n" + b"x_now 2\n" * 250_000)) as url:
        assert await prober.counters(url, names, 5) is None, "more than anybody's counters"
    async with engine(hang) as url:
        with pytest.raises(TimeoutError):
            await prober.counters(url, names, 0.2)
    with pytest.raises(OSError):
        await prober.counters(url, names, 1)


def stream(*chunks: str) -> Answer:
    body = "".join(f"data: {chunk}\n\n" for chunk in chunks).encode()
    return says(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)


async def test_the_warm_up_prefers_the_engines_own_rate(prober: HttpProber) -> None:
    chunks = ['{"choices":[{"text":" a"}]}'] * 3
    timed = '{"choices":[{"text":""}],"timings":{"predicted_per_second":42.5}}'
    async with engine(stream(*chunks, timed, "[DONE]")) as url:
        first_ms, rate = await prober.warm_up(attached(url), 2)
    assert rate == 42.5 and 0 < first_ms < 2000
    async with engine(stream(*chunks, "[DONE]")) as url:
        assert (await prober.warm_up(attached(url), 2))[1] > 0


async def test_a_warm_up_whose_stream_is_one_endless_line_fails(prober: HttpProber) -> None:
    async with engine(says(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: " + b"x" * 1_000_000)) as url:
        found = (await asyncio.gather(prober.warm_up(attached(url), 5), return_exceptions=True))[0]
    assert isinstance(found, ValueError) and "a line without an end" in str(found)


@pytest.mark.parametrize(
    "answer",
    [
        stream("[DONE]"),
        stream('{"choices":[]}'),
        stream("[1]"),
        stream("{broken"),
        says(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"),
    ],
)
async def test_a_warm_up_without_a_token_fails(prober: HttpProber, answer: Answer) -> None:
    async with engine(answer) as url:
        with pytest.raises(ValueError):
            await prober.warm_up(attached(url), 2)


@pytest.mark.parametrize("kind", ["embedding", "rerank"])
async def test_an_engine_that_embeds_or_ranks_is_warmed_up_with_that(
    prober: HttpProber, kind: Literal["embedding", "rerank"]
) -> None:
    seen: list[bytes] = []
    body = b'{"data":[{"embedding":[0.5]}],"usage":{"prompt_tokens":4,"total_tokens":4}}'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(4096))
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async with engine(answer) as url:
        first_ms, rate = await prober.warm_up(replace(attached(url), warmup=kind), 2)
    assert 0 < first_ms < 2000 and rate > 0
    assert (b'"input"' if kind == "embedding" else b'"documents"') in seen[0]


@pytest.mark.parametrize("kind", ["completion", "embedding"])
async def test_a_warm_up_follows_no_redirect(prober: HttpProber, kind: Literal["completion", "embedding"]) -> None:
    async with engine(says(OK + b"Content-Length: 2\r\n\r\n{}")) as elsewhere:
        moved = f"HTTP/1.1 307 Moved\r\nLocation: {elsewhere}/v1/embeddings\r\nContent-Length: 0\r\n\r\n".encode()
        async with engine(says(moved)) as url:
            with pytest.raises(ValueError, match="answered 307"):
                await prober.warm_up(replace(attached(url), warmup=kind), 2)


def attached(url: str) -> AttachedEngine:
    return AttachedEngine("p", url)


async def test_a_warm_up_follows_no_redirect_and_takes_no_endless_answer(prober: HttpProber) -> None:
    visited: list[bytes] = []

    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visited.append(b"request")

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        while True:
            writer.write(b": nothing\n" * 1_000)
            await writer.drain()

    async with engine(elsewhere) as target:
        for status in (301, 302, 303, 307, 308):
            answer = says(f"HTTP/1.1 {status} Go\r\nLocation: {target}/admin\r\nContent-Length: 0\r\n\r\n".encode())
            async with engine(answer) as url:
                with pytest.raises(ValueError, match=f"answered {status}"):
                    await prober.warm_up(AttachedEngine("p", url), 5)
                assert not (await prober.probe(url + "/health", 5)).ok
    assert visited == []
    async with engine(endless) as url:
        with pytest.raises(ValueError, match="more than"):
            await prober.warm_up(AttachedEngine("p", url), 20)


async def test_a_pool_managerd_is_no_engine(prober: HttpProber) -> None:
    answer = says(b"HTTP/1.1 200 OK\r\nServer: pool-managerd\r\nContent-Length: 2\r\n\r\nok")
    async with engine(answer) as url:
        result = await prober.probe(url + "/health", 5)
    assert not result.ok
    assert "pool-managerd" in result.reason
