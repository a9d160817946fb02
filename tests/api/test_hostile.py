"""Requests made to hurt: paths, bodies, dribbling clients, too many of them (FAULTS H1, H5, H7, H13)."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pool_managerd.api import requests, strict_json
from pool_managerd.errors import RequestError
from pool_managerd.httpd.server import HttpLimits
from tests.api.conftest import LIMITS, Served, close, serve
from tests.api.fake_node import FakeNode

BAD_IDS = [
    "..%2fetc",
    "%2e%2e",
    "%00",
    "a%00b",
    ".",
    "a" * 300,
    "a%2fb",
    "%E2%88%95x",
    "a..b",
    "-x",
    "a%0d%0ab",
    "%ff",
    "x%20y",
    "{}",
]


def _with(**changes: Any) -> HttpLimits:
    return dataclasses.replace(LIMITS.http, **changes)


@pytest.fixture
async def small() -> AsyncIterator[Served]:
    """Two requests at a time, three connections."""
    served = await serve(FakeNode(auto=False), limits=dataclasses.replace(LIMITS, http=_with(max_connections=3), max_requests=1))
    yield served
    await close(served)


@pytest.fixture
async def hasty() -> AsyncIterator[Served]:
    """A head must come within a moment."""
    served = await serve(FakeNode(), limits=dataclasses.replace(LIMITS, http=_with(head_timeout_s=0.3)))
    yield served
    await close(served)


async def raw(port: int, data: bytes, *, until_close: bool = True) -> bytes:
    """What the server says to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            return await (reader.read() if until_close else reader.readuntil(b"\r\n"))
    finally:
        writer.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


@pytest.mark.parametrize("bad", BAD_IDS)
async def test_an_impossible_pool_id_is_an_unknown_pool_to_reads_and_a_bad_request_to_creators(api: Served, bad: str) -> None:
    for suffix in ("status", "logs", "command", "leases"):
        answer = await raw(api.port, get(f"/v1/pools/{bad}/{suffix}"))
        assert answer.startswith(b"HTTP/1.1 404"), (bad, answer[:100])
        assert b"\x00" not in answer
        assert b"x" * 80 not in answer
        assert b"a" * 80 not in answer
    request = f"POST /v1/pools/{bad}/preload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    answer = await raw(api.port, request.encode())
    assert answer.split()[1] in (b"400", b"404"), answer[:100]
    assert api.node.calls == []


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"holder":"a","holder":"b"}', "given twice"),
        (b'{"ttl_ms":NaN}', "NaN"),
        (b'{"ttl_ms":Infinity}', "Infinity"),
        (b'{"ttl_ms":1e999}', "out of range"),
        (b'{"ttl_ms":' + b"9" * 5000 + b"}", "digits"),
        (b'{"holder":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
        (b"[" * 400_000, "nested deeper"),
        (b"[1]", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"{", "cannot read the request body as JSON"),
        (b'{"holder":"\xff"}', "not UTF-8"),
        (b'{"holder":"\\ud800"}', "surrogate"),
        (b'{"color":1}', "color"),
        (b'{"ttl_ms":true}', "ttl_ms"),
        (b'{"ttl_ms":"5"}', "ttl_ms"),
        (b'{"ttl_ms":0}', "ttl_ms"),
        (b'{"holder":""}', "holder"),
        (b'{"holder":"' + b"x" * 300 + b'"}', "holder"),
    ],
)
async def test_a_hostile_body_is_a_quick_400_that_says_why(api: Served, body: bytes, why: str) -> None:
    began = time.monotonic()
    status, answer = await api.call("POST", "/v1/pools/demo/leases", data=body, headers={"Content-Type": "application/json"})
    assert time.monotonic() - began < 1
    assert status == 400
    assert why in answer["message"]
    assert len(answer["message"]) < 700
    assert api.node.lease_ids["demo"] == []


def test_deep_brackets_inside_a_string_are_no_nesting() -> None:
    assert strict_json.parse(b'{"a":"' + b"[{" * 100 + b'"}') == {"a": "[{" * 100}
    with pytest.raises(RequestError, match="nested deeper"):
        strict_json.parse(b"[" * 33 + b"]" * 33)
    assert strict_json.parse(b"[" * 32 + b"]" * 32)


async def test_a_body_over_one_mebibyte_is_a_413(api: Served) -> None:
    body = b'{"holder":"' + b"x" * (1024 * 1024) + b'"}'
    status, answer = await api.call(
        "POST", "/v1/pools/demo/leases", data=io.BytesIO(body), headers={"Content-Type": "application/json"}
    )
    assert (status, answer["code"]) == (413, "BODY_TOO_LARGE")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_a_body_that_a_web_page_could_send_is_a_415(api: Served, content_type: str) -> None:
    status, answer = await api.call("POST", "/v1/pools/demo/stop", data=b"{}", headers={"Content-Type": content_type})
    assert (status, answer["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert api.node.calls == []


async def test_a_compressed_body_is_a_415(api: Served) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    status, _ = await api.call("POST", "/v1/pools/demo/leases", data=b"\x1f\x8b", headers=headers)
    assert status == 415


@pytest.mark.parametrize(
    "query", ["lines=-1", "lines=x", "lines=99999999999999999999", "lines=10001", "follow=maybe", "lines=%D9%A1"]
)
async def test_a_bad_query_is_a_400(api: Served, query: str) -> None:
    assert (await api.call("GET", f"/v1/pools/demo/logs?{query}"))[0] == 400


async def test_huge_headers_and_garbage_are_refused_and_the_server_goes_on(api: Served) -> None:
    big = f"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Big: {'x' * 20_000}\r\n\r\n".encode()
    many = b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(500)) + b"\r\n"
    for data in (big, many, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET /\x00 HTTP/9.9\r\n\r\n"):
        assert (await raw(api.port, data)).startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert (await api.call("GET", "/health"))[0] == 200


async def test_bytes_that_are_no_request_do_not_fill_the_log(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Bad: \x00\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b" 400 " in answer.splitlines()[0]
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_client_that_dribbles_its_head_is_cut_off_and_the_others_are_not(hasty: Served) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", hasty.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: loc")
    idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", hasty.port)
    idle_writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    async with asyncio.timeout(5):
        assert b"200" in await idle_reader.readuntil(b"}")
        assert await _is_cut_off(reader)
        # The other one has sent a whole request: it may stay for its next one.
        idle_writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in await idle_reader.readuntil(b"}")
    writer.close()
    idle_writer.close()


async def test_a_client_that_dribbles_its_body_is_a_408(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_TIMEOUT_S", 0.1)
    head = (
        b"POST /v1/pools/demo/leases HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    assert (await raw(api.port, head, until_close=False)).startswith(b"HTTP/1.1 408")
    assert api.node.lease_ids["demo"] == []


async def test_over_the_request_limit_others_are_told_to_wait_and_health_still_answers(small: Served) -> None:
    waiting = asyncio.create_task(small.call("POST", "/pools/demo/preload"))
    async with asyncio.timeout(5):
        while not small.node.ops:
            await asyncio.sleep(0.01)
    async with small.session.get(small.url + "/v1/pools") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert (await response.json())["code"] == "TOO_MANY_REQUESTS"
    assert (await small.call("GET", "/health"))[0] == 200
    small.node.ops["op-1"].result.set_result({"pool_id": "demo"})
    assert (await waiting)[0] == 200


async def test_idle_connections_make_room_for_new_ones(small: Served) -> None:
    limit = 16  # the least that a server takes, however few are asked for
    idle = [socket.create_connection(("127.0.0.1", small.port), timeout=5) for _ in range(limit * 3)]
    try:
        for _ in range(3):
            assert b'"status":"ok"' in await raw(small.port, get("/health"))
        assert small.server.connections <= limit
    finally:
        for connection in idle:
            connection.close()


async def _is_cut_off(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"BREW /v1/pools HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"PROPFIND /v1/pools HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", 400),
        (
            b"POST /v1/pools/demo/stop HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nzz",
            400,
        ),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    ],
)
async def test_what_is_no_request_gets_the_shape_of_every_error(api: Served, sent: bytes, status: int) -> None:
    head, _, body = (await raw(api.port, sent)).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert b"Content-Type: application/json" in head
    answer = json.loads(body)
    assert {"code", "message", "error", "retriable", "correlation_id"} <= answer.keys()
    assert answer["message"].startswith("cannot ")
    assert len(body) < 500
