"""Two models behind one port, of which one fits: each client is served, and nobody is cut off."""

from __future__ import annotations

import http.client
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.conftest import free_port, wait_until
from tests.gpu.conftest import MakeNode, MakePool
from tests.gpu.nodes import GpuNode
from tests.gpu.test_sleep import SMALL


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def node(make_node: MakeNode, real: MakePool, port: int) -> GpuNode:
    pools = [real(one, vram_bytes=600 << 20, slots=2, ctx=256, preload=False) for one in ("a", "b")]
    more = f'gateway: {{bind: "127.0.0.1:{port}"}}\nqueue: {{starving_ms: 3000}}\n'
    return make_node(SMALL, "engines vram=rss", pools=pools, more=more).start()


def ask(port: int, model: str, **more: Any) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = {"model": model, "prompt": "a", "max_tokens": 3, **more}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return b"connected" in answer.read()
    except OSError:
        return False


def test_models_take_turns_for_whoever_asks(node: GpuNode, port: int) -> None:
    wait_until(lambda: up(port), "the gateway", 15)
    for model in ("a", "b", "a"):
        assert ask(port, model)[0] == 200
    assert [line["pool_id"] for line in node.lines("evicted")] == ["a", "b"], "its kept lease stood in nobody's way"
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda number: ask(port, "ab"[number % 2], stream=number % 3 == 0), range(32)))
    assert [code for code, _ in answers] == [200] * 32
    assert all("[DONE]" in text or '"text_completion"' in text for _, text in answers), answers
    assert not list(node.lines("crash"))
    wait_until(lambda: node.status("a")["active_leases"] + node.status("b")["active_leases"] == 0, "no lease to be left", 15)
