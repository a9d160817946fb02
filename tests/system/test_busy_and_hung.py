"""Engines that are busy, hung or slow to load, on real processes: who works is left alone, who stands still is not."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pool_managerd import PoolManager, PreloadOutcome
from pool_managerd.errors import PoolError
from pool_managerd.runtime import procfs
from pool_managerd.supervision import policy
from tests.system.nodes import config, left_behind, mentioning, scripted, until

QUICK: dict[str, Any] = {
    "probe_interval_ms": 100, "probe_timeout_ms": 200, "failure_threshold": 3, "startup_timeout_ms": 10_000, "interval_ms": 50,
    "stall_ms": 2_500,
}  # fmt: skip


@pytest.fixture
def replacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in profile home, where an engine that failed is replaced; dev runs without a GPU and only flags it."""
    real = policy.policy_for
    monkeypatch.setattr(policy, "policy_for", lambda *given, **named: replace(real(*given, **named), fail_open=False))


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def complete(session: aiohttp.ClientSession, url: str, prompt: str = "Hello", tokens: int = 16) -> int | str:
    """One completion: its status, or how the connection broke."""
    body = {"model": "p", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            await answer.read()
            return answer.status
    except (aiohttp.ClientError, OSError) as problem:
        return repr(problem)


def told(node: PoolManager, type_: str) -> list[Any]:
    return [event for event in node.events.recent(type_) if event.pool_id == "p"]


async def test_a_silent_engine_that_computes_is_left_alone_keeps_its_leases_and_is_ready_again(
    open_dir: Path, replacing: None
) -> None:
    async with PoolManager(config(open_dir, health=QUICK)) as node:
        engine = scripted("p", "--busy-after", "1.5", "--busy-for", "4", slots_total=2)
        first = await (await node.preload("p", engine)).wait()
        lease = node.allocate_lease("p")
        await until(lambda: bool(told(node, "busy")), "the engine to be called busy")
        status = node.status("p")
        assert status["live"] and not status["ready"] and status["active_leases"] == 1
        assert status["activity"]["verdict"] == "busy" and "is at work" in status["last_error"]
        with pytest.raises(PoolError):
            node.allocate_lease("p")
        await until(lambda: node.status("p")["ready"], "it to be ready again", 10)
        after = node.status("p")
        assert (after["pid"], after["crash_count"], after["active_leases"]) == (first["pid"], 0, 1)
        assert told(node, "recovered") and not told(node, "unhealthy")
        node.release_lease("p", lease["lease_id"])
    assert left_behind(open_dir) == []


async def test_an_engine_that_computes_for_ever_and_answers_nothing_is_replaced_at_the_limit(
    open_dir: Path, replacing: None
) -> None:
    async with PoolManager(config(open_dir, health={**QUICK, "busy_limit_ms": 3_000})) as node:
        await (await node.preload("p", scripted("p", "--busy-after", "1.5"))).wait()
        await until(lambda: bool(told(node, "unhealthy")), "the endless loop to be ended", 15)
        assert "it has answered nothing for" in told(node, "unhealthy")[0].fields["last_error"]
        assert told(node, "busy")


async def test_work_that_stands_still_behind_good_health_answers_ends_the_engine(
    open_dir: Path, replacing: None, session: aiohttp.ClientSession
) -> None:
    async with PoolManager(config(open_dir, health=QUICK)) as node:
        engine = scripted("p", "--freeze-after", "1", slots_total=4)
        first = await (await node.preload("p", engine)).wait()
        asked = [asyncio.create_task(complete(session, engine.url, tokens=20_000)) for _ in range(3)]
        await until(lambda: bool(told(node, "unhealthy")), "the standstill to be noticed", 15)
        error = told(node, "unhealthy")[0].fields["last_error"]
        assert "answers its health probes, but 3 requests have stood still for" in error and "no token, no CPU time" in error
        await until(lambda: node.status("p")["ready"], "it to be replaced", 15)
        assert node.status("p")["pid"] != first["pid"] and node.status("p")["crash_count"] == 1
        assert 200 not in await asyncio.gather(*asked)


async def test_an_idle_engine_and_one_that_works_for_long_are_not_hung(
    open_dir: Path, replacing: None, session: aiohttp.ClientSession
) -> None:
    async with PoolManager(config(open_dir, health={**QUICK, "stall_ms": 1_500})) as node:
        engine = scripted("p", "--token-ms", "200", slots_total=4)
        await (await node.preload("p", engine)).wait()
        node.allocate_lease("p")
        body = {"prompt": "x", "max_tokens": 20, "stream": True}
        async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
            await until(lambda: node.status("p")["activity"]["verdict"] == "busy", "the work to be seen")
            assert b"[DONE]" in await answer.read()
        await until(lambda: node.status("p")["activity"]["why"] == "has nothing to do", "the engine to be seen idle")
        await asyncio.sleep(0)
        assert node.status("p")["ready"] and not told(node, "unhealthy") and not told(node, "busy")


async def test_a_frozen_core_behind_an_api_that_answers_is_found_and_named(
    open_dir: Path, replacing: None, session: aiohttp.ClientSession
) -> None:
    """As vLLM's EngineCore: /health and /metrics come from another process, and its gauges may be old."""
    async with PoolManager(config(open_dir, health=QUICK)) as node:
        engine = scripted("p", "--core", "--token-ms", "100", engine="vllm", slots_total=4)
        first = await (await node.preload("p", engine)).wait()
        body = {"prompt": "x", "max_tokens": 1_000, "stream": True}
        async with session.post(f"{engine.url}/v1/completions", json=body) as answer:
            await answer.content.readline()
            core = next(iter(procfs.descendants(first["pid"])))
            os.kill(core, signal.SIGSTOP)
            await until(lambda: bool(told(node, "unhealthy")), "the frozen core to be noticed", 15)
        error = told(node, "unhealthy")[0].fields["last_error"]
        assert f"pid {core} (python" in error and "has been stopped (SIGSTOP)" in error, error
        await until(lambda: node.status("p")["ready"], "it to be replaced", 15)
        assert node.status("p")["pid"] != first["pid"]
    assert mentioning(open_dir) == []


async def test_a_load_that_logs_its_progress_outlives_the_start_up_timeout(open_dir: Path, replacing: None) -> None:
    async with PoolManager(config(open_dir, health={**QUICK, "startup_timeout_ms": 2_000})) as node:
        status = await (await node.preload("p", scripted("p", "--ready-after", "6", "--progress-log", "0.3"))).wait()
        assert status["pid"] and node.status("p")["ready"] and node.status("p")["crash_count"] == 0


@pytest.mark.parametrize(("flags", "cap_ms", "says"), [([], 60_000, "no bytes"), (["--progress-log", "0.3"], 4_000, "cap")])
async def test_a_load_that_stands_still_or_takes_too_long_is_ended(
    flags: list[str], cap_ms: int, says: str, open_dir: Path, replacing: None
) -> None:
    health = {**QUICK, "startup_timeout_ms": 2_000, "startup_cap_ms": cap_ms}
    async with PoolManager(config(open_dir, health=health)) as node:
        with pytest.raises(PoolError, match="health check failed") as caught:
            await (await node.preload("p", scripted("p", "--ready-after", "60", *flags))).wait()
        assert says in caught.value.message


# --- a real engine --------------------------------------------------------------------------------------------------


def real(model: Path, server: Path, **fields: Any) -> dict[str, Any]:
    provisioning = {"mode": "binary", "binary": {"path": server}, "flags": ["--threads", "1"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{model}", "slots": 2, "ctx": 2048, "preload": False}
    return {**pool, "provisioning": provisioning, **fields}


@pytest.mark.slow
async def test_a_real_engine_under_thirty_clients_with_long_prompts_is_never_replaced(
    open_dir: Path, smol_model: Path, llama_server: Path, replacing: None
) -> None:
    health = {**QUICK, "probe_timeout_ms": 50, "stall_ms": 20_000, "startup_timeout_ms": 60_000}
    async with PoolManager(config(open_dir, real(smol_model, llama_server), health=health)) as node:
        outcome = await PreloadOutcome.execute("p", node)
        url = node.status("p")["url"]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as many:
            prompts = (f"{number}: " + "the quick brown fox jumps over the lazy dog " * 6 for number in range(30))
            answers = await asyncio.gather(*(complete(many, url, prompt, 4) for prompt in prompts))
        assert answers == [200] * 30, (answers, told(node, "unhealthy"), told(node, "crash"))
        await until(lambda: node.status("p")["ready"], "it to be ready, once it has nothing more to do")
        after = node.status("p")
        assert (after["pid"], after["crash_count"], after["restart_count"]) == (outcome.pid, 0, 0)
        assert not told(node, "unhealthy")


async def test_a_real_engine_that_is_stopped_in_the_middle_of_its_work_is_replaced_as_hung(
    open_dir: Path, smol_model: Path, llama_server: Path, replacing: None, session: aiohttp.ClientSession
) -> None:
    async with PoolManager(config(open_dir, real(smol_model, llama_server), health=QUICK)) as node:
        outcome = await PreloadOutcome.execute("p", node)
        url = node.status("p")["url"]
        asked = [asyncio.create_task(complete(session, url, tokens=600)) for _ in range(4)]
        await until(lambda: node.status("p")["activity"]["verdict"] == "busy", "the work to be seen")
        assert outcome.pid is not None
        os.kill(outcome.pid, signal.SIGSTOP)
        await until(lambda: bool(told(node, "unhealthy")), "the standstill to be noticed", 10)
        error = told(node, "unhealthy")[0].fields["last_error"]
        assert f"pid {outcome.pid} (llama-server)" in error and "stopped (SIGSTOP)" in error, error
        await until(lambda: node.status("p")["ready"], "it to be replaced", 60)
        assert node.status("p")["pid"] != outcome.pid
        assert any(isinstance(answer, str) for answer in await asyncio.gather(*asked)), "some were cut off"
    assert mentioning(open_dir) == []
