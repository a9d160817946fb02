"""What each route answers, and that the document describes exactly what is served."""

from __future__ import annotations

import asyncio
import gc

import aiohttp
import pytest

from pool_managerd.api import openapi
from pool_managerd.api.table import ROUTES
from pool_managerd.errors import EngineError, RequestError
from tests.api.conftest import Served

ENVELOPE = {"code", "message", "error", "retriable", "correlation_id"}


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/v2/health"])
async def test_health_names_the_version(api: Served, path: str) -> None:
    assert await api.call("GET", path) == (200, {"status": "ok", "version": "0.1.0"})


async def test_ready_is_503_and_names_the_pools_that_are_not(api: Served) -> None:
    assert (await api.call("GET", "/ready"))[0] == 200
    api.node.add("late", state="starting", ready=False, last_error="still loading")
    status, body = await api.call("GET", "/ready")
    assert status == 503
    assert body["ready"] is False
    assert body["pools"] == [{"pool_id": "late", "state": "starting"}]  # and nothing that the engine said
    assert body.keys() >= ENVELOPE


async def test_pools_are_listed_sorted_and_each_has_its_status(api: Served) -> None:
    api.node.add("alpha")
    status, pools = await api.call("GET", "/v2/pools")
    assert status == 200
    assert [pool["pool_id"] for pool in pools] == ["alpha", "demo"]
    for path in ("/pools/demo/status", "/v1/pools/demo", "/v2/pools/demo/status"):
        assert (await api.call("GET", path))[1] == pools[1]


async def test_a_pool_has_a_bare_health_path(api: Served) -> None:
    status, body = await api.call("GET", "/pools/demo/health")
    assert status == 200
    assert {key: body[key] for key in ("live", "ready", "draining")} == {"live": True, "ready": True, "draining": False}


async def test_an_unknown_pool_is_a_404_with_the_fixed_text(api: Served) -> None:
    status, body = await api.call("GET", "/pools/nope/status")
    assert status == 404
    assert body["message"] == body["error"] == "pool nope not found"
    assert (body["code"], body["pool_id"]) == ("POOL_NOT_FOUND", "nope")


async def test_unknown_paths_and_methods_come_in_the_envelope(api: Served) -> None:
    for method, path, status, code in (
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/v1/replicasets", 404, "NOT_FOUND"),
        ("GET", "/pools", 404, "NOT_FOUND"),
        ("PATCH", "/v1/pools", 405, "METHOD_NOT_ALLOWED"),
        ("OPTIONS", "/v1/pools", 405, "METHOD_NOT_ALLOWED"),
    ):
        got, body = await api.call(method, path)
        assert (got, body["code"]) == (status, code), path
        assert body.keys() >= ENVELOPE


async def test_preload_without_a_body_brings_the_configured_pool_up(api: Served) -> None:
    status, body = await api.call("POST", "/pools/demo/preload")
    assert (status, body) == (200, {"pool_id": "demo", "pid": 4242, "handoff_path": ".runtime/engines/engine.json"})
    assert api.node.submitted == [None]


async def test_preload_submits_a_prepared_engine(api: Served) -> None:
    status, _ = await api.call("POST", "/pools/new/preload", json={"binary_path": "/bin/engine", "port": 9})
    assert status == 200
    assert api.node.submitted[0] is not None
    assert api.node.submitted[0].binary_path == "/bin/engine"
    status, body = await api.call("POST", "/pools/new/preload", json={})
    assert (status, body["code"]) == (400, "INVALID_PARAMS")


async def test_preload_without_waiting_answers_with_the_operation(api: Served) -> None:
    api.node.auto = False
    status, body = await api.call("POST", "/v1/pools/demo/preload?wait=false")
    assert (status, body["status"], body["kind"]) == (202, "running", "preload")
    assert (await api.call("GET", f"/v1/operations/{body['operation_id']}"))[0] == 200
    assert (await api.call("GET", f"/v1/pools/demo/operations/{body['operation_id']}"))[0] == 200
    api.node.add("other")
    assert (await api.call("GET", f"/v1/pools/other/operations/{body['operation_id']}"))[0] == 404
    assert [op["operation_id"] for op in (await api.call("GET", "/v1/operations"))[1]] == [body["operation_id"]]


async def test_a_failed_preload_answers_with_its_error(api: Served) -> None:
    api.node.auto = False
    request = asyncio.create_task(api.call("POST", "/pools/demo/preload"))
    await _until(lambda: bool(api.node.ops))
    api.node.ops["op-1"].result.set_exception(EngineError("preload failed: cannot run /x", hint="check the path", pool_id="demo"))
    status, body = await request
    assert (status, body["code"], body["hint"]) == (500, "PRELOAD_FAILED", "check the path")
    assert "preload failed" in body["message"]


@pytest.mark.parametrize("fails", [False, True])
async def test_a_client_that_goes_away_does_not_stop_the_preload(api: Served, fails: bool) -> None:
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
    api.node.auto = False
    with pytest.raises(asyncio.TimeoutError):
        await api.session.post(api.url + "/pools/demo/preload", timeout=aiohttp.ClientTimeout(0.15))
    await _until(lambda: api.server.connections == 0)
    operation = api.node.ops["op-1"]
    assert not operation.result.cancelled()
    if fails:
        operation.result.set_exception(EngineError("preload failed: it fell"))
    else:
        operation.result.set_result({"pool_id": "demo"})
    await asyncio.sleep(0)
    gc.collect()
    await asyncio.sleep(0)
    assert api.node.operation("op-1")["status"] == ("failed" if fails else "succeeded")
    assert unhandled == []


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("POST", "start", "start"),
        ("POST", "stop", "stop"),
        ("POST", "restart", "restart"),
        ("POST", "hold", "hold"),
        ("POST", "release", "release"),
        ("POST", "undrain", "undrain"),
        ("POST", "drain", "drain"),
        ("POST", "circuit/reset", "reset_breaker"),
        ("DELETE", "preload", "cancel_preload"),
    ],
)
async def test_a_change_is_accepted_at_once_or_waited_for(api: Served, method: str, path: str, kind: str) -> None:
    api.node.auto = False
    status, body = await api.call(method, f"/v1/pools/demo/{path}")
    assert (status, body["status"]) == (202, "running")
    api.node.auto = True
    status, body = await api.call(method, f"/v2/pools/demo/{path}?wait=true")
    assert (status, body["status"], body["kind"]) == (200, "succeeded", kind)
    assert body["outcome"]["pool_id"] == "demo"


async def test_a_drain_deadline_is_bounded(api: Served) -> None:
    status, body = await api.call("POST", "/v1/pools/demo/drain?wait=true", json={"deadline_ms": 86_400_000})
    assert (status, body["outcome"]["duration_ms"]) == (200, 86_400_000)
    for bad in (-1, 86_400_001, 1.5, True, "5"):
        status, body = await api.call("POST", "/v1/pools/demo/drain", json={"deadline_ms": bad})
        assert status == 400, bad
        assert "deadline_ms" in body["message"]


async def test_leases_are_given_refused_renewed_and_given_back_twice(api: Served) -> None:
    assert await api.call("POST", "/v1/pools/demo/leases") == (201, {"lease_id": "l1", "active_leases": 1})
    assert (await api.call("POST", "/v1/pools/demo/leases", json={"holder": "me", "ttl_ms": 5}))[0] == 201
    status, body = await api.call("POST", "/v1/pools/demo/leases", json={})
    assert (status, body["code"], body["retriable"]) == (409, "NO_FREE_SLOTS", True)
    assert len((await api.call("GET", "/v1/pools/demo/leases"))[1]) == 2
    assert (await api.call("PUT", "/v1/pools/demo/leases/l1", json={"ttl_ms": 10}))[0] == 200
    assert (await api.call("PUT", "/v1/pools/demo/leases/l1"))[0] == 400
    for _ in range(2):
        assert await api.call("DELETE", "/v1/pools/demo/leases/l1") == (200, {"active_leases": 1})
    assert (await api.call("DELETE", "/v1/pools/demo/leases/never"))[1]["code"] == "LEASE_NOT_FOUND"


async def test_the_other_reads_answer(api: Served) -> None:
    for path in ("command", "explain", "crashes", "leases"):
        assert (await api.call("GET", f"/v1/pools/demo/{path}"))[0] == 200, path
        assert (await api.call("GET", f"/v1/pools/nope/{path}"))[0] == 404, path
    for path in ("/v1/crashes", "/v1/snapshots", "/v1/capabilities", "/v2/meta/capabilities", "/v1/operations"):
        assert (await api.call("GET", path))[0] == 200, path


async def test_crashes_of_what_cannot_be_a_pool_are_not_found_and_its_name_is_not_repeated_as_it_came(api: Served) -> None:
    assert (await api.call("GET", "/v1/crashes", params={"pool_id": "demo"}))[0] == 200
    status, body = await api.call("GET", "/v1/crashes", params={"pool_id": "\x1b[2J" + "x" * 999})
    assert (status, body["code"], body["message"]) == (404, "POOL_NOT_FOUND", f"pool ?[2J{'x' * 60}... not found")


async def test_pools_are_registered_and_deregistered(api: Served) -> None:
    assert (await api.call("POST", "/v1/pools/fresh"))[1] == {"pool_id": "fresh", "registered": True}
    assert (await api.call("DELETE", "/v1/pools/fresh"))[1] == {"pool_id": "fresh", "registered": False}
    assert (await api.call("DELETE", "/v1/pools/fresh"))[0] == 404


async def test_metrics_count_requests_by_template(api: Served) -> None:
    await api.call("GET", "/v1/pools/demo/status")
    await api.call("GET", "/made-up")
    async with api.session.get(api.url + "/metrics") as response:
        text = await response.text()
    assert 'http_requests_total{method="GET",node_id="n1",route="/pools/{pool_id}/status",status="200"} 1.0' in text
    assert 'route="unmatched",status="404"} 1.0' in text
    assert 'pool_ready{node_id="n1",pool_id="demo"} 1.0' in text
    assert "made-up" not in text


async def test_a_correlation_id_is_echoed_when_sane_and_made_otherwise(api: Served) -> None:
    async with api.session.get(api.url + "/health", headers={"X-Correlation-Id": "abc-1.2_3"}) as response:
        assert response.headers["X-Correlation-Id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 129, "<script>"):
        async with api.session.get(api.url + "/pools/nope/status", headers={"X-Correlation-Id": bad}) as response:
            made = response.headers["X-Correlation-Id"]
            assert len(made) == 36
            assert (await response.json())["correlation_id"] == made


async def test_an_unexpected_error_shows_nothing_of_itself(api: Served) -> None:
    api.node.fail_next = RuntimeError("secret path /root/x")
    status, body = await api.call("GET", "/v1/pools/demo/status")
    assert (status, body["code"]) == (500, "INTERNAL")
    assert "secret" not in str(body)
    assert "Traceback" not in str(body)


async def test_an_error_may_say_when_to_try_again(api: Served) -> None:
    api.node.fail_next = RequestError("cannot lease", code="POOL_UNREADY", status=503, retriable=True, retry_after_ms=1500)
    async with api.session.post(api.url + "/v1/pools/demo/leases") as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "2")
        assert (await response.json())["retry_after_ms"] == 1500


async def test_the_served_document_is_the_table(api: Served) -> None:
    status, served = await api.call("GET", "/openapi.json")
    assert status == 200
    assert served == openapi.document()
    assert served["info"]["version"] == "2.0.0"
    described = {(method, path) for path, operations in served["paths"].items() for method in operations}
    assert described == {(route.method.lower(), path) for route in ROUTES for path in route.paths}
    ids = [operation["operationId"] for operations in served["paths"].values() for operation in operations.values()]
    assert len(ids) == len(set(ids))


def test_the_document_is_valid_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(openapi.document())


async def _until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.01)


async def test_head_is_answered_as_get_without_a_body_on_every_path_that_can_be_read(api: Served) -> None:
    ids = {"pool_id": "demo", "operation_id": "none", "device": "0"}
    for route in ROUTES:
        if route.method != "GET":
            continue
        for path in route.paths:
            url = api.url + path.format(**ids)
            async with api.session.head(url) as head:
                assert await head.read() == b""
            if route.media == "text/event-stream":
                url += "?follow=false"
            async with api.session.get(url) as get:
                assert head.status == get.status, path


async def test_operations_are_told_in_pages(api: Served) -> None:
    for _ in range(5):
        await api.call("POST", "/v1/pools/demo/hold")
    _, everything = await api.call("GET", "/v1/operations")
    ids = [operation["operation_id"] for operation in everything]
    _, newest = await api.call("GET", "/v1/operations?limit=2")
    assert [operation["operation_id"] for operation in newest] == ids[-2:]
    _, after = await api.call("GET", f"/v1/operations?after={ids[0]}&limit=2")
    assert [operation["operation_id"] for operation in after] == ids[1:3]
    assert (await api.call("GET", "/v1/operations?after=none"))[0] == 404
    for wrong in ("0", "x", "1001", "-1"):
        assert (await api.call("GET", f"/v1/operations?limit={wrong}"))[0] == 400
