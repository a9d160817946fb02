"""The spans of requests, by OpenTelemetry's own SDK, between a scripted node and scripted engines."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from pool_managerd.gateway.keys import KeyFile
from tests.gateway.lab import CHUNK, OPTIONS, Engine, Lab, lab, served
from tests.traces import SPAN, TRACE, TRACEPARENT, Spans, parent_id, recorded, span_id, told, trace_id, traceparent

CHAT = {"model": "m", "messages": []}
STREAM = {**CHAT, "stream": True}
REQUEST, SLOT, ENGINE = "POST /v1/chat/completions", "slot", "chat m"


@pytest.fixture
def spans() -> Iterator[Spans]:
    with recorded() as found:
        yield found


@pytest.fixture
async def one(spans: Spans) -> AsyncIterator[Lab]:
    async with lab() as made:
        yield made


def ending(span: ReadableSpan) -> tuple[object, StatusCode]:
    return told(span).get("error.type"), span.status.status_code


async def ended(one: Lab, spans: Spans, count: int = 1) -> None:
    """So many requests are over: their spans end after their answers."""
    await one.until(lambda: len(spans.named(REQUEST)) == count, "the requests to end")


# --- one trace ---


async def test_a_request_is_a_span_with_its_slot_and_its_engine_as_parts(one: Lab, spans: Spans) -> None:
    one.node.started = True
    assert (await one.ask(CHAT, headers={"x-request-id": "r1"}))[0] == 200
    await ended(one, spans)
    request, slot, engine = spans.one(REQUEST), spans.one(SLOT), spans.one(ENGINE)
    assert len(spans.all()) == 3
    assert (request.kind, slot.kind, engine.kind) == (SpanKind.SERVER, SpanKind.CLIENT, SpanKind.CLIENT)
    assert parent_id(request) is None and parent_id(slot) == parent_id(engine) == span_id(request)
    assert told(slot) == {"pool_managerd.pool_id": "m", "pool_managerd.started": True}
    port = int(one.url.rpartition(":")[2])
    assert told(request) == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "url.path": "/v1/chat/completions",
        "url.scheme": "http", "server.address": "127.0.0.1", "server.port": port, "http.response.status_code": 200,
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.response.model": "m",
        "pool_managerd.pool_id": "m", "pool_managerd.request_id": "r1",
    }  # fmt: skip
    assert told(engine) == {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.provider.name": "llamacpp",
        "server.address": "127.0.0.1", "server.port": int(one.engine_url.rpartition(":")[2]),
        "http.response.status_code": 200, "pool_managerd.pool_id": "m",
    }  # fmt: skip
    assert all(span.status.status_code is StatusCode.UNSET for span in spans.all())


async def test_the_clients_trace_goes_on_in_the_node_and_in_the_engine(one: Lab, spans: Spans) -> None:
    await one.ask(CHAT, headers={"traceparent": TRACEPARENT, "tracestate": "a=1"})
    await ended(one, spans)
    request, slot, engine = spans.one(REQUEST), spans.one(SLOT), spans.one(ENGINE)
    assert {trace_id(span) for span in spans.all()} == {TRACE} and parent_id(request) == SPAN
    assert one.node.traceparents == [traceparent(slot)]
    seen = one.engine.seen[0][0].headers
    assert seen.getall("traceparent") == [traceparent(engine)] and seen.getall("tracestate") == ["a=1"]


async def test_a_client_whose_trace_is_not_recorded_stays_so_and_is_passed_on(one: Lab, spans: Spans) -> None:
    await one.ask(CHAT, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
    seen = one.engine.seen[0][0].headers["traceparent"]
    assert seen.startswith(f"00-{TRACE}-") and seen.endswith("-00")
    await one.ask(CHAT)
    await ended(one, spans)
    assert TRACE not in {trace_id(span) for span in spans.all()}


@pytest.mark.parametrize("given", ["", "00-0-0-00", "ff" * 40, f"00-{'0' * 32}-{SPAN}-01", "x" * 8000])
async def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(one: Lab, spans: Spans, given: str) -> None:
    assert (await one.ask(CHAT, headers={"traceparent": given}))[0] == 200
    await ended(one, spans)
    assert parent_id(spans.one(REQUEST)) is None
    assert one.engine.seen[0][0].headers["traceparent"] == traceparent(spans.one(ENGINE))


async def test_requests_on_one_connection_have_nothing_of_each_other(one: Lab, spans: Spans) -> None:
    for given in ({"traceparent": TRACEPARENT}, {}):
        await one.ask(CHAT, headers=given)
    await ended(one, spans, 2)
    first, second = spans.named(REQUEST)
    assert trace_id(first) == TRACE != trace_id(second) and parent_id(second) is None


async def test_a_lease_that_was_kept_is_no_wait_for_a_slot(one: Lab, spans: Spans) -> None:
    for _ in range(3):
        await one.ask(CHAT)
    await ended(one, spans, 3)
    assert len(spans.named(SLOT)) == 1 and len(spans.named(ENGINE)) == 3
    assert {parent_id(span) for span in spans.named(ENGINE)} == {span_id(span) for span in spans.named(REQUEST)}


# --- what is told ---


async def test_what_the_engine_has_counted_is_told_and_when_its_first_byte_came(one: Lab, spans: Spans) -> None:
    async def counted(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(CHUNK)
        usage = b'{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":5}}'
        await response.write(b'data: {"choices":[],"usage":' + usage + b"}\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", counted)
    async with served(app) as url:
        one.node.pool("m", url, model_id="file:m.gguf")
        await one.node.tell()
        await one.until(
            lambda: any(place.model_id == "file:m.gguf" for place in one.gateway.leasing.directory.all()), "the other engine"
        )
        await one.text(STREAM)
        await ended(one, spans)
    request, engine = spans.one(REQUEST), spans.one(ENGINE)
    usage = {name: value for name, value in told(request).items() if name.startswith("gen_ai.usage")}
    assert usage == {
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 3, "gen_ai.usage.cache_read.input_tokens": 5,
    }  # fmt: skip
    assert told(request)["gen_ai.response.model"] == "file:m.gguf"
    (first,) = engine.events
    assert first.name == "first byte" and (engine.start_time or 0) <= first.timestamp <= (engine.end_time or 0)


@pytest.mark.parametrize(
    ("path", "operation"),
    [("/v1/messages", "chat"), ("/completions", "text_completion"), ("/v1/embeddings", "embeddings"), ("/tokenize", None)],
)
async def test_an_operation_has_the_name_that_opentelemetry_gives_it(
    one: Lab, spans: Spans, path: str, operation: str | None
) -> None:
    await one.ask(CHAT, path)
    await one.until(lambda: len(spans.all()) == 3, "the request to end")
    request = next(span for span in spans.all() if span.kind is SpanKind.SERVER)
    assert told(request).get("gen_ai.operation.name") == operation
    assert spans.one(f"{operation or 'engine'} m").kind is SpanKind.CLIENT


async def test_nothing_that_a_client_or_an_engine_says_is_in_a_span(tmp_path: Path, spans: Spans) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    key = keys.add("me", (), None, None, None)
    canary = "xyzzy-canary"
    async with lab(dataclasses.replace(OPTIONS, keys=keys)) as one:
        headers = {"Authorization": f"Bearer {key}", "Cookie": canary, "User-Agent": canary, "baggage": f"a={canary}"}
        asked: Any = {"model": "m", "messages": [{"role": "user", "content": canary}], "tools": canary}
        assert (await one.ask(asked, f"/v1/chat/completions?secret={canary}", headers=headers))[0] == 200
        assert (await one.ask(asked, f"/upstream/m/{canary}?token={canary}", headers=headers))[0] == 200
        assert (await one.ask({**asked, "model": "other"}, headers=headers))[0] == 404
        assert (await one.ask(asked, headers={"Authorization": f"Bearer {canary}"}))[0] == 401
        await one.until(lambda: len([s for s in spans.all() if s.kind is SpanKind.SERVER]) == 4, "all to end")
    assert canary not in spans.told() and key not in spans.told()


async def test_a_long_name_is_clipped_and_a_secret_in_it_is_masked(one: Lab, spans: Spans) -> None:
    await one.ask({**CHAT, "model": "https://me:hunter22@hub/" + "m" * 200})
    await ended(one, spans)
    name = str(told(spans.one(REQUEST))["gen_ai.request.model"])
    assert "hunter22" not in name and len(name) <= 256


# --- what goes wrong ---


async def test_an_engine_that_does_not_answer_is_one_part_and_the_one_asked_after_it_another(spans: Spans) -> None:
    async with lab(names=["m", "shared"]) as one:
        other = Engine()
        async with served(other.app()) as url:
            one.node.pool("n", url, names=["n", "shared"])
            await one.node.tell()
            await one.until(lambda: one.gateway.leasing.directory.shared("shared"), "both to be known")
            one.engine.refuses = 9
            for _ in range(2):  # one of them goes to the engine that refuses
                assert (await one.ask({**CHAT, "model": "shared"}))[0] == 200
            await ended(one, spans, 2)
    bad = [span for span in spans.named("chat shared") if ending(span)[0]]
    assert [ending(span) for span in bad] == [("ENGINE_GONE", StatusCode.ERROR)]
    again = next(span for span in spans.named("chat shared") if "http.request.resend_count" in told(span))
    assert told(again)["pool_managerd.pool_id"] == "n" and parent_id(again) == parent_id(bad[0])
    assert {ending(span) for span in spans.named(REQUEST)} == {(None, StatusCode.UNSET)}


async def test_a_stream_that_breaks_off_is_an_error_under_its_200(one: Lab, spans: Spans) -> None:
    one.engine.dies_after = 1
    assert "ENGINE_GONE".lower() in await one.text(STREAM)
    await ended(one, spans)
    assert ending(spans.one(REQUEST)) == ending(spans.one(ENGINE)) == ("ENGINE_GONE", StatusCode.ERROR)
    assert told(spans.one(REQUEST))["http.response.status_code"] == 200


@pytest.mark.parametrize(("status", "of_request"), [(500, ("500", StatusCode.ERROR)), (400, (None, StatusCode.UNSET))])
async def test_an_error_that_the_engine_answers_is_one_of_its_part(
    one: Lab, spans: Spans, status: int, of_request: tuple[Any, StatusCode]
) -> None:
    one.engine.status = status
    assert (await one.ask(CHAT))[0] == status
    await ended(one, spans)
    assert ending(spans.one(ENGINE)) == (str(status), StatusCode.ERROR)
    assert ending(spans.one(REQUEST)) == of_request


async def test_a_fault_of_our_own_is_an_error_of_its_kind(one: Lab, spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(one.gateway.leasing, "kept", broken)
    async with one.session.post(one.url + "/v1/chat/completions", json=CHAT) as answer:
        assert answer.status == 500
    await ended(one, spans)
    assert ending(spans.one(REQUEST)) == ("ZeroDivisionError", StatusCode.ERROR)


async def test_who_is_refused_a_slot_is_told_of_without_an_error_of_the_server(one: Lab, spans: Spans) -> None:
    one.node.refusal = (429, {"code": "QUEUE_FULL", "message": "cannot wait: the queue is full", "retriable": True})
    assert (await one.ask(CHAT))[0] == 429
    await ended(one, spans)
    assert ending(spans.one(SLOT)) == ("QUEUE_FULL", StatusCode.ERROR)
    assert ending(spans.one(REQUEST)) == ("QUEUE_FULL", StatusCode.UNSET)
    one.node.refusal = (503, {"code": "QUEUE_TIMEOUT", "message": "no slot within 1 s", "retriable": True})
    await one.ask(CHAT)
    await ended(one, spans, 2)
    assert ending(spans.named(REQUEST)[1]) == ("QUEUE_TIMEOUT", StatusCode.ERROR)


async def test_a_model_that_is_not_there_is_a_request_without_parts(one: Lab, spans: Spans) -> None:
    assert (await one.ask({**CHAT, "model": "other"}))[0] == 404
    await ended(one, spans)
    assert len(spans.all()) == 1 and ending(spans.one(REQUEST)) == ("MODEL_NOT_FOUND", StatusCode.UNSET)


async def test_a_client_that_goes_away_has_cancelled_it(one: Lab, spans: Spans) -> None:
    one.engine.step = asyncio.Semaphore(1)
    async with one.session.post(one.url + "/v1/chat/completions", json=STREAM) as answer:
        await answer.content.readexactly(len(CHUNK))
        answer.close()
    await ended(one, spans)
    assert ending(spans.one(REQUEST)) == ending(spans.one(ENGINE)) == ("cancelled", StatusCode.UNSET)


async def test_one_that_is_cancelled_by_its_id_has_ended(one: Lab, spans: Spans) -> None:
    one.engine.step = asyncio.Semaphore(0)
    asked = asyncio.create_task(one.ask(CHAT, headers={"x-request-id": "r1"}))
    await one.until(lambda: one.engine.running == 1, "the engine to work")
    async with one.session.delete(one.url + "/v1/requests/r1") as answer:
        assert answer.status == 200
    assert (await asked)[0] == 409
    await ended(one, spans)
    assert ending(spans.one(REQUEST)) == ending(spans.one(ENGINE)) == ("cancelled", StatusCode.UNSET)


async def test_a_client_that_goes_away_while_it_waits_has_no_engine_part(one: Lab, spans: Spans) -> None:
    one.node.slots = 0
    waiting = asyncio.create_task(one.ask(CHAT))
    await one.until(lambda: one.node.waits == 1, "it to wait")
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await ended(one, spans)
    assert ending(spans.one(SLOT)) == ending(spans.one(REQUEST)) == ("cancelled", StatusCode.UNSET)
    assert not spans.named(ENGINE)


async def test_a_gateway_that_ends_ends_the_spans_of_what_was_in_flight(spans: Spans) -> None:
    async with lab() as one:
        one.engine.step = asyncio.Semaphore(1)

        async def read() -> None:
            with suppress(aiohttp.ClientError):
                await one.text(STREAM)

        reading = asyncio.create_task(read())
        await one.until(lambda: one.engine.running == 1, "the engine to work")
    await reading
    assert ending(spans.one(REQUEST)) == ("cancelled", StatusCode.UNSET) and spans.named(ENGINE)


async def test_requests_at_the_same_time_are_traces_of_their_own(one: Lab, spans: Spans) -> None:
    one.node.slots, one.node.rows["m"]["slots"] = 64, 64
    await one.node.tell()
    await asyncio.gather(*(one.ask(CHAT) for _ in range(32)))
    await ended(one, spans, 32)
    by_trace = {trace_id(span): span_id(span) for span in spans.named(REQUEST)}
    assert len(by_trace) == 32
    for part in (*spans.named(SLOT), *spans.named(ENGINE)):
        assert parent_id(part) == by_trace[trace_id(part)]


# --- without ---


async def test_without_a_provider_the_clients_trace_is_passed_on_as_it_came() -> None:
    async with lab() as one:
        await one.ask(CHAT, headers={"traceparent": TRACEPARENT})
        assert one.engine.seen[0][0].headers["traceparent"] == TRACEPARENT and one.node.traceparents == [None]


def test_what_does_not_trace_imports_nothing_of_opentelemetry() -> None:
    code = (
        "import sys, pool_managerd.daemon, pool_managerd.gateway.process, pool_managerd.gateway.embedded, pool_managerd.cli.main;"
        "from pool_managerd.telemetry import tracing; from pool_managerd.gateway.server import Gateway;"
        "assert not tracing.is_on(); print([m for m in sys.modules if 'opentelemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
