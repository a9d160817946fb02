"""The event stream and the followed log: resume, heartbeats, bounds (FAULTS H3)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from aiohttp import ClientResponse, ClientTimeout

from tests.api.conftest import Served


async def frames(response: ClientResponse, count: int) -> list[dict[str, Any]]:
    """The next ``count`` events of the stream, with the SSE id and name checked against the data."""
    found: list[dict[str, Any]] = []
    name = identity = ""
    async with asyncio.timeout(5):
        while len(found) < count:
            line = (await response.content.readline()).decode().rstrip("\n")
            key, _, value = line.partition(": ")
            if key == "id":
                identity = value
            elif key == "event":
                name = value
            elif key == "data":
                data = json.loads(value)
                assert (str(data["id"]), data["type"]) == (identity, name)
                found.append(data)
    return found


async def test_events_arrive_live_and_resume_after_the_last_seen(api: Served) -> None:
    api.node.events.publish("transition", "demo", from_state="down", to_state="staging")
    async with api.session.get(api.url + "/v1/events?after=0") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        (first,) = await frames(response, 1)
        assert (first["pool_id"], first["to_state"]) == ("demo", "staging")
        api.node.events.publish("crash", "demo", exit_code=3)
        api.node.events.publish("spawn", "demo")
        assert [event["type"] for event in await frames(response, 2)] == ["crash", "spawn"]
    async with api.session.get(api.url + "/v1/events", headers={"Last-Event-ID": "2"}) as response:
        assert [event["id"] for event in await frames(response, 1)] == [3]
    async with api.session.get(api.url + "/v1/events", headers={"Last-Event-ID": "x"}) as response:
        assert response.status == 400


async def test_a_client_that_resumes_behind_what_is_not_kept_is_told_first(api: Served) -> None:
    api.node.events.publish("spawn", "demo")
    async with api.session.get(api.url + "/v1/events", headers={"Last-Event-ID": "77"}) as response:
        gap, first = await frames(response, 2)
    assert (gap["type"], gap["id"], gap["after_id"], gap["oldest_id"], first["id"]) == ("gap", 0, 77, 1, 1)


async def test_what_only_metrics_count_is_not_streamed_and_the_past_can_be_read_without_following(api: Served) -> None:
    api.node.events.publish("probe", "demo", journal=False, outcome="success")
    api.node.events.publish("spawn", "demo")
    async with api.session.get(api.url + "/v1/events?follow=false", timeout=ClientTimeout(5)) as response:
        text = await response.text()
    assert "event: spawn" in text
    assert "probe" not in text


async def test_a_quiet_stream_shows_signs_of_life(api: Served) -> None:
    async with api.session.get(api.url + "/v1/events") as response, asyncio.timeout(5):
        beats = 0
        while beats < 3:
            beats += (await response.content.readline()).startswith(b": ")


async def test_a_reader_that_is_cut_off_for_being_slow_gets_the_end_of_its_stream(api: Served) -> None:
    api.node.events.queue_limit = 5
    async with api.session.get(api.url + "/v1/events") as response:
        await _until(lambda: len(api.node.events.subscriptions) == 1)
        for _ in range(10):
            api.node.events.publish("spawn", "demo")
        async with asyncio.timeout(5):
            await response.content.read()
    assert api.node.events.subscriptions[0].closed


async def test_a_reader_that_takes_nothing_is_disconnected(api: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1024)
    writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await _until(lambda: len(api.node.events.subscriptions) == 1)
    api.node.events.queue_limit = 100_000
    for _ in range(400):
        api.node.events.publish("notice", "demo", text="x" * 50_000)
    await _until(lambda: api.node.events.subscriptions[0].closed)
    writer.close()
    assert (await api.call("GET", "/health"))[0] == 200


async def test_streams_are_bounded_in_number(api: Served) -> None:
    held = [await api.session.get(api.url + "/v1/events") for _ in range(3)]
    status, body = await api.call("GET", "/v1/events")
    assert (status, body["code"]) == (503, "TOO_MANY_REQUESTS")
    for response in held:
        response.close()
    await _until(lambda: api.server._context.open_streams == 0)
    async with api.session.get(api.url + "/v1/events") as response:
        assert response.status == 200


async def test_the_server_closes_while_streams_are_open(api: Served) -> None:
    async with api.session.get(api.url + "/v1/events") as response:
        async with asyncio.timeout(5):
            await api.server.close()
            assert (await response.content.read()).startswith(b"retry")


async def test_a_log_is_read_and_followed_through_rotation(api: Served, tmp_path: Path) -> None:
    log = api.node.log_file = tmp_path / "engine.log"
    log.write_bytes(b"first line\nsecond line\n")
    async with api.session.get(api.url + "/v1/pools/demo/logs?lines=1") as response:
        assert await response.text() == "second line\n"
        assert response.headers["Content-Type"].startswith("text/plain")
    async with api.session.get(api.url + "/v1/pools/demo/logs?lines=2&follow=true") as response, asyncio.timeout(5):
        assert await response.content.readline() == b"first line\n"
        assert await response.content.readline() == b"second line\n"
        with log.open("ab") as file:
            file.write(b"appended \xff raw\n")
        assert await response.content.readline() == b"appended \xff raw\n"
        log.rename(tmp_path / "engine.log.1")
        log.write_bytes(b"rotated\n")
        assert await response.content.readline() == b"rotated\n"


async def test_a_log_as_events_resumes_behind_the_last_one_and_shows_signs_of_life(api: Served, tmp_path: Path) -> None:
    log = api.node.log_file = tmp_path / "engine.log"
    log.write_bytes(b"first\nsecond\n")
    url, sse = api.url + "/v1/pools/demo/logs?follow=true", {"Accept": "text/event-stream"}
    async with api.session.get(url + "&lines=1", headers=sse) as response, asyncio.timeout(5):
        assert response.headers["Content-Type"] == "text/event-stream"
        assert [frame["text"] for frame in await log_frames(response, 2)] == ["second\n", ""]
    log.write_bytes(log.read_bytes() + b"third \xff\rfourth\n")
    place = f"{log.stat().st_ino}:13"
    async with asyncio.timeout(5):
        async with api.session.get(url + "&lines=0", headers=sse | {"Last-Event-ID": place}) as response:
            given, end = await log_frames(response, 2)
            assert (given["text"], end["text"]) == ("third \ufffd\\rfourth\n", "")
            while not (await response.content.readline()).startswith(b": "):
                pass
        async with api.session.get(url.replace("true", "false") + f"&after={end['id']}", headers=sse) as response:
            assert await response.text() == ""
        for wrong in ("7", "7:", "7:x", "-1:3", "%C2%B2:3"):
            async with api.session.get(f"{url}&after={wrong}") as response:
                assert response.status == 400


async def log_frames(response: ClientResponse, count: int) -> list[dict[str, Any]]:
    """The next frames of a log as events; each id is in its data, too."""
    found: list[dict[str, Any]] = []
    place = ""
    while len(found) < count:
        key, _, value = (await response.content.readline()).decode().rstrip("\n").partition(": ")
        if key == "id":
            place = value
        elif key == "data":
            found.append(json.loads(value))
            assert found[-1]["id"] == place
    return found


async def test_a_link_in_the_place_of_a_log_is_not_followed(api: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hidden\n")
    api.node.log_file = tmp_path / "engine.log"
    api.node.log_file.symlink_to(secret)
    async with api.session.get(api.url + "/v1/pools/demo/logs?lines=0&follow=true") as response:
        secret.write_text("hidden again and longer\n")
        try:
            async with asyncio.timeout(0.2):
                assert await response.content.read(1) == b""
        except TimeoutError:
            pass


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
