"""Engines that misbehave while they serve, on real processes."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from pool_managerd import PoolManager
from pool_managerd.errors import PoolError
from tests.system.nodes import alive, config, left_behind, mentioning, scripted, until

FAST_FAIL = {
    "probe_interval_ms": 100,
    "probe_timeout_ms": 200,
    "failure_threshold": 3,
    "startup_timeout_ms": 10_000,
    "interval_ms": 50,
}


async def test_a_stopped_process_is_unready_soon_and_ready_again_when_it_goes_on(open_dir: Path) -> None:
    """Profile dev leaves a hung engine running (fail-open)."""
    async with PoolManager(config(open_dir, health=FAST_FAIL)) as node:
        outcome = await (await node.preload("p", scripted("p"))).wait()
        os.kill(outcome["pid"], signal.SIGSTOP)
        await until(lambda: not node.status("p")["ready"], "a frozen engine to be unready", 5)
        assert node.status("p")["live"] and "health check failed" in node.status("p")["last_error"]
        os.kill(outcome["pid"], signal.SIGCONT)
        await until(lambda: node.status("p")["ready"], "the engine to be believed again", 5)
        assert node.status("p")["pid"] == outcome["pid"]
    assert mentioning(open_dir) == []


async def test_a_pool_whose_port_another_pools_engine_took_is_unready_and_names_it(open_dir: Path) -> None:
    """Its own engine closed the port; the other answers every probe, and every answer is wrong."""
    health = {**FAST_FAIL, "failure_threshold": 1000}
    async with PoolManager(config(open_dir, health=health)) as node:
        victim = scripted("victim", "--close-port-after", "1")
        await (await node.preload("victim", victim)).wait()
        await until(lambda: not node.status("victim")["ready"] or closed(victim.port), "the port to be closed", 5)
        thief = await (await node.preload("thief", scripted("thief", port=victim.port))).wait()
        await until(lambda: not node.status("victim")["ready"], "the victim to be unready", 5)
        assert f"is not held by this engine but by pid {thief['pid']}" in node.status("victim")["last_error"]
        with pytest.raises(PoolError):
            node.allocate_lease("victim")
        assert node.status("thief")["ready"]


def closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_an_engine_that_ignores_sigterm_and_its_grandchildren_are_gone_after_a_stop(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        engine = scripted("p", "--ignore-term", "--fork-grandchildren", "3", "--setsid")
        outcome = await (await node.preload("p", engine)).wait()
        await (await node.stop("p")).wait()
        assert not alive(outcome["pid"]) and node.status("p")["state"] == "offline"
    assert mentioning(open_dir) == [] and left_behind(open_dir) == []


async def test_an_engine_that_ends_with_code_0_is_offline_and_stays_so(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        await (await node.preload("p", scripted("p", "--exit-after", "0.5", "--exit-code", "0"))).wait()
        await until(lambda: node.status("p")["state"] == "offline", "the graceful end")
        assert node.status("p")["crash_count"] == 0 and node.status("p")["last_error"] is None
    async with PoolManager(config(open_dir)) as later:
        await until(lambda: "p" in later.pool_ids(), "the pool to be known")
        assert (later.status("p")["state"], later.status("p")["restart_count"]) == ("uninitialized", 0)
        assert (await (await later.start("p")).wait())["pid"], "who asks for it has it again"


async def test_a_handoff_file_registers_an_engine_of_somebody_else(open_dir: Path) -> None:
    async with PoolManager(config(open_dir / "owner")) as owner, PoolManager(config(open_dir / "guest")) as guest:
        engine = scripted("theirs")
        await (await owner.preload("theirs", engine)).wait()
        assert "theirs" not in guest.pool_ids()
        drop = open_dir / "guest/run/engines/theirs-r0.json"
        drop.write_text(f'{{"pool_id": "theirs", "url": "{engine.url}", "engine_version": "x1", "slots": 3, "gpu_device": "0"}}')
        await until(lambda: "theirs" in guest.pool_ids() and guest.status("theirs")["ready"], "the handoff to be taken up", 5)
        status = guest.status("theirs")
        assert (status["engine_version"], status["slots_total"], status["device_mask"], status["pid"]) == ("x1", 3, "0", None)
        drop.with_name("broken-r0.json").write_text("{")
        await until(
            lambda: any(e.fields["outcome"] == "error" for e in guest.events.recent("handoff")), "the bad file to be told", 5
        )
