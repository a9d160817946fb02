"""What is kept of requests and answers where that is wanted, who may read it, and how much memory it takes at most."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import io
import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config.pools import RequestRules
from pool_managerd.gateway import requests
from pool_managerd.gateway.captures import Capture, Captures
from pool_managerd.gateway.keys import KeyFile
from pool_managerd.httpd.guard import GuardedConnection
from tests.gateway.lab import CHUNK, OPTIONS, Json, Lab, lab, served

CHAT = {"model": "m", "messages": [{"role": "user", "content": "a secret of mine"}]}
STREAM = {**CHAT, "stream": True}
MIB = 1 << 20
ON = dataclasses.replace(OPTIONS, capture_bytes=64 * MIB)


@pytest.fixture
async def one() -> AsyncIterator[Lab]:
    async with lab(ON) as made:
        yield made


async def read(one: Lab, request_id: str = "r1", **headers: str) -> tuple[int, Json]:
    async with one.session.get(f"{one.url}/v1/requests/{request_id}", headers=headers) as answer:
        return answer.status, await answer.json()


@asynccontextmanager
async def engine_says(one: Lab, answer: web.Response) -> AsyncIterator[None]:
    """Whatever it is asked."""

    async def said(request: web.Request) -> web.StreamResponse:
        await request.read()
        return answer

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", said)
    async with served(app) as url:
        one.node.pool("m", url)
        await one.node.tell()
        yield


async def test_a_request_and_its_answer_are_read_by_its_id(one: Lab) -> None:
    body = b'{"model": "m",\n "messages": ["\xc3\xbc"]}'
    sent = {
        "x-request-id": "r1", "Authorization": "Bearer sk-1", "x-api-key": "sk-2", "Cookie": "session=3", "X-Real-IP": "10.0.0.4",
        "User-Agent": "me/1", "Content-Type": "application/json",
    }  # fmt: skip
    _, answer = await one.ask(body, headers=sent)
    status, row = await read(one)
    assert status == 200 and row["state"] == "ended" and row["not_captured"] is None
    asked, told = row["captured"]["request"], row["captured"]["answer"]
    assert asked["text"].encode() == body and asked["bytes"] == len(body) and asked["truncated"] is False
    assert asked["headers"] == {"accept": "*/*", "content-type": "application/json", "user-agent": "me/1"}
    assert '"path": "/v1/chat/completions"' in told["text"] and told["headers"]["content-type"].startswith("application/json")
    assert one.engine.seen[0][1] == body == answer["body"].encode(), "nothing of it was changed on its way"
    assert not any(secret in str(row) for secret in ("sk-1", "sk-2", "session=3", "10.0.0.4"))


async def test_a_stream_is_kept_as_it_was_written_and_arrives_as_it_is_made(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    async with one.session.post(one.url + "/v1/chat/completions", json=STREAM, headers={"x-request-id": "r1"}) as answer:
        assert await answer.content.readexactly(len(CHUNK)) == CHUNK and one.engine.running == 1
        _, row = await read(one)
        assert row["state"] == "running" and row["captured"]["answer"]["text"] == CHUNK.decode(), "so far"
        await asyncio.sleep(0.1)  # for signs of life, which are none of it
        for _ in range(2):
            one.engine.step.release()
        rest = await answer.read()
    _, row = await read(one)
    assert b": still here\n\n" in rest and row["captured"]["answer"]["text"] == (CHUNK * 3 + b"data: [DONE]\n\n").decode()


async def test_of_forms_and_what_is_no_text_size_and_type_are_kept(one: Lab) -> None:
    form = aiohttp.FormData({"model": "m", "file": io.BytesIO(b"RIFF" * 500)})
    async with (
        engine_says(one, web.Response(body=b"\x00\xff" * 900, content_type="audio/wav")),
        one.session.post(one.url + "/v1/audio/transcriptions", data=form, headers={"x-request-id": "r1"}) as answer,
    ):
        assert answer.status == 200
    _, row = await read(one)
    asked, told = row["captured"]["request"], row["captured"]["answer"]
    assert asked["text"] is None and asked["bytes"] > 2000 and asked["headers"]["content-type"].startswith("multipart/form-data")
    assert told == {"headers": {"content-type": "audio/wav"}, "bytes": 1800, "text": None, "truncated": False}
    async with lab(ON) as other:
        packed = web.Response(
            body=gzip.compress(b"{}" * 99), headers={"Content-Encoding": "gzip"}, content_type="application/json"
        )
        async with engine_says(other, packed):
            await other.text(CHAT, headers={"x-request-id": "r1", "Accept-Encoding": "gzip"})
        assert (await read(other))[1]["captured"]["answer"]["text"] is None


async def test_of_long_bodies_the_beginning_is_kept(one: Lab) -> None:
    body = {**CHAT, "x": "y" * 900_000}
    async with lab(dataclasses.replace(OPTIONS, capture_bytes=MIB)) as small:
        await small.ask(body, headers={"x-request-id": "r1"})
        for part in (await read(small))[1]["captured"].values():
            assert part["truncated"] and 50_000 < len(part["text"]) < MIB / 16 and part["bytes"] > 900_000
    await one.ask(body, headers={"x-request-id": "r1"})
    assert [part["truncated"] for part in (await read(one))[1]["captured"].values()] == [False, False]


async def test_what_cannot_be_read_is_captured_too_and_pages_are_not(one: Lab) -> None:
    assert (await one.ask(b"{oops", headers={"x-request-id": "r1"}))[0] == 400
    _, row = await read(one)
    assert row["captured"] == {
        "request": {"headers": row["captured"]["request"]["headers"], "bytes": 5, "text": "{oops", "truncated": False},
        "answer": None,
    }
    async with one.session.get(one.url + "/upstream/m/slots", headers={"x-request-id": "page"}) as page:
        assert page.status == 200
    assert (await read(one, "page"))[1]["not_captured"] == "it had no body, or there was no room"


async def test_off_nothing_is_kept_and_that_is_said() -> None:
    async with lab() as one:
        await one.text(STREAM, headers={"x-request-id": "r1"})
        status, row = await read(one)
        assert status == 200 and row["captured"] is None and row["not_captured"] == "captures are off: set gateway.capture_bytes"
        status, told = await read(one, "r2")
        assert status == 404 and "captures are off" in told["error"]["message"]
        (record,) = one.gateway._requests._recent
        kept = [getattr(record, field.name) for field in dataclasses.fields(record)]
        assert "secret of mine" not in str(kept) and "word" not in str(kept)


@pytest.mark.parametrize("on", [True, False])
async def test_the_first_line_of_the_log_says_so(capsys: pytest.CaptureFixture[str], on: bool) -> None:
    async with lab(ON if on else OPTIONS):
        first = capsys.readouterr().out.splitlines()[0]
    assert ("What requests and answers say is captured, in 64 MiB of memory" in first) is on


# --- who may read it ---


async def test_each_key_reads_its_own(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    mine, other = keys.add("mine"), keys.add("other")
    async with lab(dataclasses.replace(ON, keys=KeyFile(keys.place))) as one:
        await one.ask(CHAT, headers={"x-request-id": "r1", "x-api-key": mine})
        assert (await read(one, **{"x-api-key": other}))[0] == 404 and (await read(one))[0] == 401
        await one.ask({**CHAT, "n": 2}, headers={"x-request-id": "r1", "x-api-key": other})
        for key, second in ((mine, False), (other, True)):
            status, row = await read(one, **{"x-api-key": key})
            assert status == 200 and ('"n": 2' in row["captured"]["request"]["text"]) is second
            assert mine not in str(row) and other not in str(row)
        assert (await one.ask(b"{oops", headers={"x-request-id": "bad", "x-api-key": mine}))[0] == 400
        assert (await read(one, "bad", **{"x-api-key": mine}))[1]["captured"]["request"]["text"] == "{oops"


@pytest.mark.parametrize("uid", [None, os.geteuid() + 1])
async def test_without_keys_they_are_for_the_gateways_own_user(
    one: Lab, monkeypatch: pytest.MonkeyPatch, uid: int | None
) -> None:
    await one.ask(CHAT, headers={"x-request-id": "r1"})
    monkeypatch.setattr(GuardedConnection, "peer_uid", lambda _self: uid)
    status, told = await read(one)
    assert status == 401 and "own user and root" in told["error"]["message"] and "secret" not in str(told)


# --- how much it is ---


async def test_many_large_requests_take_no_more_memory_than_there_is_for_them() -> None:
    async with lab(dataclasses.replace(OPTIONS, capture_bytes=MIB)) as one:
        captures = one.gateway._requests.captures
        assert captures is not None
        one.node.slots, one.node.rows["m"]["slots"] = 99, 99
        await one.node.tell()
        one.engine.step = asyncio.Semaphore(0)
        asking = [asyncio.create_task(one.ask({**CHAT, "x": "y" * 100_000})) for _ in range(25)]
        await one.until(lambda: one.engine.running == 25, "all to run")
        assert MIB / 2 < captures.held < MIB, "what is in flight is counted"
        for _ in asking:
            one.engine.step.release()
        await asyncio.gather(*asking)
        assert MIB / 2 < captures.held < MIB
        one.engine.step = None
        await one.ask({**CHAT, "x": "y" * 40_000}, headers={"x-request-id": "last"})
        _, row = await read(one, "last")
        assert row["captured"]["request"]["truncated"] is False, "the newest is there, and the oldest made room"
        oldest = one.gateway._requests._recent[0]
        assert (await read(one, oldest.request_id))[1]["not_captured"] == "newer ones needed the room"


async def test_what_is_listed_no_more_is_kept_no_more(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "RECENT", 3)
    for number in range(8):
        await one.ask(CHAT, headers={"x-request-id": f"r{number}"})
    captures = one.gateway._requests.captures
    assert captures is not None and len(captures.over) == 3 and (await read(one, "r4"))[0] == 404
    assert (await read(one, "r5"))[1]["captured"] is not None


pieces = st.integers(0, 90_000).map(lambda size: b"x" * size)
steps = st.lists(
    st.one_of(st.tuples(st.just("begin"), pieces), st.tuples(st.sampled_from(["answered", "passes", "over", "forget"]), pieces)),
    max_size=60,
)


@given(steps, st.integers(MIB // 16, MIB), st.randoms(use_true_random=False))
def test_whatever_comes_the_memory_is_bounded_and_given_back(
    done: list[tuple[str, bytes]], most: int, chance: random.Random
) -> None:
    captures, live, over = Captures(most), list[Capture](), list[Capture]()
    text = ((b"Content-Type", b"text/event-stream"),)
    for what, piece in done:
        if what == "begin":
            if (made := captures.begin(text, piece)) is not None:
                live.append(made)
        elif what == "forget" and over:
            over.pop(chance.randrange(len(over))).forget()
        elif live and what == "over":
            live[0].over()
            over.append(live.pop(0))
        elif live and what in ("answered", "passes"):
            chosen = chance.choice(live)
            if what == "passes":
                chosen.passes(piece)
            elif chosen.answer is None:
                chosen.answered(text)
        bodies = [body for one in (*live, *over) for body in (one.request, one.answer) if body is not None]
        assert sum(sys.getsizeof(body.kept) for body in bodies) < most and captures.held <= most
        for body in bodies:
            part = body.to_dict()
            assert part["truncated"] or len(part["text"]) in (0, part["bytes"])
    for one in live:
        one.over()
    for one in (*live, *over):
        one.forget()
    assert captures.held == 0 and not captures.over


async def test_whatever_clients_and_engines_do_nothing_stays_that_is_over() -> None:
    rules = RequestRules(concurrency=6).model_dump(mode="json")
    async with lab(dataclasses.replace(OPTIONS, capture_bytes=MIB), rules=rules, slots=9) as one:
        one.node.slots = 9
        chance = random.Random(1)
        for _ in range(12):
            one.engine.dies_after, one.engine.refuses = chance.choice([None, None, 1]), chance.choice([0, 0, 1])
            bodies = [{**CHAT, "stream": chance.random() < 0.5, "x": "y" * chance.choice([9, 200_000])} for _ in range(9)]
            asking = [asyncio.create_task(one.text(body)) for body in bodies]
            for task in chance.sample(asking, 4):
                await asyncio.sleep(0)
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        await one.until(lambda: not one.gateway._requests._live, "all to be over")
        captures = one.gateway._requests.captures
        assert captures is not None and one.gateway.leasing._concurrency.here("m") == 0
        bodies_held = [body for over in captures.over for body in (over.request, over.answer) if body is not None]
        assert captures.held == len(captures.over) * 4096 + sum(len(body.kept) for body in bodies_held) < MIB
