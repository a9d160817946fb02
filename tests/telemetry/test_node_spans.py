"""The spans of a node: real launches of a scripted engine, by OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from pool_managerd import PoolError, PoolManager, ReloadRequest, open_gateway
from pool_managerd.core.event import Event
from pool_managerd.telemetry.node_spans import NodeSpans
from pool_managerd.telemetry.spans import continued
from tests.system.nodes import config, scripted, until
from tests.traces import SPAN, TRACE, TRACEPARENT, Spans, parent_id, recorded, span_id, told, trace_id

STAGES = ["stage", "spawn", "load"]


@pytest.fixture
def spans() -> Iterator[Spans]:
    with recorded() as found:
        yield found


@pytest.fixture
async def node(spans: Spans, open_dir: Path) -> AsyncIterator[PoolManager]:
    async with PoolManager(config(open_dir)) as made:
        yield made


async def loaded(node: PoolManager, *flags: str) -> None:
    await (await node.preload("p", scripted("p", *flags))).wait()


def parts(spans: Spans, whole: ReadableSpan) -> list[ReadableSpan]:
    """In the order in which they began."""
    found = [span for span in spans.all() if parent_id(span) == span_id(whole)]
    return sorted(found, key=lambda span: span.start_time or 0)


def ending(span: ReadableSpan) -> tuple[object, StatusCode]:
    return told(span).get("error.type"), span.status.status_code


async def test_a_launch_is_a_span_with_its_stages_as_parts(node: PoolManager, spans: Spans) -> None:
    with continued({"traceparent": TRACEPARENT}):
        operation = await node.preload("p", scripted("p"))
    await operation.wait()
    launch = spans.one("launch")
    assert trace_id(launch) == TRACE and parent_id(launch) == SPAN, "it is a part of the request that asked for it"
    found = parts(spans, launch)
    assert [part.name for part in found] == STAGES and {ending(part) for part in found} == {(None, StatusCode.UNSET)}
    for before, after in pairwise(found):
        assert (before.end_time or 0) <= (after.start_time or 0)
    known = told(launch)
    assert known["pool_managerd.pool_id"] == "p" and known["pool_managerd.replica_id"] == "r0"
    assert known["pool_managerd.engine_version"] == "fake-1" and known["pool_managerd.duration_ms"]


async def test_a_start_on_demand_is_a_part_of_the_acquire_that_it_is_for(node: PoolManager, spans: Spans) -> None:
    await loaded(node)
    await (await node.evict("p")).wait()
    spans.clear()
    with continued({"traceparent": TRACEPARENT}):
        async with node.acquire("p") as lease:
            assert lease.started
    async with node.acquire("p"):
        pass
    first, second = spans.named("acquire")
    assert trace_id(first) == TRACE and parent_id(first) == SPAN and first.kind is SpanKind.SERVER
    assert told(first)["pool_managerd.started"] is True and told(second)["pool_managerd.started"] is False
    assert second.kind is SpanKind.INTERNAL and trace_id(second) != TRACE
    assert [part.name for part in parts(spans, first)] == ["launch"]


async def test_of_many_who_wait_one_has_the_start_as_a_part(node: PoolManager, spans: Spans) -> None:
    await loaded(node, "--parallel", "8")
    await (await node.evict("p")).wait()
    spans.clear()

    async def one() -> None:
        async with node.acquire("p"):
            pass

    await asyncio.gather(*(one() for _ in range(8)))
    assert len(spans.named("acquire")) == 8
    assert parent_id(spans.one("launch")) in {span_id(span) for span in spans.named("acquire")}


async def test_an_engine_that_ends_before_it_is_ready_is_an_error_of_its_class(node: PoolManager, spans: Spans) -> None:
    with pytest.raises(PoolError):
        await loaded(node, "--exit-after", "0", "--exit-code", "3")
    launch = spans.one("launch")
    assert ending(launch) == ("process_exit", StatusCode.ERROR) and told(launch)["pool_managerd.exit_code"] == 3
    stage, spawn, load = parts(spans, launch)
    assert ending(stage) == ending(spawn) == (None, StatusCode.UNSET) and ending(load) == ending(launch)


async def test_an_engine_that_does_not_become_healthy_is_an_error_though_it_is_stopped(spans: Spans, open_dir: Path) -> None:
    impatient = {"startup_timeout_ms": 300, "interval_ms": 50, "probe_interval_ms": 100, "probe_timeout_ms": 200}
    async with PoolManager(config(open_dir, health=impatient)) as node:
        with pytest.raises(PoolError):
            await loaded(node, "--health", "503")
    assert ending(spans.one("launch")) == ending(spans.one("load")) == ("health_failure", StatusCode.ERROR)


async def test_a_start_that_is_begun_anew_has_cancelled_the_one_before_it(node: PoolManager, spans: Spans) -> None:
    operation = await node.preload("p", scripted("p", "--ready-after", "1"))
    await until(lambda: bool(spans.named("spawn")), "the engine to run")
    await (await node.restart("p")).wait()
    with suppress(PoolError):
        await operation.wait()
    assert [ending(span) for span in spans.named("launch")] == [("cancelled", StatusCode.UNSET), (None, StatusCode.UNSET)]


async def test_a_crash_later_is_no_part_of_its_launch_and_the_restart_is_a_trace_of_its_own(
    node: PoolManager, spans: Spans
) -> None:
    with continued({"traceparent": TRACEPARENT}):
        operation = await node.preload("p", scripted("p", "--signal-after", "0.5"))
    await operation.wait()
    await until(lambda: len(spans.named("launch")) >= 2, "it to be started again")
    first, second = spans.named("launch")[:2]
    assert ending(first) == (None, StatusCode.UNSET) and trace_id(first) == TRACE
    assert trace_id(second) != TRACE and parent_id(second) is None
    await (await node.stop("p")).wait()


async def test_a_start_that_is_given_up_is_no_error(node: PoolManager, spans: Spans) -> None:
    operation = await node.preload("p", scripted("p", "--ready-after", "60"))
    await until(lambda: bool(spans.named("spawn")), "the engine to run")
    await (await node.stop("p")).wait()
    with suppress(PoolError):
        await operation.wait()
    assert ending(spans.one("launch")) == ("cancelled", StatusCode.UNSET)


async def test_a_drain_is_a_span_until_the_pool_is_down(node: PoolManager, spans: Spans) -> None:
    await loaded(node)
    with continued({"traceparent": TRACEPARENT}):
        await (await node.drain("p")).wait()
    drain = spans.one("drain")
    assert trace_id(drain) == TRACE and ending(drain) == (None, StatusCode.UNSET)
    assert told(drain)["pool_managerd.active_leases"] == 0


async def test_a_reload_is_a_span_with_the_drain_and_the_launch_as_parts(node: PoolManager, spans: Spans) -> None:
    await loaded(node)
    spans.clear()
    with continued({"traceparent": TRACEPARENT}):
        operation = await node.reload(ReloadRequest("p", engine=scripted("p"), strategy="stop_start"))
    await operation.wait()
    reload = spans.one("reload")
    assert trace_id(reload) == TRACE and parent_id(reload) == SPAN and ending(reload) == (None, StatusCode.UNSET)
    assert [part.name for part in parts(spans, reload)] == ["drain", "launch"]
    assert told(reload)["pool_managerd.downtime_ms"]


async def test_a_reload_that_is_undone_is_an_error_and_so_is_the_launch_that_failed(node: PoolManager, spans: Spans) -> None:
    await loaded(node)
    spans.clear()
    bad = scripted("p", "--exit-after", "0")
    with pytest.raises(PoolError, match="reload failed"):
        await (await node.reload(ReloadRequest("p", engine=bad, strategy="stop_start"))).wait()
    reload = spans.one("reload")
    assert reload.status.status_code is StatusCode.ERROR
    assert [span.status.status_code for span in spans.named("launch")] == [StatusCode.ERROR, StatusCode.UNSET]
    assert {parent_id(span) for span in spans.named("launch")} == {span_id(reload)}


async def test_a_real_engine_is_warmed_up_in_its_launch_for_whoever_asked_the_gateway(
    spans: Spans, open_dir: Path, tiny_model: Path
) -> None:
    pool = {
        "id": "tiny", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 512, "slots": 2, "preload": False,
        "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    async with (
        PoolManager(config(open_dir, pool)) as node,
        open_gateway(node, "127.0.0.1:0") as url,
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=asked) as answer,
    ):
        assert answer.status == 200
    request, slot, launch = spans.one("POST /v1/completions"), spans.one("slot"), spans.one("launch")
    assert {trace_id(span) for span in (request, slot, launch)} == {trace_id(request)}
    assert parent_id(launch) == span_id(spans.one("acquire")) and parent_id(spans.one("acquire")) == span_id(slot)
    assert told(slot)["pool_managerd.started"] is True
    assert told(request)["gen_ai.usage.output_tokens"] == 2 and str(open_dir) not in spans.told()
    stages = parts(spans, launch)
    assert [part.name for part in stages] == [*STAGES, "warm up"]
    (measured,) = [event for event in stages[-1].events if event.name == "warmup"]
    assert measured.attributes is not None and measured.attributes["pool_managerd.tokens_per_s"]


async def test_who_goes_away_while_it_waits_has_cancelled_its_acquire(node: PoolManager, spans: Spans) -> None:
    await loaded(node)
    async with node.acquire("p"):
        waiting = asyncio.ensure_future(node.acquire("p"))
        await until(lambda: bool(node.queue()), "it to wait")
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
    assert [ending(span) for span in spans.named("acquire")] == [("cancelled", StatusCode.UNSET), (None, StatusCode.UNSET)][::-1]


async def test_an_acquire_that_is_refused_says_why(node: PoolManager, spans: Spans) -> None:
    with pytest.raises(PoolError, match="not found"):
        await node.acquire("other")
    assert ending(spans.one("acquire")) == ("MODEL_NOT_FOUND", StatusCode.UNSET)


async def test_a_node_that_ends_leaves_no_span_open(spans: Spans, open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        operation = await node.preload("p", scripted("p", "--ready-after", "60"))
        await until(lambda: bool(spans.named("spawn")), "the engine to run")
    with suppress(PoolError):
        await operation.wait()
    assert spans.one("launch").end_time and spans.one("load").end_time


async def test_no_flag_no_environment_and_no_sentence_is_in_a_span(node: PoolManager, spans: Spans) -> None:
    canary = "xyzzy-canary"
    engine = scripted("p", "--model-id", canary, "--exit-after", "0", env={"SOMETHING": canary})
    with pytest.raises(PoolError):
        await (await node.preload("p", engine)).wait()
    assert spans.named("launch") and canary not in spans.told()
    assert "Engine of pool" not in spans.told()


def test_a_candidate_beside_the_engine_before_it_is_a_launch_of_its_own(spans: Spans) -> None:
    heard = NodeSpans()
    for type_, replica in (
        ("start", "r0"), ("preload_succeeded", "r0"), ("reload_started", "r0"), ("start", "r1"), ("drain_started", "r0"),
        ("staged", "r1"), ("drain_finished", "r0"), ("preload_succeeded", "r1"), ("reload_succeeded", "r1"),
    ):  # fmt: skip
        heard.hear(Event(1, 0, type_, "info", "p", "", {"replica_id": replica}))
    first, second = spans.named("launch")
    assert [part.name for part in parts(spans, spans.one("reload"))] == ["launch", "drain"]
    assert parent_id(first) is None and told(second)["pool_managerd.replica_id"] == "r1"


def test_events_in_any_order_leave_nothing_open(spans: Spans) -> None:
    heard = NodeSpans()

    def hear(type_: str, pool_id: str | None = "p", **fields: object) -> None:
        heard.hear(Event(1, 0, type_, "info", pool_id, "", fields))

    for type_ in ("preload_succeeded", "spawn", "reload_failed", "undrain", "crash"):
        hear(type_)
    assert not spans.all()
    for _ in range(3):
        hear("start", replica_id="r0")
    hear("start", None)
    hear("drain_started", replica_id="r0")
    hear("start", replica_id="r1")
    heard.close()
    assert len(spans.named("launch")) == 4 and len(spans.named("drain")) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN
