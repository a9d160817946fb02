"""What a stream waits for is told in it, where that is wanted, and over before the answer begins."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.config.pools import RequestRules
from pool_managerd.gateway.asked import in_json
from pool_managerd.gateway.directory import Place
from pool_managerd.gateway.keys import KeyFile
from pool_managerd.gateway.loading_text import LoadingText
from pool_managerd.gateway.rules import for_engine
from tests.gateway.lab import CHUNK, LIMITS, OPTIONS, Lab, lab

STREAM = {"model": "m", "messages": [], "stream": True}
TELLING = dataclasses.replace(OPTIONS, loading_text=True, limits=dataclasses.replace(LIMITS, heartbeat_s=60))
LOADING = {"state": "starting", "step": "engine", "estimate_ms": 11_300, "waits_for": "it to be ready"}
LAST = CHUNK.decode() * 3 + "data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadingText, "after_s", 0.02)
    monkeypatch.setattr(LoadingText, "every_s", 0.02)


@pytest.fixture
async def one() -> AsyncIterator[Lab]:
    async with lab(TELLING) as made:
        made.node.slots = 0
        yield made


def reasoning(text: str) -> Iterator[dict[str, Any]]:
    """Its chunks, without the engine's."""
    for event in text.replace(CHUNK.decode(), "").split("\n\n"):
        if event.startswith("data: {"):
            yield json.loads(event.removeprefix("data: "))


def said(text: str) -> list[str]:
    return [chunk["choices"][0]["delta"]["reasoning_content"] for chunk in reasoning(text)]


async def begin(one: Lab, row: dict[str, Any], **options: Any) -> asyncio.Task[str]:
    """A stream that has told what it waits for."""
    one.node.row, asked = row, one.node.queue_asked
    asking = asyncio.create_task(one.text(STREAM, **options))
    await one.until(lambda: one.node.queue_asked > asked + 2, "the queue to be asked")
    return asking


async def test_a_stream_tells_what_it_waits_for_when_that_changes_and_then_answers(one: Lab) -> None:
    asking = await begin(one, LOADING)
    asked = one.node.queue_asked
    one.node.row = {**LOADING, "step": "warm-up", "estimate_ms": 2_100}
    await one.until(lambda: one.node.queue_asked > asked + 2, "the queue to be asked")
    await one.node.tell(slots=4)
    text = await asking
    first, second, last = said(text)
    assert first == "m is loading (engine), about 15 s left\n" and second == "m is loading (warm-up), about 3 s left\n"
    assert last.startswith("m is ready after ") and text.endswith(LAST)
    chunk = next(reasoning(text))
    assert chunk["object"] == "chat.completion.chunk" and chunk["model"] == "m" and chunk["choices"][0]["index"] == 0


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({}, "m is busy: number 1 in line for a slot"),
        ({**LOADING, "estimate_ms": None}, "m is loading (engine)"),
        ({**LOADING, "place": 3, "estimate_ms": 70_000}, "m is loading (engine), about 75 s left; number 3 in line"),
        (
            {"state": "offline", "waits_for": "pool 'n' must end what it has in hand first"},
            "m is not loaded yet, waiting for pool 'n' must end what it has in hand first",
        ),
        ({"holder": "somebody"}, "m: waiting in line"),
    ],
)
async def test_it_is_told_as_far_as_the_node_knows(one: Lab, row: dict[str, Any], line: str) -> None:
    asking = await begin(one, row)
    await one.node.tell(slots=4)
    assert said(await asking)[0] == line + "\n"


async def test_whoever_has_a_key_is_not_told_of_other_models(tmp_path: Path) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.add("guest", models=("m",))
    async with lab(dataclasses.replace(TELLING, keys=keys)) as one:
        one.node.slots = 0
        asking = await begin(one, {"state": "offline", "waits_for": "pool 'n' to end"}, headers={"x-api-key": key})
        await one.node.tell(slots=4)
        assert said(await asking)[0] == "m is not loaded yet\n"


async def test_an_error_afterwards_is_in_the_stream(one: Lab) -> None:
    asking = await begin(one, LOADING)
    await one.node.tell(refusal=(500, {"code": "PRELOAD_FAILED", "message": "preload failed: out_of_memory"}))
    text = await asking
    assert said(text.partition('data: {"error"')[0]) == ["m is loading (engine), about 15 s left\n"]
    assert text.endswith('"code":"preload_failed"}}\n\n') and "is ready" not in text


async def test_one_that_is_served_or_refused_at_once_tells_nothing(one: Lab) -> None:
    await one.node.tell(slots=4)
    assert await one.text(STREAM) == LAST
    await one.node.tell(slots=0, refusal=(429, {"code": "QUEUE_FULL", "message": "full"}))
    one.gateway.leasing._kept.let_go("m")
    assert (await one.ask(STREAM))[0] == 429


@pytest.mark.parametrize(("path", "stream"), [("/v1/messages", True), ("/v1/completions", True), ("/v1/chat/completions", False)])
async def test_nothing_is_told_where_there_is_no_place_for_it(one: Lab, path: str, stream: bool) -> None:
    telling = await begin(one, LOADING)
    asking = asyncio.create_task(one.text({**STREAM, "stream": stream}, path))
    await one.until(lambda: one.node.waits == 2, "it to wait")
    asked = one.node.queue_asked
    await one.until(lambda: one.node.queue_asked > asked + 2, "the other one to be told")
    await one.node.tell(slots=4)
    assert "loading" not in await asking and "loading" in await telling


async def test_a_path_without_a_version_is_the_same(one: Lab) -> None:
    one.node.row = LOADING
    asking = asyncio.create_task(one.text(STREAM, "/chat/completions"))
    await one.until(lambda: one.node.queue_asked > 1, "the queue to be asked")
    await one.node.tell(slots=4)
    assert "loading" in await asking


@pytest.mark.parametrize(("by_default", "own", "tells"), [(False, True, True), (True, False, False), (False, None, False)])
async def test_a_pool_may_say_otherwise(by_default: bool, own: bool | None, tells: bool) -> None:
    options = dataclasses.replace(TELLING, loading_text=by_default)
    rules = RequestRules(loading_text=own).model_dump(mode="json")
    async with lab(options, rules=rules) as one, lab(TELLING) as other:
        one.node.slots = other.node.slots = 0
        asking = asyncio.create_task(one.text(STREAM))
        await one.until(lambda: one.node.waits == 1, "it to wait")
        telling = await begin(other, LOADING)
        await other.node.tell(slots=4)
        await telling
        await one.node.tell(slots=4)
        assert ("m is " in await asking) is tells


async def test_the_queue_is_asked_once_however_many_wait(one: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadingText, "every_s", 60.0)
    asking = [asyncio.create_task(one.text(STREAM)) for _ in range(4)]
    await one.until(lambda: one.node.waits == 4, "all to wait")
    telling = LoadingText(one.gateway.leasing, by_default=True)
    rows = await asyncio.gather(*(telling._row("x") for _ in range(8)))
    assert rows == [None] * 8 and one.node.queue_asked <= 2
    await one.node.tell(slots=4)
    assert all(text.endswith(LAST) for text in await asyncio.gather(*asking))


def test_a_pool_that_only_tells_leaves_bodies_as_they_were_written() -> None:
    rules = RequestRules(loading_text=True).model_dump(mode="json")
    raw = b'{ "model":"m", "n" : 1.50 }'
    assert for_engine(in_json(raw), Place.of({"pool_id": "m", "rules": rules})) == raw
