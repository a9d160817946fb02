from __future__ import annotations

import asyncio
import json
import re
import signal
from typing import Any

import pytest

from tests.runtime.support import Bench, end, eventually, fake, within


async def start(bench: Bench, *flags: str) -> int:
    """Run the scripted engine; returns its port."""
    await bench.launch(fake(*flags))
    await bench.says("listens on port")
    found = re.search(rb"listens on port (\d+)", bench.log())
    assert found is not None
    return int(found[1])


async def request(port: int, line: str, body: Any = None) -> bytes:
    """The whole answer to one request, headers included."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    async with asyncio.timeout(5):
        answer = b""
        while len(answer) < 1 << 20 and (more := await reader.read(65536)):
            answer += more
    writer.close()
    await writer.wait_closed()
    return answer


async def test_it_answers_like_llama_cpp(bench: Bench) -> None:
    port = await start(bench, "--parallel", "3", "--ctx-size", "512", "--no-webui", "--model-id", "tiny")
    assert (await request(port, "GET /health")).endswith(b'{"status": "ok"}')
    assert b'"total_slots": 3' in await request(port, "GET /props")
    assert b'"tiny"' in await request(port, "GET /v1/models")
    assert (await request(port, "GET /slots")).count(b"is_processing") == 3
    assert b"llamacpp:" in await request(port, "GET /metrics")
    assert b" 404 " in await request(port, "GET /nothing")


async def test_it_streams_a_completion_with_timings(bench: Bench) -> None:
    port = await start(bench)
    answer = await request(port, "POST /v1/completions", {"prompt": "x", "max_tokens": 3, "stream": True})
    events = [json.loads(line[6:]) for line in answer.split(b"\n") if line.startswith(b"data: {")]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "stop"]
    assert events[-1]["timings"]["predicted_n"] == 3
    chat = await request(port, "POST /v1/chat/completions", {"messages": [], "stream": True})
    assert b"Paris" in chat
    assert chat.endswith(b"data: [DONE]\n\n")
    whole = await request(port, "POST /v1/chat/completions", {"messages": []})
    assert b"The capital of France is Paris." in whole


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("503", b" 503 "), ("garbage", b"not HTTP"), ("redirect", b" 302 "), ("close", b""), ("big", b"1073741824")],
)
async def test_its_health_misbehaves_as_told(bench: Bench, mode: str, expected: bytes) -> None:
    port = await start(bench, "--health", mode)
    answer = await request(port, "GET /health")
    assert expected in answer
    assert (answer == b"") is (mode == "close")


async def test_it_loads_for_as_long_as_told(bench: Bench) -> None:
    port = await start(bench, "--ready-after", "0.3")
    assert b" 503 " in await request(port, "GET /health")
    assert b" 503 " in await request(port, "GET /props")
    async with asyncio.timeout(3):
        while b" 200 " not in await request(port, "GET /health"):
            pass


async def test_it_ends_by_the_signal_or_code_it_was_told(bench: Bench) -> None:
    assert (await bench.run(fake("--signal-after", "0.05", "--signal", "6"))).signal == signal.SIGABRT
    assert (await bench.run(fake("--exit-after", "0.05", "--exit-code", "42"), epoch=2)).code == 42


async def test_it_closes_its_port_and_lives_on(bench: Bench) -> None:
    port = await start(bench, "--close-port-after", "0.05")

    async def refused() -> bool:
        try:
            await request(port, "GET /health")
        except OSError:
            return True
        return False

    async with asyncio.timeout(3):
        while not await refused():
            pass
    (process,) = bench.started
    assert process.identity.engine_runs()


async def test_sigterm_ends_it_cleanly_and_a_taken_port_is_an_error(bench: Bench) -> None:
    port = await start(bench)
    second = await bench.launch(fake("--port", str(port), pool_id="q"))
    assert (await within(5, second)).code == 1
    await eventually(lambda: b"cannot bind" in bench.log("q"))
    (first, _) = bench.started
    end(first.pid, signal.SIGTERM)
    assert (await within(2, first)).code == 0
