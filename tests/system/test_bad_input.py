"""What people get wrong and engines do wrong: each ends in a clear last_error, nothing left, other pools untouched."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from pool_managerd import NodeError, PoolError, PoolManager
from tests.system.nodes import alive, config, free_port, left_behind, mentioning, scripted, until

WRONG = "sha256:" + "0" * 64


async def failing(node: PoolManager, pool_id: str, engine: Any = None) -> PoolError:
    """The error of a preload that must fail."""
    operation = await node.preload(pool_id, engine)
    with pytest.raises(PoolError) as failed:
        await operation.wait()
    status = node.status(pool_id)
    assert not status["ready"] and not status["live"] and status["last_error"]
    return failed.value


@pytest.fixture
def pool(tiny_model: Path) -> dict[str, Any]:
    return {"id": "p", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 256, "preload": False}


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"model": "file:absent.gguf"}, None, "absent.gguf"),
        ({"provisioning": {"model": {"checksum": WRONG}}}, "DIGEST_MISMATCH", "digest mismatch"),
        ({"provisioning": {"mode": "binary", "binary": {"path": "/no/such/llama-server"}}}, None, "cannot run"),
        ({"provisioning": {"mode": "binary", "binary": {"path": "/etc/hostname"}}}, None, "cannot run"),
        ({"provisioning": {"flags": ["--temprature", "1"]}}, None, "--temp"),
        ({"model": "hf:org/repo/model.gguf"}, "POLICY_DENIED", "hf"),
    ],
)  # fmt: skip
async def test_a_configuration_that_cannot_work_says_what_to_do(
    open_dir: Path, pool: dict[str, Any], change: dict[str, Any], code: str | None, words: str
) -> None:
    async with PoolManager(config(open_dir, {**pool, **change})) as node:
        error = await failing(node, "p")
        assert words in error.message and "preload failed" in error.message
        assert code is None or error.code == code
        assert words in node.status("p")["last_error"]
    assert mentioning(open_dir) == [] and left_behind(open_dir) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--exit-after", "0", "--exit-code", "3"), "code 3"),
        (("--health", "503"), "health check failed"),
        (("--health", "hang"), "health check failed"),
        (("--health", "garbage"), "health check failed"),
        (("--health", "big"), "health check failed"),
        (("--health", "redirect"), "health check failed"),
        (("--health", "close"), "health check failed"),
        (("--health", "drip"), "health check failed"),
    ],
)  # fmt: skip
async def test_an_engine_that_misbehaves_at_start_fails_with_the_reason_and_is_gone(
    open_dir: Path, flags: tuple[str, ...], words: str
) -> None:
    health = {"startup_timeout_ms": 1_500, "interval_ms": 100, "probe_timeout_ms": 300}
    async with PoolManager(config(open_dir, health=health)) as node:
        good = await node.preload("good", scripted("good"))
        await good.wait()
        error = await failing(node, "bad", scripted("bad", *flags))
        assert words in error.message
        assert node.status("bad")["state"] == "failed"
        assert node.status("good")["ready"] and node.status("good")["crash_count"] == 0
    assert mentioning(open_dir) == [] and left_behind(open_dir) == []


async def test_an_early_exit_quotes_the_end_of_the_engines_log(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        engine = scripted("p", "--exit-after", "0", "--exit-code", "3")
        await failing(node, "p", engine)
        crash = node.crashes("p")[-1]
        assert crash["exit_code"] == 3 and crash["log_tail"]


async def test_a_port_that_answers_for_somebody_else_never_makes_a_pool_ready(open_dir: Path) -> None:
    """Another program holds the port and answers 200; our engine cannot bind and exits."""
    async with PoolManager(config(open_dir / "other")) as other:
        squatter = scripted("squatter")
        await (await other.preload("squatter", squatter)).wait()
        async with PoolManager(config(open_dir)) as node:
            seen: list[bool] = []
            node.events.listen(lambda event: seen.append(any(s["ready"] for s in node.statuses())))
            await failing(node, "p", scripted("p", port=squatter.port))
            assert not any(seen)
        assert other.status("squatter")["ready"]


async def test_a_configured_pool_moves_to_another_port_when_its_own_is_lost(open_dir: Path, pool: dict[str, Any]) -> None:
    port = free_port()
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        one_thread = {"provisioning": {"flags": ["--threads", "1"]}}
        node_config = config(open_dir, {**pool, **one_thread}, daemon={"engine_ports": f"{port}-{port + 20}"})
        async with PoolManager(node_config) as node:
            status = await node.ensure_ready("p")
            assert not status["url"].endswith(f":{port}")


async def test_a_second_daemon_on_the_same_state_is_refused_with_the_pid_of_the_first(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)):
        with pytest.raises(NodeError, match=f"pid {os.getpid()}"):
            async with PoolManager(config(open_dir)):
                pass
        elsewhere = config(open_dir, daemon={"state_dir": open_dir / "state2"})
        with pytest.raises(NodeError, match="runtime directory"):
            async with PoolManager(elsewhere):
                pass
    async with PoolManager(config(open_dir)):
        pass


async def test_state_that_cannot_be_written_or_read_is_told_apart(open_dir: Path) -> None:
    (open_dir / "file").write_text("in the way")
    with pytest.raises(NodeError, match="cannot write to state directory"):
        async with PoolManager(config(open_dir, daemon={"state_dir": open_dir / "file" / "state"})):
            pass
    (open_dir / "state").mkdir()
    (open_dir / "state/state.db").write_bytes(b"this is not a database, not at all" * 40)
    async with PoolManager(config(open_dir)) as node:
        assert any("set aside" in event.human for event in node.events.recent("notice"))
    assert (open_dir / "state/state.db.corrupt").exists()


async def test_ten_pools_at_once_come_up_crash_and_come_back_alone(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        operations = [await node.preload(f"p{n}", scripted(f"p{n}")) for n in range(10)]
        outcomes = [await operation.wait() for operation in operations]
        assert len({outcome["pid"] for outcome in outcomes}) == 10
        os.kill(outcomes[3]["pid"], signal.SIGSEGV)
        await until(lambda: node.status("p3")["restart_count"] == 1 and node.status("p3")["ready"], "p3 to come back")
        assert [node.status(f"p{n}")["crash_count"] for n in range(10)] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
        assert all(alive(outcome["pid"]) for n, outcome in enumerate(outcomes) if n != 3)
    assert mentioning(open_dir) == [] and left_behind(open_dir) == []
