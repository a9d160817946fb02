"""The whole path with real engines, through the library: load, answer, be killed, come back, drain, leave nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pool_managerd import (
    DrainRequest,
    EngineError,
    PoolManager,
    PreloadOutcome,
    PreparedEngine,
    ReloadRequest,
    RequestError,
    execute_drain,
    execute_reload,
)
from pool_managerd.engines import ports
from pool_managerd.errors import PoolError
from pool_managerd.testing import fake_engine
from tests.models.made_models import write_bert
from tests.system.nodes import alive, config, left_behind, mentioning, until

QUESTION = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0, "max_tokens": 16,
}  # fmt: skip


ONE_THREAD: dict[str, Any] = {"provisioning": {"flags": ["--threads", "1"]}}
"""llama.cpp's threads spin while they wait for each other, which takes minutes on a busy machine."""


async def ask(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/chat/completions", json=QUESTION) as answer:
        assert answer.status == 200
        return str((await answer.json())["choices"][0]["message"]["content"])


async def write(url: str, tokens: int) -> int:
    """As many tokens as asked for, at ease: how many it made."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200
        return int((await answer.json())["usage"]["completion_tokens"])


@pytest.mark.parametrize("mode", ["package", "binary"])
@pytest.mark.parametrize("pooling", [2, 4])
async def test_an_encoder_embeds_or_ranks_and_its_warm_up_is_answered(
    mode: str, pooling: int, open_dir: Path, llama_server: Path
) -> None:
    model = write_bert(open_dir / "encoder", pooling=pooling)
    provisioning: dict[str, Any] = {"mode": mode, **ONE_THREAD["provisioning"]}
    if mode == "binary":
        provisioning["binary"] = {"path": llama_server}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{model}", "provisioning": provisioning, "preload": False}
    route, asked = ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}) if pooling == 4 else ("/v1/embeddings", {"input": "a"})
    async with PoolManager(config(open_dir, pool)) as node:
        await PreloadOutcome.execute("p", node)
        status = node.status("p")
        assert status["ready"] and status["perf"]["first_token_ms"] > 0
        url = f"{status['url']}{route}"
        async with aiohttp.ClientSession() as session, session.post(url, json=asked) as answer:
            assert answer.status == 200, await answer.text()


@pytest.mark.parametrize("mode", ["package", "binary"])
@pytest.mark.parametrize(
    ("spoilt", "flags", "cause"),
    [
        (b"blk.0.attn_q.weight", [], "blk.0.attn_q.weight'"),
        (b"", ["--cache-type-v", "q8_0", "--flash-attn", "off"], "V cache"),
    ],
)
async def test_a_failed_start_says_what_the_engine_said_of_the_cause(
    mode: str, spoilt: bytes, flags: list[str], cause: str, open_dir: Path, tiny_model: Path, llama_server: Path
) -> None:
    model = open_dir / "m.gguf"
    model.write_bytes(tiny_model.read_bytes().replace(spoilt, spoilt.upper()) if spoilt else tiny_model.read_bytes())
    provisioning: dict[str, Any] = {"mode": mode, "flags": [*ONE_THREAD["provisioning"]["flags"], *flags]}
    if mode == "binary":
        provisioning["binary"] = {"path": llama_server}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{model}", "provisioning": provisioning, "preload": False}
    async with PoolManager(config(open_dir, {**pool, "restart": "never"})) as node:
        # On a busy machine an engine may fall over its own end before its log's thread has written why: another try, then.
        told, message = "SIGSEGV", ""
        tries = 0
        while "SIGSEGV" in told and cause not in told and tries < 5:
            tries += 1
            with pytest.raises(PoolError) as caught:
                await PreloadOutcome.execute("p", node)
            told, message = str(node.status("p")["last_error"]), caught.value.message
        assert cause in told and cause in message
        assert "exiting due to" not in told and "\x1b" not in told


@pytest.mark.parametrize("mode", ["package", "binary"])
async def test_a_real_engine_serves_is_killed_comes_back_and_drains(
    mode: str, open_dir: Path, smol_model: Path, llama_server: Path
) -> None:
    provisioning: dict[str, Any] = {"mode": mode, **ONE_THREAD["provisioning"]}
    if mode == "binary":
        provisioning["binary"] = {"path": llama_server}
    digest = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    provisioning["model"] = {"checksum": digest}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 1024, "slots": 2, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False})) as node:
        assert node.status("p")["state"] == "uninitialized"
        outcome = await PreloadOutcome.execute("p", node)
        status = node.status("p")
        assert status["ready"] and status["live"] and status["pid"] == outcome.pid and status["engine_version"] != "unknown"
        assert (open_dir / "run/p.pid").read_text() == str(outcome.pid)
        assert status["perf"]["tokens_per_s"] > 0 and status["perf"]["first_token_ms"] > 0
        assert "Paris" in await ask(status["url"])

        assert outcome.pid is not None
        os.kill(outcome.pid, signal.SIGKILL)
        await until(lambda: not node.status("p")["live"], "the death to be noticed")
        await until(lambda: node.status("p")["ready"], "the pool to be ready again")
        again = node.status("p")
        assert again["pid"] != outcome.pid and again["crash_count"] == 1 and again["restart_count"] == 1
        assert "Paris" in await ask(again["url"])
        assert [crash["signal"] for crash in node.crashes("p")] == ["SIGKILL"]

        drained = await execute_drain(DrainRequest("p", 2_000), node)
        assert not drained.force_stopped and drained.final_lease_count == 0
        assert not alive(again["pid"]) and node.status("p")["state"] == "offline"
    assert mentioning(open_dir) == []
    assert left_behind(open_dir) == []


async def test_a_real_engine_is_replaced_when_the_next_one_answers_as_it_should_and_not_otherwise(
    open_dir: Path, smol_model: Path
) -> None:
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 512, "preload": False, **ONE_THREAD}
    rules = {"smoke_prompt": "The capital of France is", "smoke_expect": "paris", "bake_ms": 200}
    async with PoolManager(config(open_dir, pool, reload=rules)) as node:
        before = await node.ensure_ready("p")
        outcome = await execute_reload(ReloadRequest("p", changes={"ctx": 1024}, strategy="stop_start"), node)
        after = node.status("p")
        assert outcome.downtime_ms > 0 and after["ready"] and after["epoch"] == before["epoch"] + 1
        assert (after["ctx_max"], after["restart_count"], after["crash_count"]) == (1024, 0, 0)
    async with PoolManager(config(open_dir, pool, reload={**rules, "smoke_expect": "Atlantis"})) as node:
        before = await node.ensure_ready("p")
        assert before["ctx_max"] == 1024, "what it was reloaded with holds"
        with pytest.raises(EngineError, match=r"reload failed: .* lacks 'Atlantis'.*what ran before runs again") as failed:
            await execute_reload(ReloadRequest("p", changes={"ctx": 256}, strategy="stop_start"), node)
        assert failed.value.details["rolled_back"] is True
        assert node.status("p")["ready"] and node.status("p")["ctx_max"] == 1024
    assert mentioning(open_dir) == []


async def test_another_model_takes_over_beside_the_one_that_answers_and_no_answer_is_cut_off(
    open_dir: Path, smol_model: Path, tiny_model: Path
) -> None:
    """Two real models: a request that is under way ends on the engine that it began on, while the next one has its place."""
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 512, "preload": False, **ONE_THREAD}
    async with PoolManager(config(open_dir, pool, reload={"bake_ms": 200})) as node:
        before = await node.ensure_ready("p")
        lease = node.allocate_lease("p")
        answer = asyncio.create_task(write(before["url"], 150))
        outcome = await execute_reload(ReloadRequest("p", new_model_ref=f"file:{tiny_model}", drain_deadline_ms=60_000), node)
        after = node.status("p")
        assert (outcome.strategy, outcome.downtime_ms) == ("blue_green", 0)
        assert after["ready"] and after["url"] != before["url"] and after["beside"]["pid"] == before["pid"]
        assert await answer == 150
        node.release_lease("p", lease["lease_id"])
        await until(lambda: node.status("p")["beside"] is None, "the old engine to end")
        assert not alive(before["pid"]) and node.status("p")["pid"] == after["pid"]
        with pytest.raises(EngineError, match="reload failed: cannot use the flag --override-kv"):
            await execute_reload(ReloadRequest("p", changes={"provisioning": {"flags": ["--override-kv", "x"]}}), node)
        assert node.status("p")["pid"] == after["pid"]
    assert mentioning(open_dir) == []


async def test_callers_at_once_share_one_start_of_a_real_engine(open_dir: Path, tiny_model: Path) -> None:
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "preload": False, **ONE_THREAD}
    async with PoolManager(config(open_dir, pool)) as node:
        statuses = await asyncio.gather(*(node.ensure_ready("p") for _ in range(5)))
        assert [status["ready"] for status in statuses] == [True] * 5
        assert len({status["pid"] for status in statuses}) == 1 and node.status("p")["epoch"] == 1


async def test_a_real_server_that_ends_with_exit_code_0_unasked_has_failed_and_comes_back(
    open_dir: Path, tiny_model: Path, llama_server: Path
) -> None:
    provisioning = {"mode": "binary", "binary": {"path": llama_server}, **ONE_THREAD["provisioning"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "provisioning": provisioning}
    async with PoolManager(config(open_dir, pool)) as node:
        first = await node.ensure_ready("p")
        os.kill(first["pid"], signal.SIGTERM)
        await until(lambda: node.status("p")["crash_count"] == 1, "its end to be counted as a crash")
        assert node.crashes("p")[0]["exit_code"] == 0
        await until(lambda: node.status("p")["ready"], "the pool to be ready again")
        assert node.status("p")["pid"] != first["pid"] and node.status("p")["restart_count"] == 1


async def test_an_evicted_pool_comes_back_on_demand_and_a_stopped_one_does_not(open_dir: Path, tiny_model: Path) -> None:
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "preload": False, **ONE_THREAD}
    async with PoolManager(config(open_dir, pool)) as node:
        assert node.status("p")["desired"] == "on_demand"
        first = await node.ensure_ready("p")
        lease = node.allocate_lease("p")
        with pytest.raises(RequestError) as in_use:
            await node.evict("p")
        assert in_use.value.code == "POOL_IN_USE" and node.status("p")["ready"]
        node.release_lease("p", lease["lease_id"])
        await (await node.evict("p")).wait()
        status = node.status("p")
        assert (status["desired"], status["drained"], status["live"], status["crash_count"]) == ("evicted", False, False, 0)
        again = await node.ensure_ready("p")
        assert again["desired"] == "wanted" and again["pid"] != first["pid"] and again["epoch"] == first["epoch"] + 1
        await (await node.stop("p")).wait()
        status = node.status("p")
        assert (status["desired"], status["drained"]) == ("stopped", False)
        with pytest.raises(RequestError) as stopped:
            await node.ensure_ready("p")
        assert stopped.value.code == "POOL_STOPPED"
        await (await node.drain("p")).wait()
        assert (node.status("p")["desired"], node.status("p")["drained"]) == ("drained", True)
        await (await node.start("p")).wait()
        assert node.status("p")["ready"] and node.status("p")["desired"] == "wanted"


async def test_the_number_of_a_launch_never_goes_back_over_restarts_and_over_pools_that_were_forgotten(
    open_dir: Path, tiny_model: Path
) -> None:
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "preload": False, **ONE_THREAD}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = PreparedEngine("s", sys.executable, ("-I", "-S", fake_engine.__file__, "--port", str(port)), port=port)
    seen: dict[str, list[int]] = {"p": [], "s": []}
    for _ in range(2):
        async with PoolManager(config(open_dir, pool)) as node:
            seen["p"].append((await node.ensure_ready("p"))["epoch"])
            await (await node.preload("s", engine)).wait()
            seen["s"].append(node.status("s")["epoch"])
            await (await node.stop("s")).wait()
            await node.deregister("s")
    assert seen["p"][0] < seen["p"][1] and seen["s"][0] < seen["s"][1]


async def test_a_real_engine_is_attached_to_and_never_signalled(open_dir: Path, tiny_model: Path) -> None:
    owner = config(
        open_dir / "owner", {"id": "own", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, **ONE_THREAD}
    )
    async with PoolManager(owner) as first:
        served = await first.ensure_ready("own")
        external = {
            "id": "ext", "engine": "llamacpp", "model": "theirs", "provisioning": {"mode": "external", "url": served["url"]},
        }  # fmt: skip
        async with PoolManager(config(open_dir / "guest", external)) as second:
            status = await second.ensure_ready("ext")
            assert status["ready"] and status["pid"] is None
            stopped = await second.stop("ext")
            await stopped.wait()
        assert alive(served["pid"]) and first.status("own")["ready"]


async def test_ready_is_noticed_without_waiting_for_the_next_interval(open_dir: Path, tiny_model: Path) -> None:
    """With a probe interval of a minute a tiny model is still ready in seconds."""
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, **ONE_THREAD}
    slow = {"health": {"interval_ms": 60_000, "startup_timeout_ms": 60_000}, "lifecycle": {"warmup": "off"}}
    async with PoolManager(config(open_dir, pool, **slow)) as node:
        await until(lambda: node.status("p")["ready"], "readiness", 20)


@pytest.mark.parametrize("mode", ["package", "binary"])
async def test_a_port_lost_between_choosing_and_binding_is_survived(
    mode: str, open_dir: Path, tiny_model: Path, llama_server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program binds the port in the very moment after it was found free."""
    squatters: list[socket.socket] = []
    is_free = ports.is_free

    def free_and_lost(port: int) -> bool:
        found = is_free(port)
        if found and not squatters:
            squatters.append(socket.create_server(("127.0.0.1", port)))
        return found

    monkeypatch.setattr(ports, "is_free", free_and_lost)
    provisioning: dict[str, Any] = {"mode": mode, "binary": {"path": llama_server}, **ONE_THREAD["provisioning"]}
    pool = {
        "id": "p",
        "engine": "llamacpp",
        "model": f"file:{tiny_model}",
        "ctx": 256,
        "provisioning": provisioning,
        "preload": False,
    }
    async with PoolManager(config(open_dir, pool)) as node:
        status = await node.ensure_ready("p")
        assert len(squatters) == 1
        assert not status["url"].endswith(f":{squatters[0].getsockname()[1]}")
        assert status["crash_count"] == 0
        assert [event.type for event in node.events.recent("port_conflict")] == ["port_conflict"]
    squatters[0].close()
