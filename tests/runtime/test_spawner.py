from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from pool_managerd.errors import EngineError, NodeError
from pool_managerd.runtime import procfs
from pool_managerd.runtime.process import EngineProcess
from pool_managerd.runtime.spawner import Spawner
from tests.runtime.support import Bench, alive, end, eventually, sh, within


async def test_a_killed_fork_server_is_replaced_and_engines_do_not_notice(bench: Bench) -> None:
    older = await bench.launch(sh("exec sleep 60", pool_id="older"))
    first = bench.spawner.pid
    assert first is not None
    end(first)
    newer = await bench.launch(sh("exec sleep 60", pool_id="newer"))
    assert bench.spawner.pid not in (None, first)
    assert alive(older.pid)
    assert alive(newer.pid)
    older.stop(1000)
    assert (await within(2, older)).signal == signal.SIGTERM


async def test_a_fork_server_killed_with_orders_in_its_hands_loses_none(bench: Bench) -> None:
    await bench.spawner.start()
    assert bench.spawner.pid is not None
    launches = [asyncio.create_task(bench.launch(sh("exec sleep 60", pool_id=f"p{n}"))) for n in range(10)]
    for _ in range(4):
        await asyncio.sleep(0)
    end(bench.spawner.pid)
    processes = await asyncio.gather(*launches)
    assert all(alive(process.pid) for process in processes)
    assert len(bench.files.records.all()) == 10


async def test_a_suspended_fork_server_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_managerd.runtime.launcher._ANSWER_SECONDS", 0.2)
    await bench.spawner.start()
    assert bench.spawner.pid is not None
    end(bench.spawner.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="no answer"):
        await bench.launch(sh("exit 0"))
    assert (await bench.run(sh("exit 5"))).code == 5


async def test_shims_are_collected_when_they_end(bench: Bench) -> None:
    process = await bench.launch(sh("exit 0"))
    await within(2, process)
    await eventually(lambda: procfs.stat(process.identity.shim_pid) is None)


async def test_closing_ends_the_fork_server_and_leaves_engines_alone(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    server = bench.spawner.pid
    assert server is not None
    await bench.spawner.close()
    assert not alive(server)
    assert alive(process.pid)
    process.kill()
    assert (await within(2, process)).signal == signal.SIGKILL


async def spare_of(bench: Bench, *others: EngineProcess) -> tuple[int, int]:
    """The shim that waits for an order, and the child that waits in it, when both are there."""
    server = bench.spawner.pid
    assert server is not None

    def found() -> list[tuple[int, int]]:
        spares = set(procfs.children(server)) - {process.shim_pid for process in others}
        return [(spare, child) for spare in spares for child in procfs.children(spare) if procfs.name(child) == "pm-engine"]

    await eventually(lambda: len(found()) == 1)
    return found()[0]


async def test_a_shim_and_its_child_wait_in_advance_take_the_next_order_and_go_with_the_daemon(bench: Bench) -> None:
    first = await bench.launch(sh("exec sleep 60"))
    spare, child = await spare_of(bench, first)
    before = time.monotonic()
    second = await bench.launch(sh("exec sleep 60", pool_id="q"))
    assert (second.shim_pid, second.pid) == (spare, child)
    (record,) = (record for record in bench.files.records.all() if record.identity.pid == child)
    assert record.began_at is not None and before < record.began_at < time.monotonic(), (
        "it began with its order, not when its process was forked"
    )
    spare, child = await spare_of(bench, first, second)
    await bench.spawner.close()
    await eventually(lambda: not alive(spare) and not alive(child))
    assert alive(first.pid) and alive(second.pid)


@pytest.mark.parametrize("which", [0, 1], ids=["the shim", "its child"])
async def test_a_spare_that_was_killed_costs_nothing_but_itself(bench: Bench, which: int) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    killed = (await spare_of(bench, process))[which]
    end(killed)
    await eventually(lambda: not alive(killed))
    assert (await bench.run(sh("exit 5"), epoch=2)).code == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into a process that has not executed yet")
async def test_the_child_that_waits_holds_nothing_of_the_daemon_or_its_shim(bench: Bench, tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        process = await bench.launch(sh("exec sleep 60"))
        _, child = await spare_of(bench, process)
        wanted = {"/dev/null": 1, "pipe": 3, "socket": 1}  # in; out, error and its status; its order

        def held_by_it() -> Counter[str]:
            return Counter(name.partition(":")[0].partition("[")[0] for name in map(str, open_files(child)))

        await eventually(lambda: held_by_it() == wanted)
    finally:
        os.close(held)


looks_into_shims = pytest.mark.skipif(os.geteuid() != 0, reason="only root may look into the fork server and its shims")


@looks_into_shims
async def test_nothing_of_the_daemon_stays_open_in_fork_server_and_shim(bench: Bench, tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        process = await bench.launch(sh("exec sleep 60"))
        assert bench.spawner.pid is not None
        for pid in (bench.spawner.pid, process.identity.shim_pid, process.pid):
            assert tmp_path not in open_files(pid)
    finally:
        os.close(held)


async def test_an_interpreter_that_cannot_run_is_reported() -> None:
    spawner = Spawner("/bin/false")
    with pytest.raises(EngineError, match="cannot start the fork server"):
        await spawner.start()
    assert spawner.pid is None


async def test_a_daemon_out_of_descriptors_says_so_and_recovers(bench: Bench) -> None:
    await bench.run(sh("exit 0"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(8):
        used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
        try:
            with suppress(EngineError, NodeError):
                (await bench.launch(sh("exec sleep 63"), epoch=spare)).kill()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await bench.run(sh("exit 5"), epoch=99)).code == 5
    server = bench.spawner.pid or 0
    await eventually(lambda: len(procfs.children(server)) <= 1)  # the spare one


async def test_an_interpreter_that_is_missing_is_reported() -> None:
    with pytest.raises(EngineError, match="No such file or directory"):
        await Spawner("/no/such/python").start()


@looks_into_shims
async def test_a_shim_costs_little_memory(bench: Bench) -> None:
    processes = await asyncio.gather(*(bench.launch(sh("exec sleep 60", pool_id=f"p{n}")) for n in range(20)))
    sizes = [_pss_kib(process.identity.shim_pid) for process in processes]
    assert sum(sizes) / len(sizes) < 2.5 * 1024


def open_files(pid: int) -> list[Path]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(entry.readlink())
    return found


def _pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
