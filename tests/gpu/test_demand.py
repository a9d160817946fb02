"""Starts on demand against a real daemon: two models take turns on a simulated GPU that holds one, for callers over HTTP."""

from __future__ import annotations

import http.client
import json
import select
import socket
import struct
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GpuNode, Json
from tests.gpu.test_sleep import SMALL

CALLERS = 60


@pytest.fixture
def node(make_node: MakeNode, real: MakePool) -> GpuNode:
    """Pools a and b, of which one fits, with real engines."""
    pools = [real(one, vram_bytes=600 << 20, slots=2, ctx=128, preload=False, aliases=[f"{one}-1"]) for one in ("a", "b")]
    return make_node(SMALL, "engines vram=rss", pools=pools).start()


def acquire(node: GpuNode, model: str, **asked: Any) -> tuple[int, Json]:
    code, told = node.post("/v1/acquire", {"model": model, **asked})
    return code, dict(told)


def give_back(node: GpuNode, given: Json) -> None:
    assert node.delete(f"/v1/pools/{given['pool_id']}/leases/{given['lease_id']}")[0] == 200


def answers(url: str) -> bool:
    host, _, port = url.partition("://")[2].partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request(
        "POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 2}), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status == 200


def stream(node: GpuNode, model: str, **asked: Any) -> Generator[tuple[str, Json], None, None]:
    """The events of one request for a slot."""
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=60)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    connection.request("POST", "/v1/acquire", json.dumps({"model": model, **asked}), headers)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    event = ""
    try:
        for line in answer:
            text = line.decode().strip()
            if text.startswith("event: "):
                event = text.removeprefix("event: ")
            elif text.startswith("data: "):
                yield event, json.loads(text.removeprefix("data: "))
    finally:
        answer.close()
        connection.close()


def test_two_models_take_turns_and_each_caller_has_an_engine_that_answers(node: GpuNode) -> None:
    for number, model in enumerate(("a", "b-1", "a", "b")):
        code, given = acquire(node, model)
        assert code == 201 and given["started"] and given["pool_id"] == model[0], given
        assert answers(given["url"]), number
        give_back(node, given)
    assert [line["pool_id"] for line in node.lines("evicted")] == ["a", "b", "a"]
    assert node.status("a")["desired"] == "evicted" and node.status("b")["ready"]


def test_many_callers_of_a_cold_pool_are_one_start(node: GpuNode) -> None:
    def caller(_: int) -> int:
        code, given = acquire(node, "a")
        if code == 201:
            give_back(node, given)
        return code

    with ThreadPoolExecutor(CALLERS) as callers:
        codes = list(callers.map(caller, range(CALLERS)))
    assert codes == [201] * CALLERS and len(node.lines("spawn")) == 1 and node.status("a")["active_leases"] == 0


def test_a_stream_tells_what_is_waited_for_and_then_grants(node: GpuNode) -> None:
    _, held = acquire(node, "a")
    events = stream(node, "b")
    kind, told = next(events)
    assert kind == "waiting" and told["place"] == 1 and told["waits_for"] == "a must end what it has in hand first"
    (row,) = node.get("/v1/queue")[1]
    assert node.status("b")["waiting"] == 1 and 'queue_depth{pool_id="b"} 1.0' in node.get("/metrics")[1]
    assert row["ticket_id"] == told["ticket_id"]
    plan = node.post("/v1/acquire?dry_run=true", {"model": "b"})[1]
    assert [one["pool_id"] for one in plan["stops"]] == ["a"] and plan["stops"][0]["in_flight"] == 1
    give_back(node, held)
    rest = list(events)
    assert rest[-1][0] == "granted" and answers(rest[-1][1]["url"])
    assert {kind for kind, _ in rest[:-1]} <= {"waiting"}
    shown = node.command("queue")
    assert shown.returncode == 0 and "nobody waits" in shown.stdout
    explained = node.command("explain", "--model", "a")
    assert explained.returncode == 0 and "wait for its requests: b (1 in flight" in explained.stdout


def test_a_caller_that_goes_away_waits_no_more_and_one_that_is_cancelled_is_told(node: GpuNode) -> None:
    _, held = acquire(node, "a")
    events = stream(node, "b")
    ticket = next(events)[1]["ticket_id"]
    events.close()
    wait_until(lambda: node.get("/v1/queue")[1] == [], "the ticket to be gone", 10)
    assert node.delete(f"/v1/queue/{ticket}")[0] == 404
    events = stream(node, "b")
    assert node.delete(f"/v1/queue/{next(events)[1]['ticket_id']}")[0] == 200
    kind, told = list(events)[-1]
    assert kind == "error" and told["code"] == "OPERATION_CANCELLED"
    give_back(node, held)
    assert not node.status("b")["live"]


def test_callers_that_vanish_keep_nothing(node: GpuNode) -> None:
    """Reset at every moment from before the grant to after it, with and without a stream."""
    give_back(node, acquire(node, "a")[1])
    body = b'{"model":"a"}'
    for number in range(60):
        accept = b"text/event-stream" if number % 2 else b"*/*"
        head = b"POST /v1/acquire HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAccept: " + accept
        with socket.create_connection(("127.0.0.1", node.port), timeout=5) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            select.select([caller], [], [], number / 20_000)
    wait_until(lambda: node.get("/v1/queue")[1] == [], "nobody to wait", 10)
    kept = node.get("/v1/pools/a/leases")[1]
    assert len(kept) <= 30, "no more than had their answer"
    assert node.lines("request_failed") == []


def test_what_cannot_be_is_said_at_once_and_how_long_to_wait(node: GpuNode) -> None:
    code, unknown = acquire(node, "c")
    assert code == 404 and unknown["code"] == "MODEL_NOT_FOUND" and "a, a-1, b, b-1" in unknown["hint"]
    _, held = acquire(node, "a")
    code, late = acquire(node, "b", wait_ms=300)
    assert code == 503 and late["code"] == "QUEUE_TIMEOUT" and late["retriable"] and late["retry_after_ms"] >= 1000
    assert node.post("/v1/pools/b/stop?wait=true")[0] == 200
    code, stopped = acquire(node, "b")
    assert code == 409 and stopped["code"] == "POOL_STOPPED"
    for wrong in ({}, {"model": ""}, {"model": "a", "wait_ms": -1}, {"model": "a", "priority": 1000}, {"model": "a", "more": 1}):
        assert node.post("/v1/acquire", wrong)[0] == 400, wrong
    give_back(node, held)


def test_a_daemon_that_dies_while_somebody_waits_leaves_the_engine_and_its_lease(node: GpuNode) -> None:
    _, held = acquire(node, "a")
    events = stream(node, "b")
    next(events)
    node.kill()
    events.close()
    node.start()
    node.until_ready("a")
    assert node.status("a")["active_leases"] == 1 and node.get("/v1/queue")[1] == []
    give_back(node, held)
    assert acquire(node, "b")[0] == 201
