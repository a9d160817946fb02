"""A timed completion against a real socket that answers as told: what is counted, and how much is listened to."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from pool_managerd.core.artifacts import AttachedEngine
from pool_managerd.core.bench import TimedAnswer
from pool_managerd.supervision.prober import HttpProber
from tests.supervision.test_prober import OK, Answer, engine, hang, says

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def events(*chunks: Any) -> bytes:
    return HEAD + b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def piece(text: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": None, **more}]}


async def timed(answer: Answer) -> TimedAnswer:
    prober = HttpProber()
    found: TimedAnswer | Exception
    async with engine(answer) as url:
        try:
            found = await prober.timed(AttachedEngine("p", url), "x", 8)
        except (ValueError, aiohttp.ClientError) as problem:
            found = problem
        finally:
            await prober.close()
    if isinstance(found, Exception):
        raise found
    return found


async def test_the_engines_own_counts_hold_where_it_tells_them() -> None:
    last = {"choices": [], "usage": {"completion_tokens": 8, "prompt_tokens": 40}, "timings": {"prompt_per_second": 900.5}}
    found = await timed(says(events(piece("a"), piece(""), piece("c"), piece("", finish_reason="length"), last)))
    assert (len(found.times_s), found.tokens, found.prompt_tokens, found.prompt_rate) == (3, 8, 40, 900.5)
    assert list(found.times_s) == sorted(found.times_s)


async def test_an_engine_that_counts_nothing_is_counted() -> None:
    found = await timed(says(events(piece("a"), piece("b"), {"choices": []}, {"usage": None})))
    assert (found.tokens, found.prompt_tokens, found.prompt_rate) == (2, None, None)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 X\r\nContent-Length: 4\r\n\r\nlong", "answered 400$"),
        (b"HTTP/1.1 400 X\r\nContent-Length: 28\r\n\r\n" + b'{"error":{"message":"ctx!"}}', "answered 400: ctx!"),
        (b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "answered 302"),
        (events(piece("a")), "fewer than two tokens"), (events([1]), "no completion"), (HEAD + b"data: {\n\n", "Expecting"),
        (events(piece("a"), {"error": {"message": "out of slots"}}), "broke off: out of slots"),
        (events(*[piece("x" * 90_000)] * 8), "far more than was asked for"),
        (HEAD + b"data: " + b"[" * 90_000 + b"\n\n", "nested too deeply"),
        (HEAD + b"data: " + b"x" * 2_000_000, "a line without an end"), (OK + b"Content-Length: 2\r\n\r\n{}", "fewer than two"),
    ], ids=range(11),
)  # fmt: skip
async def test_what_is_no_answer_is_told(data: bytes, why: str) -> None:
    with pytest.raises((ValueError, aiohttp.ClientError), match=why):
        await timed(says(data))


async def test_one_that_does_not_answer_is_left_when_it_is_cancelled() -> None:
    waiting = asyncio.create_task(timed(hang))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
