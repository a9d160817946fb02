"""What clients of the gateway see, and what the node and the engine behind it do: each scripted, on loopback."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import yarl
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.errors import NodeError, RequestError, SpecError
from pool_managerd.gateway.asked import in_json
from pool_managerd.gateway.bodies import Bodies, Body, BodyLimits
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.keys import KeyFile
from pool_managerd.gateway.leasing import LeaseTimes
from pool_managerd.gateway.record import Record, Tokens
from pool_managerd.gateway.rules import for_engine
from tests.gateway.lab import CHUNK, LIMITS, OPTIONS, TIMES, Lab, lab

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}


@pytest.fixture
async def one() -> AsyncIterator[Lab]:
    async with lab() as made:
        yield made


# --- the way through ---


async def test_a_request_reaches_the_engine_as_it_was_written(one: Lab) -> None:
    body = b'{ "messages": [],\n "model":"m", "temperature" :0.50 }'
    status, answer = await one.ask(
        body, "/v1/chat/completions?x=1", headers={"x-request-id": "r1", "Content-Type": "application/json"}
    )
    assert status == 200 and answer == {"path": "/v1/chat/completions?x=1", "body": body.decode()}
    request, seen = one.engine.seen[0]
    assert seen == body and request.headers["x-request-id"] == "r1" and request.headers["Host"] != one.url


async def test_a_stream_arrives_as_it_is_made(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    async with one.session.post(one.url + "/v1/chat/completions", json=STREAM) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream") and answer.headers["X-Accel-Buffering"] == "no"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert await answer.content.readexactly(len(CHUNK)) == CHUNK
        assert one.engine.running == 1, "the engine has not ended"
        for _ in range(2):
            one.engine.step.release()
        assert (await answer.read()).endswith(b"data: [DONE]\n\n")


async def test_one_lease_serves_one_request_after_the_other(one: Lab) -> None:
    for _ in range(5):
        assert (await one.ask(CHAT))[0] == 200
    assert one.node.given == 1 and list(one.node.leases) == ["l1"]
    answers = await asyncio.gather(*(one.text(STREAM) for _ in range(3)))
    assert one.node.given == 3 and all("[DONE]" in text for text in answers)


async def test_a_lease_that_is_not_used_goes_back_when_it_was_kept_for_long_enough() -> None:
    async with lab(dataclasses.replace(OPTIONS, leases=dataclasses.replace(TIMES, linger_s=0.05))) as one:
        await one.ask(CHAT)
        await one.until(lambda: not one.node.leases, "it to go back")


async def test_no_lease_is_kept_while_somebody_waits(one: Lab) -> None:
    await one.ask(CHAT)
    await one.node.tell(waiting=True)
    await one.until(lambda: not one.node.leases, "it to go back")
    await one.ask(CHAT)
    await one.until(lambda: not one.node.leases, "it to go back at once")
    assert one.node.given == 2


async def test_a_pool_that_drains_has_its_leases_back_and_gets_no_new_requests(one: Lab) -> None:
    await one.ask(CHAT)
    one.node.rows["m"]["draining"] = True
    one.node.rows["m"]["ready"] = False
    await one.node.tell()
    await one.until(lambda: not one.node.leases, "it to go back")
    one.node.refusal = (409, {"code": "POOL_STOPPED", "message": "cannot start pool 'm' on demand: it was drained by request"})
    status, answer = await one.ask(CHAT)
    assert status == 409 and answer["error"]["code"] == "pool_stopped" and "drained by request" in answer["error"]["message"]


async def test_of_two_pools_with_one_name_both_are_used(one: Lab) -> None:
    one.node.pool("n", one.engine_url, names=["n", "chat"])
    one.node.rows["m"]["names"] = ["m", "chat"]
    await one.node.tell()
    one.engine.step = asyncio.Semaphore(0)
    await one.until(lambda: one.gateway.leasing.directory.place("n"), "the gateway to know")
    asking = [asyncio.create_task(one.ask({**CHAT, "model": "chat"})) for _ in range(2)]
    await one.until(lambda: one.engine.running == 2, "both to run")
    assert sorted(one.node.leases.values()) == ["m", "n"]
    for _ in range(2):
        one.engine.step.release()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]


async def test_an_engine_that_insists_on_its_name_is_asked_by_that() -> None:
    async with lab(names=["m", "gpt"], engine_names=["served"]) as one:
        _, answer = await one.ask({**CHAT, "model": "gpt", "n": 1})
        assert json.loads(answer["body"]) == {"model": "served", "messages": [], "n": 1}


async def test_the_rules_of_a_pool_change_what_its_engine_is_asked() -> None:
    rules = {
        "strip": ["logprobs", "a.b", "model"], "default": {"top_k": 40, "temperature": 1},
        "by_name": {"m:hot": {"temperature": 2}}, "set": {"chat_template_kwargs.think": False, "model": "x"},
    }  # fmt: skip
    async with lab(names=["m", "m:hot"], rules=rules) as one:
        asked = {**CHAT, "temperature": 0, "logprobs": True, "a": {"b": 1, "c": "ü"}}
        _, answer = await one.ask(asked)
        changed = {
            **CHAT, "temperature": 0, "a": {"c": "ü"}, "top_k": 40, "chat_template_kwargs": {"think": False},
        }  # fmt: skip
        assert json.loads(answer["body"]) == changed
        _, answer = await one.ask({**asked, "model": "m:hot"})
        assert json.loads(answer["body"]) == {**changed, "model": "m:hot", "temperature": 2}
        async with one.session.post(one.url + "/upstream/m/x", json=asked) as raw:
            assert json.loads((await raw.json())["body"]) == asked, "what is passed through is not touched"


@given(
    st.dictionaries(st.text(max_size=5), st.recursive(st.none() | st.booleans() | st.text(max_size=5), st.lists, max_leaves=5)),
    st.lists(st.text("ab.", max_size=5), max_size=3),
    st.dictionaries(st.text("ab.", max_size=5), st.integers(), max_size=3),
)
def test_rules_never_fail_and_never_change_the_model(body: dict[str, Any], strip: list[str], put: dict[str, int]) -> None:
    asked = in_json(json.dumps({**body, "model": "m"}).encode())
    place = Place.of({"pool_id": "m", "rules": {"strip": [*strip, "model"], "default": put, "set": {**put, "model": 1}}})
    changed = json.loads(for_engine(asked, place) or b"")
    assert changed["model"] == "m" and all(changed[key] == value for key, value in put.items() if key and "." not in key)


async def test_forms_and_raw_paths_find_their_model_too(one: Lab) -> None:
    form = aiohttp.FormData({"model": "m", "file": io.BytesIO(b"\x00\xff" * 4000)})
    async with one.session.post(one.url + "/v1/audio/transcriptions", data=form) as answer:
        assert answer.status == 200
    async with one.session.get(one.url + "/upstream/m/slots?x=1") as answer:
        assert (await answer.json())["path"] == "/slots?x=1"
    async with one.session.post(one.url + "/chat/completions", json=CHAT) as answer:
        assert (await answer.json())["path"] == "/v1/chat/completions"


# --- who asks for what ---


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "it is empty"),
        (b'{"model": "m",\n"messages": [}', 400, "line 2, column 14"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"messages": []}', 400, "has no `model`"),
        (b'{"model": 5}', 400, "must be the name of a model"),
        (b'{"model": "\xff"}', 400, "not UTF-8"),
        (b"[" * 100_000, 400, "JSON object"),
        (b'{"model": "x\\ny"}', 400, "name of a model"),
        (b'{"model": "other"}', 404, "models here: m"),
    ],
)
async def test_bad_requests_are_told_why_in_the_dialect_of_their_path(one: Lab, body: bytes, status: int, said: str) -> None:
    got, answer = await one.ask(body)
    assert got == status and said in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    got, answer = await one.ask(body, "/v1/messages")
    assert got == status and said in answer["error"]["message"] and answer["type"] == "error"
    assert answer["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert one.engine.seen == [] and one.node.given == 0


async def test_bodies_are_bounded_in_size_and_time(one: Lab) -> None:
    status, answer = await one.ask(b"x" * (LIMITS.bodies.each_bytes + 1))
    assert status == 413 and answer["error"]["code"] == "request_too_large"

    async def dribble() -> AsyncIterator[bytes]:
        yield b'{"model"'
        await asyncio.sleep(30)

    async with one.session.post(one.url + "/v1/completions", data=dribble()) as answer:
        assert answer.status == 408


async def test_a_path_that_is_none_is_told_what_there_is(one: Lab) -> None:
    async with one.session.post(one.url + "/v2/chat", json=CHAT) as answer:
        assert answer.status == 404 and "/upstream/MODEL/PATH" in (await answer.json())["error"]["message"]


async def test_models_are_listed_whether_they_are_loaded_or_not(one: Lab) -> None:
    one.node.pool("b", "", names=["b", "big"], ready=False, state="offline", ctx=None)
    one.node.pool("c", "", ready=False, stays_down=True)
    await one.node.tell()
    await one.until(lambda: one.gateway.leasing.directory.place("c"), "the gateway to know")
    async with one.session.get(one.url + "/v1/models") as answer:
        found = await answer.json()
    assert [(row["id"], row["status"]["value"]) for row in found["data"]] == [
        ("b", "unloaded"),
        ("c", "stopped"),
        ("m", "loaded"),
    ]
    assert found["data"][2]["context_length"] == 512 and found["data"][0]["meta"]["aliases"] == ["big"]
    async with one.session.get(one.url + "/v1/models/big") as answer:
        assert (await answer.json())["id"] == "b"


async def test_web_pages_stay_out_unless_they_are_listed() -> None:
    async with lab(dataclasses.replace(OPTIONS, origins=("https://chat.example",))) as one:
        status, _ = await one.ask(CHAT, headers={"Origin": "https://evil.example"})
        assert status == 403 and one.engine.seen == []
        status, _ = await one.ask(CHAT, headers={"Host": "rebound.example"})
        assert status == 421
        async with one.session.post(
            one.url + "/v1/chat/completions", json=CHAT, headers={"Origin": "https://chat.example"}
        ) as answer:
            assert answer.status == 200 and answer.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        asked = {"Origin": "https://chat.example", "Access-Control-Request-Headers": "x-api-key, x-stainless-os"}
        async with one.session.options(one.url + "/v1/models", headers=asked) as answer:
            assert answer.status == 204 and answer.headers["Access-Control-Allow-Headers"] == "x-api-key, x-stainless-os"
        for path in ("/unload", "/upstream/m/health", "/v1/models"):  # a picture or a link on any page
            async with one.session.get(one.url + path, headers={"Sec-Fetch-Site": "cross-site"}) as answer:
                assert answer.status == 403
        assert one.node.rows["m"]["ready"]


# --- keys ---


async def test_keys_say_who_may_ask_for_what_and_how_much(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    good, other = keys.add("good", concurrency=1), keys.add("other", models=("n",))
    late = keys.add("late", expires_at=int(time.time()) - 1)
    assert good not in keys.place.read_text() and keys.place.stat().st_mode & 0o777 == 0o600
    async with lab(dataclasses.replace(OPTIONS, keys=KeyFile(keys.place))) as one:
        for headers in ({}, {"Authorization": "Bearer nonsense"}, {"x-api-key": late}):
            status, answer = await one.ask(CHAT, headers=headers)
            assert status == 401 and "API key" in answer["error"]["message"]
        status, answer = await one.ask(CHAT, headers={"x-api-key": other})
        assert status == 403 and "it may ask for: n" in answer["error"]["message"]
        one.engine.step = asyncio.Semaphore(0)
        first = asyncio.create_task(one.ask(CHAT, headers={"Authorization": f"Bearer {good}"}))
        await one.until(lambda: one.engine.running == 1, "the first to run")
        status, answer = await one.ask(CHAT, headers={"Authorization": f"Bearer {good}"})
        assert status == 429 and answer["error"]["type"] == "rate_limit_error"
        one.engine.step.release()
        assert (await first)[0] == 200
        assert "Authorization" not in one.engine.seen[0][0].headers, "the engine does not see it"
        async with one.session.get(one.url + "/v1/models", headers={"x-api-key": other}) as answer:
            assert (await answer.json())["data"] == []
        keys.remove("good")
        one.engine.step = None
        async with asyncio.timeout(5):
            while (await one.ask(CHAT, headers={"x-api-key": good}))[0] != 401:
                await asyncio.sleep(0.05)


# --- waiting ---


async def test_a_stream_that_waits_shows_signs_of_life_and_then_answers(one: Lab) -> None:
    one.node.slots = 0
    asking = asyncio.create_task(one.text(STREAM))
    await one.until(lambda: one.node.waits == 1, "it to wait")
    await asyncio.sleep(0.2)
    await one.node.tell(slots=4)
    text = await asking
    assert text.startswith(": still here\n\n") and text.endswith("data: [DONE]\n\n") and CHUNK.decode() in text


async def test_what_fails_after_signs_of_life_is_told_in_the_stream(one: Lab) -> None:
    one.node.slots = 0
    asking = [asyncio.create_task(one.text(STREAM, path)) for path in ("/v1/chat/completions", "/v1/messages")]
    await one.until(lambda: one.node.waits == 2, "both to wait")
    await asyncio.sleep(0.2)
    await one.node.tell(refusal=(500, {"code": "PRELOAD_FAILED", "message": "preload failed: out_of_memory"}))
    openai, anthropic = await asyncio.gather(*asking)
    assert json.loads(openai.split("data: ")[1])["error"]["message"] == "preload failed: out_of_memory"
    assert "event: error\n" in anthropic and '"type":"api_error"' in anthropic


async def test_what_is_refused_at_once_has_its_status_and_says_whether_to_try_again(one: Lab) -> None:
    one.node.slots = 0
    one.node.refusal = (429, {"code": "QUEUE_FULL", "message": "full", "retriable": True, "retry_after_ms": 2500})
    async with one.session.post(one.url + "/v1/messages", json=STREAM) as answer:
        assert answer.status == 429 and answer.headers["Retry-After"] == "3" and answer.headers["x-should-retry"] == "true"
        assert (await answer.json())["error"]["type"] == "rate_limit_error"


async def test_a_silent_engine_is_bridged_by_signs_of_life(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    asking = asyncio.create_task(one.text(STREAM))
    await one.until(lambda: one.engine.running == 1, "it to run")
    await asyncio.sleep(0.2)
    for _ in range(2):
        one.engine.step.release()
    text = await asking
    assert text.startswith(CHUNK.decode() + ": still here\n\n") and text.endswith("data: [DONE]\n\n")


# --- whoever goes away ---


async def test_a_client_that_goes_away_ends_the_engines_work_and_frees_its_slot(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    async with one.session.post(one.url + "/v1/chat/completions", json=STREAM) as answer:
        await answer.content.readexactly(len(CHUNK))
    await one.until(lambda: one.engine.cancelled == 1, "the engine to be told")
    await one.until(lambda: one.gateway.leasing.used() == 0, "the slot to be free")


async def test_a_client_that_goes_away_does_not_wait(one: Lab) -> None:
    one.node.slots = 0
    asking = asyncio.create_task(one.text(CHAT))
    await one.until(lambda: one.node.waits == 1, "it to wait")
    asking.cancel()
    await one.until(lambda: one.node.gave_up == 1, "the node to know")
    assert one.node.leases == {}


async def test_clients_that_vanish_at_every_moment_leave_no_lease_behind(one: Lab) -> None:
    one.node.slots = 2
    asking = [asyncio.create_task(one.text(STREAM)) for _ in range(60)]
    for number, task in enumerate(asking):
        await asyncio.sleep(number % 7 / 2000)
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    await one.until(lambda: one.gateway.leasing.used() == 0 and one.node.waits == 0, "all to be gone")
    await one.node.tell(waiting=True)
    await one.until(lambda: not one.node.leases, "every lease to be back")
    assert (await one.ask(CHAT))[0] == 200


# --- what is seen ---


async def test_requests_are_listed_counted_and_can_be_cancelled(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    asking = asyncio.create_task(one.text(STREAM, headers={"x-request-id": "mine"}))
    await one.until(lambda: one.engine.running == 1, "it to run")
    async with one.session.get(one.url + "/v1/requests") as answer:
        (row,) = await answer.json()
    assert row["request_id"] == "mine" and row["state"] == "running" and row["pool_id"] == "m" and "messages" not in str(row)
    async with one.session.delete(one.url + "/v1/requests/mine") as answer:
        assert answer.status == 200
    assert '"code":"operation_cancelled"' in await asking
    await one.until(lambda: one.engine.cancelled == 1, "the engine to be told")
    async with one.session.delete(one.url + "/v1/requests/mine") as answer:
        assert answer.status == 404
    one.engine.step = None
    await one.text(STREAM)
    await one.ask({"model": "nobody"})
    async with one.session.get(one.url + "/v1/requests") as answer:
        states = [(row["state"], row["status"]) for row in await answer.json()]
    assert states == [("cancelled", 200), ("ended", 200), ("failed", 404)]
    async with one.session.get(one.url + "/metrics") as answer:
        text = await answer.text()
    assert 'gateway_requests_total{path="/v1/chat/completions",pool_id="m",status="200"} 2.0' in text
    assert 'tasks_canceled_total{engine="llamacpp",pool_id="m",reason="client"} 1.0' in text
    assert 'tasks_rejected_total{reason="MODEL_NOT_FOUND"} 1.0' in text
    assert 'latency_first_token_ms_count{engine="llamacpp",pool_id="m"} 1.0' in text


@pytest.mark.parametrize(
    ("tail", "tokens"),
    [
        (b'"usage":{"completion_tokens":10,"prompt_tokens":37,"prompt_tokens_details":{"cached_tokens":36}}', Tokens(37, 10, 36)),
        (b'"timings":{"cache_n":30,"prompt_n":7,"prompt_ms":121.8,"predicted_n":12}', Tokens(37, 12, 30)),
        (b'"usage":{"cache_read_input_tokens":36,"input_tokens":1,"output_tokens":12}', Tokens(37, 12, 36)),
        (b'"usage": {"input_tokens": 5, "output_tokens": 6}', Tokens(5, 6, None)),
        (b"data: [DONE]", Tokens()),
    ],
)
def test_tokens_are_read_from_what_engines_say_at_the_end(tail: bytes, tokens: Tokens) -> None:
    record = Record("r", "/v1/x")
    record.passes(b"x" * 5000)
    record.passes(tail)
    assert record.tokens() == tokens


async def test_tools_for_llama_swap_find_what_they_ask_for(one: Lab) -> None:
    await one.ask(CHAT)
    async with one.session.get(one.url + "/api/events") as events:
        first = await events.content.readuntil(b"\n\n")
        told = json.loads(first.split(b"data: ")[1])
        assert told["type"] == "modelStatus" and json.loads(told["data"])[0] | {"id": "m", "state": "ready"}
        async with one.session.get(one.url + "/running") as answer:
            (row,) = (await answer.json())["running"]
        assert row["model"] == "m" and row["state"] == "ready"
        async with one.session.post(one.url + "/api/models/unload/m") as answer:
            assert await answer.json() == {"msg": "ok"} and not one.node.leases, "what was only kept stood in nobody's way"
        second = json.loads((await events.content.readuntil(b"\n\n")).split(b"data: ")[1])
        assert json.loads(second["data"])[0]["state"] == "stopped"
    async with one.session.get(one.url + "/running") as answer:
        assert await answer.json() == {"running": []}
    one.node.pool("m", one.engine_url)
    await one.node.tell()
    await one.until(one.gateway.leasing.directory.open_launches, "it to be back")
    one.engine.step = asyncio.Semaphore(0)
    asking = asyncio.create_task(one.ask(CHAT))
    await one.until(lambda: one.engine.running == 1, "it to be in use")
    async with one.session.post(one.url + "/api/models/unload/m") as answer:
        assert answer.status == 409 and "in flight" in (await answer.json())["error"]["message"]
    async with one.session.get(one.url + "/unload") as answer:
        assert (answer.status, await answer.text()) == (200, "OK")
    one.engine.step.release()
    assert (await asking)[0] == 200


# --- engines that end ---


async def test_an_engine_that_ends_before_its_first_byte_is_not_noticed(one: Lab) -> None:
    one.engine.refuses = 1
    asking = asyncio.create_task(one.text(STREAM))
    await one.until(lambda: one.engine.seen, "it to be asked")
    one.node.rows["m"] |= {"epoch": 2}
    await one.node.tell()
    assert (await asking).endswith("data: [DONE]\n\n")
    assert one.node.given == 2 and len(one.engine.seen) == 2


async def test_one_that_ends_again_is_told_with_what_the_daemon_knows_and_not_to_be_tried_again(one: Lab) -> None:
    one.engine.refuses = 2
    one.node.rows["m"] |= {"last_error": "out_of_memory: the kernel killed it"}
    asking = asyncio.create_task(one.session.post(one.url + "/v1/chat/completions", json=CHAT))
    await one.until(lambda: len(one.engine.seen) == 1, "the first try")
    one.node.rows["m"] |= {"epoch": 2}
    await one.node.tell()
    await one.until(lambda: len(one.engine.seen) == 2, "both tries")
    one.node.rows["m"] |= {"ready": False}
    await one.node.tell()
    async with await asking as answer:
        assert answer.status == 502 and answer.headers["x-should-retry"] == "false"
        assert "out_of_memory: the kernel killed it" in (await answer.json())["error"]["message"]


async def test_an_engine_that_is_there_and_closes_without_a_word_is_not_asked_the_same_again(one: Lab) -> None:
    one.engine.refuses = 9
    status, answer = await one.ask(CHAT)
    assert status == 502 and "closed the connection without an answer" in answer["error"]["message"]
    assert len(one.engine.seen) == 1


@pytest.mark.parametrize(("path", "mark"), [("/v1/chat/completions", "data: {"), ("/v1/messages", "event: error\ndata: {")])
async def test_one_that_ends_in_the_middle_is_told_in_the_stream(one: Lab, path: str, mark: str) -> None:
    one.engine.dies_after = 2
    text = await one.text(STREAM, path)
    last = text.removeprefix(CHUNK.decode() * 2)
    assert mark in last and "the engine ended in the middle of its answer" in last and "[DONE]" not in text
    assert len(one.engine.seen) == 1, "nothing is asked again after the first byte"
    await one.until(lambda: not one.node.leases, "its lease to go back: nobody is to have that slot from here")


async def test_an_engines_own_error_is_passed_on(one: Lab) -> None:
    one.engine.status = 400
    assert await one.ask(CHAT) == (400, {"error": {"message": "too long", "type": "x"}})


# --- a daemon that is away ---


async def test_what_is_held_serves_on_while_the_daemon_is_away_and_new_slots_wait_for_it(one: Lab) -> None:
    await one.ask(CHAT)
    await one.node.tell(away=True)
    await one.until(lambda: not one.gateway.leasing.connected, "the gateway to see it")
    assert (await one.ask(CHAT))[0] == 200
    one.engine.step = asyncio.Semaphore(0)
    asking = [asyncio.create_task(one.ask(CHAT)) for _ in range(2)]
    await one.until(lambda: one.engine.running == 1, "one to have the kept lease")
    one.node.away = False
    await one.until(lambda: one.engine.running == 2, "the other to have a new one")
    for _ in range(2):
        one.engine.step.release()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200, 200]
    await one.until(lambda: one.gateway.leasing.connected, "it to be followed again")


async def test_a_daemon_that_goes_while_others_wait_takes_no_slot_with_it(one: Lab) -> None:
    await one.node.tell(waiting=True)
    await one.until(lambda: one.gateway.leasing.directory.waiting, "the gateway to know")
    one.engine.step = asyncio.Semaphore(0)
    first = asyncio.create_task(one.ask(CHAT))
    await one.until(lambda: one.engine.running == 1, "it to run")
    await one.node.tell(away=True)
    await one.until(lambda: not one.gateway.leasing.connected, "the gateway to see it")
    for _ in range(2):
        one.engine.step.release()
    assert (await first)[0] == 200 and (await one.ask(CHAT))[0] == 200, "over the same slot"
    assert one.node.given == 1


async def test_a_daemon_that_stays_away_is_told_after_a_while() -> None:
    async with lab(dataclasses.replace(OPTIONS, leases=dataclasses.replace(TIMES, away_s=0.1))) as one:
        await one.node.tell(away=True)
        status, answer = await one.ask(CHAT)
        assert status == 503 and answer["error"]["code"] == "node_unavailable"


async def test_a_lease_that_the_daemon_knows_no_more_is_forgotten() -> None:
    times = LeaseTimes(linger_s=30, ttl_s=0.2, away_s=5, again_s=0.02)
    async with lab(dataclasses.replace(OPTIONS, leases=times)) as one:
        await one.ask(CHAT)
        one.node.leases.clear()
        await one.until(lambda: not one.gateway.leasing._kept.all(), "it to be forgotten")
        await one.ask(CHAT)
        assert one.node.given == 2


async def test_leases_go_back_when_the_gateway_ends() -> None:
    async with lab() as one:
        await one.ask(CHAT)
        node = one.node
        assert node.leases and node.holders[0].startswith("gateway/")
        node_leases: dict[str, Any] = node.leases
        await one.gateway.leasing.close()
        assert node_leases == {}


# --- bodies ---


class Upload:
    """A request whose body comes in pieces; what it announces is not what comes."""

    def __init__(self, pieces: list[bytes], announced: int | None = None) -> None:
        self.content_length, self._pieces, self.content = announced, pieces, self

    def is_eof(self) -> bool:
        return False

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def test_bodies_that_are_held_are_bounded_together_and_each_counts_from_its_announcement_on() -> None:
    bodies = Bodies(BodyLimits(each_bytes=100, all_bytes=250))

    @asynccontextmanager
    async def of(upload: Upload) -> AsyncIterator[bytes]:
        body = Body(bodies)
        try:
            yield await body.read(cast("web.Request", upload))
        finally:
            body.let_go()

    async with of(Upload([b"x" * 60, b"x" * 40])) as first, of(Upload([b"x"], announced=100)) as second:
        assert (len(first), len(second), bodies.held) == (100, 1, 200)
        for upload in (Upload([], announced=51), Upload([b"x" * 30, b"x" * 21])):
            with pytest.raises(NodeError, match="at the moment"):
                async with of(upload):
                    raise AssertionError
            assert bodies.held == 200
        for upload in (Upload([b"x" * 40] * 3), Upload([], announced=101)):
            with pytest.raises((RequestError, NodeError)):
                async with of(upload):
                    raise AssertionError
        async with of(Upload([b"x" * 50])) as third:
            assert len(third) == 50 and bodies.held == 250
    assert bodies.held == 0


async def test_a_body_of_very_many_values_is_refused_before_it_is_read() -> None:
    with pytest.raises(RequestError, match="more than 1,000,000 values") as refused:
        in_json(b'{"model": "m", "prompt": [' + b"1," * 1_000_001 + b"1]}")
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"model": "m", "n": ' + b"1" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff{}", "UTF-8"),
    ],
)
def test_what_cannot_be_read_is_said_as_it_is(body: bytes, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        in_json(body)


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n--bogus name="model"\r\n\r\nnot this\r\n'
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n m \r\n--b--\r\n'
)


async def test_a_form_for_an_engine_with_a_name_of_its_own_is_asked_by_that() -> None:
    async with lab(engine="vllm", engine_names=["whisper-large"]) as one:
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        status, answer = await one.ask(FORM, "/v1/audio/transcriptions", headers=kind)
        assert status == 200 and answer["body"].encode() == FORM.replace(b"\r\n m \r\n", b"\r\nwhisper-large\r\n")
        twice = FORM.replace(b"--b--", b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nn\r\n--b--')
        status, answer = await one.ask(twice, "/v1/audio/transcriptions", headers=kind)
        assert status == 400 and "names one twice" in answer["error"]["message"]


async def test_names_with_slashes_are_found_in_a_path() -> None:
    async with lab(names=["m", "org/m", "org"]) as one:
        for path, target in (("/upstream/org/m/v1/x?q=1", "/v1/x?q=1"), ("/upstream/org/n", "/n"), ("/upstream/org%2Fm/y", "/y")):
            async with one.session.get(one.url + path) as answer:
                assert (await answer.json())["path"] == target
        async with one.session.get(one.url + "/upstream/other/x") as answer:
            assert answer.status == 404 and "'other' not found" in (await answer.json())["error"]["message"]


async def test_a_key_learns_nothing_of_models_that_it_may_not_ask_for(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    guest = keys.add("guest", models=("n",))
    async with lab(dataclasses.replace(OPTIONS, keys=KeyFile(keys.place))) as one:
        for path in ("/v1/models/zzz", "/v1/models/m", "/upstream/zzz/x", "/upstream/m/x"):
            async with one.session.get(one.url + path, headers={"x-api-key": guest}) as answer:
                text = await answer.text()
                assert answer.status == 403 and "it may ask for: n" in text and "models here" not in text


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "x", "created_at": 1, "expires_at": "soon"}]}'],
)
async def test_keys_that_cannot_be_read_lock_nobody_out_and_let_nobody_in(tmp_path: Path, text: str) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    good = keys.add("good")
    served = KeyFile(keys.place)
    assert served.named_by({"x-api-key": good}).name == "good"
    keys.place.write_text(text)
    served._looked_at = -10.0
    assert served.named_by({"x-api-key": good}).name == "good"
    with pytest.raises(SpecError, match="cannot use the keys in"):
        served.all()
    keys.place.unlink()
    served._looked_at = -10.0
    with pytest.raises(RequestError, match="not known"):
        served.named_by({"x-api-key": good})


async def test_a_slow_reader_is_served_and_one_that_takes_next_to_nothing_is_cut_off() -> None:
    http = dataclasses.replace(OPTIONS.http, write_timeout_s=0.5, head_timeout_s=1.0)
    async with lab(dataclasses.replace(OPTIONS, http=http)) as one:
        one.engine.words = 200_000
        body = json.dumps(STREAM).encode()
        ask = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        readers = []
        for _ in range(2):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            reader.setblocking(False)
            await asyncio.get_running_loop().sock_connect(reader, ("127.0.0.1", int(one.url.rpartition(":")[2])))
            await asyncio.get_running_loop().sock_sendall(reader, ask)
            readers.append(reader)
        slow, silent = readers
        await one.until(lambda: one.gateway.leasing.used() == 2, "both to run")
        began = time.monotonic()
        while one.gateway.leasing.used() == 2 or time.monotonic() - began < 2:  # the silent one goes, the slow one reads on
            assert await asyncio.get_running_loop().sock_recv(slow, 4096)
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 20
        assert one.gateway.leasing.used() == 1
        slow.close()
        silent.close()


# --- what else outsiders saw ---


async def test_a_gateway_that_ends_tells_streams_that_take_longer(one: Lab) -> None:
    one.engine.step = asyncio.Semaphore(1)
    async with aiohttp.ClientSession() as session:
        async with lab() as other:
            other.engine.step = asyncio.Semaphore(1)
            answer = await session.post(other.url + "/v1/messages", json=STREAM)
            assert await answer.content.readexactly(len(CHUNK)) == CHUNK
        rest = await answer.text()
    assert "event: error\n" in rest and "the gateway is shutting down" in rest


async def test_a_daemon_that_hangs_keeps_nobody_waiting_for_ever() -> None:
    times = dataclasses.replace(TIMES, wait_s=0.05, away_s=0.05)
    async with lab(dataclasses.replace(OPTIONS, leases=times)) as one:
        one.node.slots = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pool_managerd.gateway.node_link._ANSWER_S", 0.1)
            status, answer = await one.ask(CHAT)
    assert status == 503 and "cannot reach the daemon" in answer["error"]["message"]


async def test_a_daemon_that_refuses_the_gateway_is_not_the_clients_fault(one: Lab) -> None:
    one.node.slots = 0
    one.node.refusal = (401, {"code": "BAD_TOKEN", "message": "the bearer token is wrong"})
    status, answer = await one.ask(CHAT)
    assert status == 503 and "the daemon refuses this gateway: the bearer token is wrong" in answer["error"]["message"]


async def test_rules_hold_on_the_way_around_them_too() -> None:
    async with lab(rules={"set": {"temperature": 0}}) as one:
        status, answer = await one.ask(CHAT, "/upstream/m/v1/chat/completions")
        assert status == 200 and json.loads(answer["body"])["temperature"] == 0
        status, answer = await one.ask(b"[1]", "/upstream/m/v1/chat/completions")
        assert (status, answer["body"]) == (200, "[1]")
        status, answer = await one.ask(CHAT, "/upstream/m/slots")
        assert json.loads(answer["body"]) == CHAT
        async with one.session.get(yarl.URL(one.url + "/upstream/m/%2e%2e/x", encoded=True)) as refused:
            assert refused.status == 400 and len(one.engine.seen) == 3


async def test_pages_of_both_apis_fail_in_the_dialect_of_who_asks(one: Lab) -> None:
    async with one.session.get(one.url + "/v1/models/zzz", headers={"anthropic-version": "2023-06-01"}) as answer:
        assert answer.status == 404 and (await answer.json())["type"] == "error"


async def test_what_is_for_whoever_runs_the_node_is_not_for_callers_with_keys(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    guest = keys.add("guest")
    for served, told in ((None, True), (KeyFile(keys.place), False)):
        async with lab(dataclasses.replace(OPTIONS, keys=served)) as one:
            one.node.slots = 0
            one.node.refusal = (500, {"code": "PRELOAD_FAILED", "message": "no such file", "hint": "beside it: secret.txt"})
            _, answer = await one.ask(CHAT, headers={"x-api-key": guest})
            assert ("secret.txt" in answer["error"]["message"]) is told


async def test_a_card_is_shown_where_models_are_listed_and_hides_one_that_is_not_to_be() -> None:
    card = {"name": "Model M", "description": "Says words", "metadata": {"port": 1}, "listed": True}
    async with lab(card=card) as one:
        one.node.pool("hidden", one.engine_url, card={**card, "listed": False})
        await one.node.tell()
        await one.until(lambda: one.gateway.leasing.directory.place("hidden"), "the gateway to know both")
        async with one.session.get(one.url + "/v1/models") as answer:
            (row,) = (await answer.json())["data"]
        assert (row["id"], row["display_name"], row["description"], row["meta"]["metadata"]) == (
            "m",
            "Model M",
            "Says words",
            {"port": 1},
        )
        async with one.session.get(one.url + "/v1/models/hidden") as answer:
            assert (await answer.json())["id"] == "hidden" and (await one.ask({**CHAT, "model": "hidden"}))[0] == 200
        async with one.session.get(one.url + "/running") as answer:
            assert (await answer.json())["running"][1]["name"] == "Model M"


async def test_who_is_to_come_again_is_told_when_by_what_requests_took(one: Lab) -> None:
    assert (await one.ask(CHAT))[0] == 200
    (record,) = one.gateway._requests._recent
    record.leased, record.ended = 100.0, 107.5
    one.node.refusal = (429, {"code": "QUEUE_FULL", "message": "full", "retriable": True, "retry_after_ms": 1000})
    await one.node.tell(waiting=True)
    await one.until(lambda: not one.node.leases, "its lease to go back")
    for model, seconds in (("m", "8"), ("other", None)):
        async with one.session.post(one.url + "/v1/chat/completions", json={**CHAT, "model": model}) as answer:
            assert answer.headers.get("Retry-After") == seconds
