"""What tools for llama-swap and llama.cpp ask beside models: the engines' logs, and properties."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from pool_managerd.gateway import watchers
from pool_managerd.gateway.keys import KeyFile
from pool_managerd.httpd.guard import GuardedConnection
from tests.gateway.lab import OPTIONS, Lab, lab

CHAT = {"model": "m", "messages": []}


@pytest.fixture
async def one() -> AsyncIterator[Lab]:
    async with lab() as made:
        made.node.logs["m"] = ["loading\n", "ready\n"]
        yield made


@asynccontextmanager
async def log(one: Lab, path: str = "/m", **options: object) -> AsyncIterator[aiohttp.ClientResponse]:
    async with one.session.get(f"{one.url}/logs/stream{path}", **options) as answer:  # type: ignore[arg-type]
        yield answer


async def write(one: Lab, pool_id: str, line: str) -> None:
    one.node.logs[pool_id].append(line)
    await one.node.tell()


# --- logs ---


async def test_a_log_is_shown_from_what_there_is_on(one: Lab) -> None:
    async with log(one) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert await answer.content.readline() == b"loading\n" and await answer.content.readline() == b"ready\n"
        await write(one, "m", "prompt done\n")
        assert await answer.content.readline() == b"prompt done\n"


async def test_without_history_it_is_what_is_written_from_now_on(one: Lab) -> None:
    async with log(one, "/m?no-history") as answer:
        await write(one, "m", "new\n")
        assert await answer.content.readline() == b"new\n"


async def test_a_name_has_the_logs_of_all_its_pools_and_no_name_those_of_all(one: Lab) -> None:
    one.node.pool("n", "", names=["n", "m", "org/m"])
    one.node.logs["n"] = ["of n\n"]
    await one.node.tell()
    await one.until(lambda: one.gateway.leasing.directory.place("n"), "the gateway to know")
    for path, lines in (("", {b"loading\n", b"ready\n", b"of n\n"}), ("/org/m", {b"of n\n"}), ("/m", {b"loading\n", b"ready\n"})):
        async with log(one, path) as answer:
            assert {await answer.content.readline() for _ in lines} == lines


async def test_what_cannot_be_shown_is_an_error(one: Lab) -> None:
    async with log(one, "/nobody") as answer:
        assert answer.status == 404 and "models here: m" in (await answer.json())["error"]["message"]
    for number in range(16):
        one.node.pool(f"p{number}", "")
    await one.node.tell()
    await one.until(lambda: one.gateway.leasing.directory.place("p15"), "the gateway to know")
    async with log(one, "") as answer:
        assert answer.status == 400 and "17 pools" in (await answer.json())["error"]["message"]
    await one.node.tell(away=True)
    async with log(one) as answer:
        assert answer.status == 503


async def test_a_log_ends_with_its_node_and_with_the_gateway() -> None:
    async with aiohttp.ClientSession() as session:
        async with lab() as one:
            one.node.logs["m"] = ["here\n"]
            async with log(one) as gone:
                assert await gone.content.readline() == b"here\n"
                await one.node.tell(away=True)
                assert await gone.read() == b""
            await one.node.tell(away=False)
            await one.until(lambda: one.gateway.leasing.connected, "it to be followed again")
            answer = await session.get(f"{one.url}/logs/stream/m")
            assert await answer.content.readline() == b"here\n"
        assert await answer.read() == b""


async def test_keys_and_origins_hold_for_logs_too(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    all_of_them, other = keys.add("all"), keys.add("other", models=("n",))
    async with lab(dataclasses.replace(OPTIONS, keys=KeyFile(keys.place))) as one:
        one.node.logs |= {"m": ["of m\n"], "n": ["of n\n"]}
        one.node.pool("n", "")
        await one.node.tell()
        await one.until(lambda: one.gateway.leasing.directory.place("n"), "the gateway to know")
        for headers, status in (
            ({}, 401), ({"x-api-key": "no"}, 401), ({"x-api-key": other}, 403), ({"Origin": "https://evil.example"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
        ):  # fmt: skip
            async with log(one, headers=headers) as answer:
                assert answer.status == status and "of m" not in await answer.text()
        async with log(one, "", headers={"x-api-key": other}) as answer:
            assert await answer.content.readline() == b"of n\n"
        assert one.node.log_queries == ["follow=true&lines=1000"], "nothing else was read"
        async with log(one, headers={"x-api-key": all_of_them}) as answer:
            assert await answer.content.readline() == b"of m\n"


@pytest.mark.parametrize("uid", [None, os.geteuid() + 1])
async def test_without_keys_logs_are_for_the_gateways_own_user(
    one: Lab, monkeypatch: pytest.MonkeyPatch, uid: int | None
) -> None:  # fmt: skip
    monkeypatch.setattr(GuardedConnection, "peer_uid", lambda _self: uid)
    async with log(one) as answer:
        assert answer.status == 401 and "own user and root" in (await answer.json())["error"]["message"]
    assert one.node.log_queries == [] and (await one.ask(CHAT))[0] == 200


async def test_watchers_are_bounded(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "MOST", 1)
    async with log(one) as first:
        await first.content.readline()
        for path in ("/logs/stream/m", "/api/events"):
            async with one.session.get(one.url + path) as answer:
                assert answer.status == 503 and answer.headers["Retry-After"] == "5"
    async with asyncio.timeout(5):
        while True:
            async with log(one) as answer:
                if answer.status == 200:
                    break


# --- properties ---


async def props(one: Lab, query: str = "", **headers: str) -> tuple[int, dict[str, object]]:
    async with one.session.get(f"{one.url}/props{query}", headers=headers) as answer:
        return answer.status, await answer.json()


async def test_properties_are_those_of_the_model_that_is_named_or_of_the_only_one(one: Lab) -> None:
    for query in ("?model=m&x=1", "", "?autoload=false"):
        status, answer = await props(one, query)
        assert (status, answer["path"]) == (200, f"/props{query}")
    request, _ = one.engine.seen[0]
    assert request.method == "GET"
    assert (await props(one, "?model=nobody"))[0] == 404


async def test_without_a_model_that_is_meant_they_are_a_routers_and_start_nothing(one: Lab) -> None:
    for ready, engine in ((False, "llamacpp"), (True, "vllm")):
        one.node.pool("m", one.engine_url, ready=ready, engine=engine)
        await one.node.tell()
        await one.until(lambda seen=(ready, engine): _seen(one) == seen, "the gateway to know")
        status, answer = await props(one)
        assert (
            status == 200 and answer["role"] == "router" and answer["default_generation_settings"] == {"params": {}, "n_ctx": 0}
        )
    one.node.pool("m", one.engine_url)
    one.node.pool("n", one.engine_url)
    await one.node.tell()
    await one.until(lambda: len(one.gateway.leasing.directory.open_launches()) == 2, "the gateway to know both")
    assert (await props(one))[1]["role"] == "router", "nobody knows which of the two"
    assert one.node.given == 0 and one.engine.seen == []


def _seen(one: Lab) -> tuple[bool, str | None]:
    """Whether m is loaded, and in what, as far as the gateway knows."""
    place = one.gateway.leasing.directory.place("m")
    assert place is not None
    return place.open, place.engine


async def test_a_model_that_is_not_to_be_loaded_for_them_is_not(one: Lab) -> None:
    one.node.pool("m", one.engine_url, ready=False, state="offline")
    await one.node.tell()
    await one.until(lambda: _seen(one) == (False, "llamacpp"), "the gateway to know")
    status, answer = await props(one, "?model=m&autoload=false")
    assert status == 503 and "'m' is not loaded" in str(answer["error"]) and one.node.given == one.node.waits == 0
    asking = asyncio.create_task(props(one, "?model=m"))
    await one.until(lambda: one.node.waits == 1, "it to be asked for")
    one.node.pool("m", one.engine_url)
    await one.node.tell()
    assert (await asking)[0] == 200


async def test_keys_hold_for_properties_too(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    good, other = keys.add("good", models=("alias",)), keys.add("other", models=("n",))
    async with lab(dataclasses.replace(OPTIONS, keys=KeyFile(keys.place)), names=["m", "alias"]) as one:
        assert (await props(one))[0] == 401
        assert (await props(one, "?model=m", **{"x-api-key": other}))[0] == 403
        assert (await props(one, **{"x-api-key": other}))[1]["role"] == "router"
        assert (await props(one, **{"x-api-key": good}))[1]["path"] == "/props"
