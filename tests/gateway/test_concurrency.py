"""How many requests a model has at once: who is refused, where others go, and what is not counted."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool_managerd.config.pools import RequestRules
from pool_managerd.errors import RequestError
from pool_managerd.gateway.concurrency import Concurrency, Counted
from pool_managerd.gateway.directory import Directory
from pool_managerd.gateway.sessions import SessionNames
from pool_managerd.gateway.tally import Tally
from tests.gateway.lab import OPTIONS, Json, Lab, lab

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}


def limit(most: int) -> Json:
    return RequestRules(concurrency=most).model_dump(mode="json")


def release(one: Lab, count: int) -> None:
    """So many answers may be given."""
    assert one.engine.step is not None
    for _ in range(count):
        one.engine.step.release()


@asynccontextmanager
async def running(one: Lab, count: int, model: str = "m") -> AsyncIterator[None]:
    """While so many requests for ``model`` run on engines, or wait."""
    one.engine.step = asyncio.Semaphore(0)
    asking = [asyncio.create_task(one.ask({**CHAT, "model": model})) for _ in range(count)]
    live = one.gateway._requests._live
    await one.until(lambda: len(live) == count and one.engine.running + one.node.waits == count, "all to run, or to wait")
    try:
        yield
    finally:
        release(one, count)
    assert [status for status, _ in await asyncio.gather(*asking)] == [200] * count
    one.engine.step = None


@asynccontextmanager
async def two_pools(most: tuple[int | None, int | None], slots: int = 4) -> AsyncIterator[Lab]:
    """``m`` and ``n``, both ``chat``, too."""
    async with lab(dataclasses.replace(OPTIONS, sessions=SessionNames(("x-session-id",)))) as one:
        one.node.slots = 99
        for pool_id, own in zip("mn", most, strict=True):
            rules = None if own is None else limit(own)
            one.node.pool(pool_id, one.engine_url, names=[pool_id, "chat"], slots=slots, rules=rules)
        await one.node.tell()
        await one.until(lambda: one.gateway.leasing.directory.shared("chat"), "the gateway to know both")
        yield one


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_one_more_than_the_limit_is_told_to_come_again(path: str, body: Json) -> None:
    async with lab(rules=limit(2)) as one:
        async with running(one, 2), one.session.post(one.url + path, json=body) as answer:
            assert answer.status == 429 and answer.headers["Retry-After"] == "1" and answer.headers["x-should-retry"] == "true"
            error = (await answer.json())["error"]
        assert error["type"] == "rate_limit_error" and "more than 2 requests for 'm' at once" in error["message"]
        assert error.get("code") == (None if path == "/v1/messages" else "concurrency_limit")
        async with one.session.get(one.url + "/metrics") as answer:
            assert 'tasks_rejected_total{reason="CONCURRENCY_LIMIT"} 1.0' in await answer.text()
        assert (await one.ask(CHAT))[0] == 200, "there is room again"


async def test_those_that_wait_are_counted_and_one_that_goes_away_no_more() -> None:
    async with lab(rules=limit(3), slots=1) as one:
        async with running(one, 2):
            waiting = asyncio.create_task(one.ask(CHAT))
            await one.until(lambda: one.node.waits == 2, "it to wait")
            assert (await one.ask(CHAT))[0] == 429
            waiting.cancel()
            await one.until(lambda: one.node.gave_up == 1, "it to be gone")
            again = asyncio.create_task(one.ask(CHAT))
            await one.until(lambda: one.node.waits == 2, "another one to wait in its place")
            await one.node.tell(waiting=True)
            release(one, 1)
        assert (await again)[0] == 200


async def test_pages_are_not_counted_and_are_not_refused() -> None:
    async with lab(rules=limit(1)) as one, running(one, 1):
        assert (await one.ask(CHAT))[0] == 429
        assert (await one.ask(CHAT, "/upstream/m/v1/chat/completions"))[0] == 429, "the way around is none"
        held, one.engine.step = one.engine.step, None
        for path in ("/upstream/m/index.css", "/props?model=m", "/upstream/m/slots", "/running", "/v1/models", "/health"):
            async with one.session.get(one.url + path) as answer:
                assert answer.status == 200
        one.engine.step = held


async def test_a_request_goes_to_another_pool_of_the_name_until_all_are_full() -> None:
    async with two_pools((1, 2)) as one:
        async with running(one, 3, "chat"):
            assert sorted(one.node.leases.values()) == ["m", "n", "n"]
            for name in ("m", "n", "chat"):
                assert (await one.ask({**CHAT, "model": name}))[0] == 429
        assert (await one.ask({**CHAT, "model": "chat"}))[0] == 200


async def test_a_pool_without_a_limit_takes_what_the_other_may_not_have() -> None:
    async with two_pools((1, None)) as one, running(one, 8, "chat"):
        assert sorted(one.node.leases.values()) == ["m", *["n"] * 4] and one.node.waits == 3
        assert (await one.ask(CHAT))[0] == 429
        await one.node.tell(waiting=True)


async def test_a_burst_finds_all_the_slots_that_there_are() -> None:
    async with two_pools((4, 4)) as one, running(one, 8, "chat"):
        assert sorted(one.node.leases.values()) == ["m"] * 4 + ["n"] * 4
        assert (await one.ask({**CHAT, "model": "chat"}))[0] == 429


async def test_a_pool_is_full_under_each_of_its_names() -> None:
    async with lab(names=["m", "alias"], rules=limit(2)) as one, running(one, 2):
        assert (await one.ask({**CHAT, "model": "alias"}))[0] == 429


async def test_a_session_goes_elsewhere_where_its_pool_is_full() -> None:
    async with two_pools((1, None)) as one:
        asked, session = {**CHAT, "model": "chat"}, {"x-session-id": "s"}
        async with running(one, 4, "n"):  # so that its first request finds no slot but on m
            asking = asyncio.create_task(one.ask(asked, headers=session))
            await one.until(lambda: one.engine.running == 5, "it to run")
            assert list(one.node.leases.values()).count("m") == 1
            release(one, 1)
        assert (await asking)[0] == 200
        async with running(one, 1):
            asking = asyncio.create_task(one.ask(asked, headers=session))
            await one.until(lambda: one.engine.running == 2, "it to run")
            held = [lease.pool_id for lease in one.gateway.leasing._kept.in_use.values()]
            assert sorted(held) == ["m", "n"]
            release(one, 1)
        assert (await asking)[0] == 200


async def test_a_limit_that_is_changed_holds_for_the_next_request() -> None:
    async with lab(rules=limit(1)) as one, running(one, 1):
        one.node.rows["m"]["rules"] = limit(2)
        await one.node.tell()
        await one.until(lambda: one.gateway.leasing.directory.limits == {"m": 2}, "the gateway to know")
        second = asyncio.create_task(one.ask(CHAT))
        await one.until(lambda: one.engine.running == 2, "one more to run")
        assert (await one.ask(CHAT))[0] == 429
        one.node.rows["m"]["rules"] = None
        await one.node.tell()
        await one.until(lambda: not one.gateway.leasing.directory.limits, "there to be none")
        third = asyncio.create_task(one.ask(CHAT))
        await one.until(lambda: one.engine.running == 3, "any to run")
        others = asyncio.gather(second, third)
        release(one, 2)
    assert [status for status, _ in await others] == [200, 200]


async def test_whoever_goes_away_at_any_moment_is_counted_no_more() -> None:
    async with lab(rules=limit(50)) as one:
        one.node.slots = 2
        asking = [asyncio.create_task(one.text(STREAM)) for _ in range(60)]
        for number, task in enumerate(asking):
            await asyncio.sleep(number % 7 / 2000)
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await one.until(lambda: not one.gateway._requests._live, "all to be gone")
        assert one.gateway.leasing._concurrency.here("m") == 0


async def test_an_engine_that_ends_costs_no_request_its_place() -> None:
    async with lab(rules=limit(1)) as one:
        one.engine.refuses = 1
        one.node.pool("n", one.engine_url, names=["n", "m"])
        assert (await one.ask(CHAT))[0] in (200, 502)
        assert (await one.ask(CHAT))[0] == 200 and one.gateway.leasing._concurrency.here("m") == 0


names = st.sampled_from(["a", "b", "c", "ab", "abc"])


@given(
    st.fixed_dictionaries(dict.fromkeys("abc", st.none() | st.integers(1, 4))),
    st.lists(st.tuples(names, st.integers(0, 2), st.booleans()), max_size=40),
)
def test_no_more_are_let_in_than_the_pools_may_have(limits: dict[str, int | None], asked: list[tuple[str, int, bool]]) -> None:
    directory = Directory()
    rows = [
        {"pool_id": one, "names": [one, *(name for name in ("ab", "abc") if one in name)], "rules": {"concurrency": most}}
        for one, most in limits.items()
    ]  # fmt: skip
    directory.learn({"pools": rows, "gone": [], "waiting": False}, whole=True)
    concurrency, live = Concurrency(directory, Tally()), list[Counted]()
    for name, pick, leaves in asked:
        if leaves and live:
            live.pop(pick % len(live)).over()
        try:
            found = concurrency.counted(name, directory.pools(name))
        except RequestError as problem:
            assert problem.code == "CONCURRENCY_LIMIT" and all(concurrency.room(pool) <= 0 for pool in directory.pools(name))
            continue
        assert limits[found.pool_id] is None or concurrency.here(found.pool_id) <= (limits[found.pool_id] or 0)
        able = found.pools()
        if pick < len(able):
            found.goes_to(able[pick])
        live.append(found)
        assert all(most is None or concurrency.here(one) <= most for one, most in limits.items())
    for one in live:
        one.over()
    assert [concurrency.here(one) for one in limits] == [0] * 3
