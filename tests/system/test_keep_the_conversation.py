"""A restart keeps the conversation: real engines read a prompt of 2,000 tokens once, and one that lies is found out."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pool_managerd import PoolError, PoolManager, PurgeRequest, ReloadRequest, execute_reload
from pool_managerd.testing import slot_engine
from tests.system.daemons import Daemon
from tests.system.nodes import config, mentioning, until

TOKENS = [(37 * number) % 2_000 + 100 for number in range(2_000)]
"""Any will do: a prompt is a list of tokens as well as a text."""


async def cached(url: str, tokens: list[int]) -> int:
    """How many tokens of the prompt the engine had, by its own count."""
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0}
    timeout = aiohttp.ClientTimeout(total=500)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.post(f"{url}/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return int((await answer.json())["timings"]["cache_n"])


def saved(directory: Path) -> list[Path]:
    return sorted((directory / "run/cache").glob("*/slots/*"))


def told(node: PoolManager, type_: str) -> list[dict[str, Any]]:
    return [dict(event.fields) for event in node.events.recent(type_)]


LONG = [pytest.mark.slow, pytest.mark.timeout(600)]
"""Two thousand tokens take a minute and a half where another program has one of two cores."""


@pytest.mark.parametrize("count", [300, pytest.param(2_000, marks=LONG)])
@pytest.mark.parametrize("mode", ["package", pytest.param("binary", marks=LONG)])
async def test_a_real_engine_reads_a_long_prompt_once_over_restarts_evictions_and_the_daemons_end(
    mode: str, count: int, open_dir: Path, smol_model: Path, llama_server: Path
) -> None:
    tokens, had = TOKENS[:count], count - 20
    provisioning: dict[str, Any] = {"mode": mode, "flags": ["--threads", "1"]}
    if mode == "binary":
        provisioning["binary"] = {"path": llama_server}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 4096, "provisioning": provisioning}
    rules = {"slot_cache": {"disk_bytes": "256MiB"}, "reload": {"bake_ms": 100, "baseline_share": 0}}
    async with PoolManager(config(open_dir, {**pool, "preload": False}, **rules)) as node:
        url = (await node.ensure_ready("p"))["url"]
        assert node.status("p")["cache"] == {"restored_slots": 0, "restored_tokens": 0, "lost": None}
        assert await cached(url, tokens) == 0
        await (await node.evict("p")).wait()
        (file,) = saved(open_dir)
        assert file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0
        url = (await node.ensure_ready("p"))["url"]
        assert saved(open_dir) == [], "what was said lies on disk only while its engine is down"
        assert node.status("p")["cache"]["restored_slots"] == 1
        assert await cached(url, tokens) >= had
        await (await node.restart("p")).wait()
        assert await cached(node.status("p")["url"], tokens) >= had
        assert told(node, "cache_lost") == []
    assert len(saved(open_dir)) == 1, "saved at the daemon's end"
    async with PoolManager(config(open_dir, {**pool, "preload": False}, **rules)) as node:
        url = (await node.ensure_ready("p"))["url"]
        assert await cached(url, tokens) >= had
        await execute_reload(ReloadRequest("p", changes={"ctx": 8192}), node)
        status = node.status("p")
        assert status["cache"]["restored_slots"] == 0 and "another context" in status["cache"]["lost"]
        assert [fields["reason"] for fields in told(node, "cache_lost")] == ["different"]
        assert await cached(status["url"], TOKENS[:20]) < 20
    assert mentioning(open_dir) == []


@pytest.mark.parametrize("restores", ["all", "nothing"])
async def test_an_engine_that_says_it_restored_and_did_not_is_found_out(restores: str, open_dir: Path, tiny_model: Path) -> None:
    program = open_dir / "llama-server"
    run = f'exec {sys.executable} -I {slot_engine.__file__} --restores {restores} "$@"'
    program.write_text(f'#!/bin/sh\ncase "$1" in --help|--version) exit 0;; esac\n{run}\n')
    program.chmod(0o755)
    provisioning = {"mode": "binary", "binary": {"path": program}}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 4096, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False})) as node:
        url = (await node.ensure_ready("p"))["url"]
        assert await cached(url, TOKENS) == 0
        await (await node.restart("p")).wait()
        status = node.status("p")
        assert status["ready"] and saved(open_dir) == []
        lost = [event.human for event in node.events.recent("cache_lost")]
        if restores == "all":
            assert lost == [] and status["cache"]["restored_tokens"] == 2_000
            assert await cached(status["url"], TOKENS) >= 1_900
        else:
            assert len(lost) == 1 and lost[0].startswith("Cache lost in pool 'p'") and "of 2000 tokens" in lost[0]
            assert status["cache"]["restored_slots"] == 0


async def test_a_drained_pool_is_saved_too_and_what_was_saved_goes_with_its_pool(open_dir: Path, tiny_model: Path) -> None:
    pool = {
        "id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 512, "preload": False,
        "provisioning": {"flags": ["--threads", "1"]},
    }  # fmt: skip
    rules = {"slot_cache": {"min_tokens": 16}}
    async with PoolManager(config(open_dir, pool, **rules)) as node:
        url = (await node.ensure_ready("p"))["url"]
        await cached(url, [number % 20 for number in range(64)])
        await (await node.drain("p")).wait()
        assert len(saved(open_dir)) == 1, "a drained pool's, too"
    async with PoolManager(config(open_dir, **rules)):
        await until(lambda: not list((open_dir / "run/cache").rglob("*.kv")), "the files of a pool that is gone to be gone")


def test_what_an_earlier_daemon_gave_back_is_unknown_and_not_none(open_dir: Path, tiny_model: Path) -> None:
    provisioning = '{flags: ["--threads", "1"]}'
    pool = f'{{id: p, engine: llamacpp, model: "file:{tiny_model}", ctx: 512, provisioning: {provisioning}}}'
    daemon = Daemon(open_dir / "d", f"slot_cache: {{min_tokens: 16}}\npools:\n  - {pool}\n")
    try:
        daemon.start()
        daemon.until(lambda status: bool(status["ready"]), "the engine to be ready")
        asyncio.run(cached(daemon.status()["url"], [number % 20 for number in range(64)]))
        assert daemon.post("/v1/pools/p/restart?wait=true")[0] == 200
        assert daemon.status()["cache"] == {"restored_slots": 1, "restored_tokens": 64, "lost": None}
        daemon.kill()
        daemon.start()
        daemon.until(lambda status: bool(status["ready"]), "the engine to be taken over")
        assert daemon.status()["cache"] == {"restored_slots": None, "restored_tokens": None, "lost": None}
    finally:
        daemon.end()


async def test_a_purge_of_the_cache_saves_nothing_that_it_then_deletes(open_dir: Path, tiny_model: Path) -> None:
    provisioning = {"flags": ["--threads", "1"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 512, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False}, slot_cache={"min_tokens": 16})) as node:
        url = (await node.ensure_ready("p"))["url"]
        await cached(url, [number % 20 for number in range(64)])
        await (await node.purge(PurgeRequest("p", delete_cache_dirs=True))).wait()
        assert not node.events.recent("cache_saved") and not node.events.recent("cache_lost")


async def test_a_prime_prompt_is_read_before_anybody_asks(open_dir: Path, smol_model: Path) -> None:
    prompt = "You know the capitals of all countries, and say nothing but their names. " * 8
    pool = {
        "id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 1024, "slots": 2, "preload": False,
        "prime_prompt": prompt, "provisioning": {"flags": ["--threads", "1"]},
    }  # fmt: skip
    async with PoolManager(config(open_dir, pool)) as node:
        url = (await node.ensure_ready("p"))["url"]
        assert len(told(node, "primed")) == 1
        messages = [{"role": "system", "content": prompt}, {"role": "user", "content": "What is the capital of France?"}]
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}) as answer,
        ):
            timings = (await answer.json())["timings"]
        assert timings["cache_n"] > 100 and timings["prompt_n"] < 30


async def test_a_slot_that_generates_when_a_real_engine_is_stopped_is_told_as_lost(open_dir: Path, smol_model: Path) -> None:
    provisioning = {"flags": ["--threads", "1"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{smol_model}", "ctx": 2048, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False}, slot_cache={"min_tokens": 16})) as node:
        url = (await node.ensure_ready("p"))["url"]
        body = {"prompt": TOKENS[:64], "max_tokens": 1_500, "ignore_eos": True, "stream": True}
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.post(f"{url}/v1/completions", json=body) as answer:
            assert await answer.content.readline()
            await (await node.stop("p")).wait()
        assert [fields["reason"] for fields in told(node, "cache_lost")] == ["busy"] and saved(open_dir) == []
        await (await node.start("p")).wait()
        assert "it had a request when it was stopped" in node.status("p")["cache"]["lost"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("chattr") is None, reason="only root may make a file immutable")
async def test_a_saved_conversation_that_cannot_be_deleted_fails_the_purge_until_it_can(open_dir: Path, tiny_model: Path) -> None:
    provisioning = {"flags": ["--threads", "1"]}
    pool = {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 512, "provisioning": provisioning}
    async with PoolManager(config(open_dir, {**pool, "preload": False}, slot_cache={"min_tokens": 16})) as node:
        url = (await node.ensure_ready("p"))["url"]
        await cached(url, [number % 20 for number in range(64)])
        await (await node.stop("p")).wait()
        (file,) = saved(open_dir)
        if subprocess.run(["chattr", "+i", file], check=False, capture_output=True).returncode:
            pytest.skip("this file system has no immutable files")
        request = PurgeRequest("p", delete_cache_dirs=True)
        try:
            with pytest.raises(PoolError, match=rf"{file.name} stays: Operation not permitted"):
                await (await node.purge(request)).wait()
            assert (await node.plan_purge(request))["would_free_bytes"] > 0
        finally:
            subprocess.run(["chattr", "-R", "-i", open_dir / "run/cache"], check=True, capture_output=True)
        assert (await (await node.purge(request)).wait())["freed_bytes"] > 0
        assert list((open_dir / "run/cache").iterdir()) == []
