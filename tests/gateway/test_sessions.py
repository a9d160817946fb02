"""Pools that share a name: the requests of one session go to one of them, as long as that can serve them at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pool_managerd.gateway.asked import Asked, in_json
from pool_managerd.gateway.sessions import SessionNames
from tests.gateway.lab import OPTIONS, TIMES, Lab, lab

CHAT = {"model": "chat", "messages": []}
NAMES = SessionNames(("x-session-id", "x-openwebui-chat-id"))
ANYONE = Asked("chat", stream=False, body=b"")


@asynccontextmanager
async def alike(linger_s: float) -> AsyncIterator[Lab]:
    """Pools m and n, both called chat."""
    options = dataclasses.replace(OPTIONS, sessions=NAMES, leases=dataclasses.replace(TIMES, linger_s=linger_s))
    async with lab(options, names=["m", "chat"]) as made:
        made.node.pool("n", made.engine_url, names=["n", "chat"], slots=2)
        await made.node.tell()
        await made.until(lambda: made.gateway.leasing.directory.shared("chat"), "the gateway to know both")
        yield made


@pytest.fixture
async def two() -> AsyncIterator[Lab]:
    """Between requests no lease is kept."""
    async with alike(0) as made:
        yield made


def of(session: str) -> dict[str, str]:
    return {"x-session-id": session}


async def ask(one: Lab, session: str | None = None, **body: str) -> str:
    """The pool that served it."""
    status, _ = await one.ask({**CHAT, **body}, headers={} if session is None else of(session))
    assert status == 200
    await one.until(lambda: not one.node.leases, "its lease to be back")
    return one.node.served[-1]


async def begin(one: Lab, model: str, session: str | None = None) -> asyncio.Task[tuple[int, object]]:
    """A request that runs until the engine may take a step."""
    before = one.engine.running
    one.engine.step = one.engine.step or asyncio.Semaphore(0)
    asking = asyncio.create_task(one.ask({**CHAT, "model": model}, headers={} if session is None else of(session)))
    await one.until(lambda: one.engine.running == before + 1, "it to run")
    return asking


async def end(one: Lab, *asking: asyncio.Task[tuple[int, object]]) -> None:
    assert one.engine.step is not None
    for _ in asking:
        one.engine.step.release()
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * len(asking)
    one.engine.step = None
    await one.until(lambda: not one.gateway.leasing.used(), "none to be in use")


async def at_n(one: Lab, session: str) -> None:
    """A first request of it goes to n, as m is in use."""
    busy = await begin(one, "m")
    asking = await begin(one, "chat", session)
    assert one.node.served[-1] == "n"
    await end(one, busy, asking)


async def test_a_session_goes_where_it_was_served_last(two: Lab) -> None:
    assert await ask(two) == "m", "the node's own choice"
    await at_n(two, "s")
    assert await ask(two, "s") == "n" and await ask(two, "other") == "m" and await ask(two) == "m"
    assert await ask(two, "s") == "n"


async def test_a_lease_that_is_kept_of_its_pool_is_used_before_others() -> None:
    async with alike(30) as one:
        await at_n(one, "s")
        for _ in range(2):
            assert (await one.ask(CHAT, headers=of("s")))[0] == 200
        async with one.session.get(one.url + "/v1/requests") as answer:
            assert [row["pool_id"] for row in await answer.json()] == ["m", "n", "n", "n"]
        assert one.node.served == ["m", "n"]


async def test_one_whose_pool_has_no_slot_at_once_is_served_elsewhere_and_stays_there(two: Lab) -> None:
    await at_n(two, "s")
    busy = [await begin(two, "n"), await begin(two, "n")]
    asking = await begin(two, "chat", "s")
    assert two.node.served[-1] == "m" and two.node.waits == 0
    await end(two, *busy, asking)
    assert await ask(two, "s") == "m"


async def test_one_whose_pool_is_used_up_by_others_is_served_elsewhere(two: Lab) -> None:
    await at_n(two, "s")
    two.node.leases |= {"theirs": "n", "too": "n"}
    status, _ = await two.ask(CHAT, headers=of("s"))
    assert status == 200 and two.node.served[-1] == "m"


async def test_one_whose_pool_takes_no_requests_is_served_elsewhere(two: Lab) -> None:
    await at_n(two, "s")
    two.node.rows["n"] |= {"ready": False, "state": "offline"}
    await two.node.tell()
    await two.until(lambda: "n" not in two.gateway.leasing.directory.open_launches(), "the gateway to know")
    assert await ask(two, "s") == "m"


async def test_a_session_is_named_by_the_body_where_no_header_does(two: Lab) -> None:
    await at_n(two, "s")
    assert await ask(two, "s", prompt_cache_key="m's") == "n", "the header counts first"
    busy = await begin(two, "m")
    asking = asyncio.create_task(two.ask({**CHAT, "prompt_cache_key": "k"}))
    await two.until(lambda: two.engine.running == 2, "it to run")
    await end(two, busy, asking)
    assert await ask(two, prompt_cache_key="k") == "n" and await ask(two, prompt_cache_key="l") == "m"


async def test_nothing_is_kept_of_sessions_where_one_pool_has_the_name(two: Lab) -> None:
    known = two.gateway.leasing._common.sessions
    await two.ask({**CHAT, "model": "m"}, headers=of("s"))
    assert not any(known._bytes[:])
    await two.ask(CHAT, headers=of("s"))
    assert any(known._bytes[:])


def test_a_session_is_one_of_its_caller_and_its_model() -> None:
    named = of("s")
    told = NAMES.of(named, ANYONE, "laptop")
    assert told is not None and told == NAMES.of({**named, "x-openwebui-chat-id": "t"}, ANYONE, "laptop")
    assert NAMES.of(named, ANYONE, "guest") != told != NAMES.of(named, dataclasses.replace(ANYONE, model="n"), "laptop")
    assert NAMES.of({"x-openwebui-chat-id": "s"}, ANYONE, "laptop") == told


def test_a_request_that_names_none_is_of_none() -> None:
    assert NAMES.of({}, ANYONE, None) is None and NAMES.of({"x-session-id": ""}, ANYONE, None) is None
    keyed = in_json(b'{"model": "chat", "prompt_cache_key": "k"}')
    assert NAMES.of({}, keyed, None) is not None and SessionNames().of(of("s"), keyed, None) is None
    for odd in (b"5", b'""', b"null", b'{"a": 1}'):
        assert NAMES.of({}, in_json(b'{"model": "chat", "prompt_cache_key": %s}' % odd), None) is None
    assert NAMES.of({"x-session-id": "\udcff"}, ANYONE, None) is not None
