from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pool_managerd.core.artifacts import PreparedEngine
from pool_managerd.core.instance_id import InstanceId
from pool_managerd.runtime import procfs
from pool_managerd.runtime.engine_users import UserRules
from pool_managerd.runtime.launcher import LaunchOptions
from tests.runtime.support import Bench, alive, end, eventually, fake, sh, within


async def test_a_willing_engine_ends_on_sigterm_with_its_own_code(bench: Bench) -> None:
    process = await bench.launch(sh("trap 'exit 4' TERM; echo up; while :; do sleep 0.01; done"))
    await bench.says("up")
    process.stop(5000)
    record = await within(2, process)
    assert (record.code, record.stopped_by_us) == (4, True)


async def test_an_engine_that_ignores_sigterm_is_killed_after_the_grace(bench: Bench) -> None:
    process = await bench.launch(fake("--ignore-term"))
    await bench.says("listens")
    started = time.monotonic()
    process.stop(300)
    process.stop(5000)  # asking again never makes it longer
    record = await within(2, process)
    assert (record.signal, record.stopped_by_us) == (signal.SIGKILL, True)
    assert 0.3 <= time.monotonic() - started < 2.3


async def test_asking_again_with_less_grace_shortens_the_wait(bench: Bench) -> None:
    process = await bench.launch(fake("--ignore-term"))
    await bench.says("listens")
    started = time.monotonic()
    process.stop(60_000)
    process.stop(100)
    assert (await within(2, process)).signal == signal.SIGKILL
    assert time.monotonic() - started < 2.1


async def test_no_grace_means_no_sigterm(bench: Bench) -> None:
    process = await bench.launch(sh("trap 'exit 4' TERM; echo up; while :; do sleep 0.01; done"))
    await bench.says("up")
    process.stop(0)
    assert (await within(2, process)).signal == signal.SIGKILL


async def test_kill_is_immediate_and_ours(bench: Bench) -> None:
    process = await bench.launch(fake("--ignore-term"))
    started = time.monotonic()
    process.kill()
    record = await within(2, process)
    assert (record.signal, record.stopped_by_us) == (signal.SIGKILL, True)
    assert time.monotonic() - started < 0.5


async def test_stopping_what_has_ended_changes_nothing(bench: Bench) -> None:
    process = await bench.launch(sh("exit 7"))
    record = await within(2, process)
    process.stop(10)
    process.kill()
    assert await process.wait() == record
    assert not record.stopped_by_us


async def test_a_suspended_engine_is_woken_to_end(bench: Bench) -> None:
    process = await bench.launch(sh("trap 'exit 0' TERM; echo up; while :; do sleep 0.01; done"))
    await bench.says("up")
    end(process.pid, signal.SIGSTOP)
    process.stop(5000)
    assert (await within(2, process)).code == 0


async def test_the_death_is_noticed_before_the_cleaning_up_is_done(bench: Bench) -> None:
    process = await bench.launch(sh("exec sleep 60"))
    end(process.pid)
    async with asyncio.timeout(1):
        await process.wait_dead()
    assert (await within(2, process)).signal == signal.SIGKILL


@pytest.mark.parametrize("session", [(), ("--setsid",)])
async def test_what_an_engine_forked_dies_with_it(bench: Bench, session: tuple[str, ...]) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "5", *session))
    grandchildren = await bench.grandchildren(5)
    await bench.says("listens")
    end(process.pid)
    await within(3, process)
    assert not [pid for pid in grandchildren if alive(pid)]


async def test_what_an_engine_forked_dies_on_a_stop_too(bench: Bench) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "3", "--setsid", "--ignore-term"))
    grandchildren = await bench.grandchildren(3)
    process.stop(100)
    await within(3, process)
    assert not [pid for pid in grandchildren if alive(pid)]


async def test_every_generation_of_orphans_is_reached(bench: Bench) -> None:
    nest = "setsid sh -c 'setsid sh -c \"setsid sleep 62 & echo grandchild \\$!; exec sleep 62\" & exec sleep 62' & sleep 62"
    process = await bench.launch(sh(nest))
    (deepest,) = await bench.grandchildren(1)
    end(process.pid)
    await within(3, process)
    assert not alive(deepest)


async def test_an_end_is_noticed_although_a_grandchild_holds_the_output(bench: Bench) -> None:
    process = await bench.launch(fake("--leave-pipe"))
    (holder,) = await bench.grandchildren(1)
    started = time.monotonic()
    end(process.pid)
    await within(3, process)
    assert time.monotonic() - started < 2.5, "a moment for it to end by itself, and no more"
    assert not alive(holder)


# Each lives only until it has forked the next one.
_CHAIN = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork() != 0:
                os._exit(0)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("how", ["stop", "lost shim"])
async def test_processes_that_fork_on_and_on_do_not_outrun_their_end(bench: Bench, how: str) -> None:
    process = await bench.launch(PreparedEngine("p", sys.executable, ("-I", "-S", "-c", _CHAIN)))
    await bench.says("up")
    process.stop(500) if how == "stop" else end(process.shim_pid)
    await within(8, process)
    uid = process.identity.uid
    await eventually(lambda: not [pid for pid in procfs.pids() if uid in procfs.uids(pid)])


_TRACKER = "trap '' TERM; echo ready; while [ -e /proc/%s/exe ]; do sleep 0.05; done; sleep 0.3; rm %s; echo tidied"


@pytest.mark.parametrize("stop", ["stop", "death"])
async def test_descendants_may_clean_up_after_the_engine(bench: Bench, stop: str) -> None:
    kept = "$HOME/segment"
    process = await bench.launch(sh(f"touch {kept}; ({_TRACKER % ('$$', kept)}) & exec sleep 60"))
    await bench.says("ready")
    if stop == "stop":
        process.stop(5000)
    else:
        end(process.pid)
    await within(4, process)
    assert b"tidied" in bench.log()
    assert not (bench.root / "work/p/segment").exists()


async def test_a_stop_without_time_gives_descendants_none(bench: Bench) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "1", "--setsid"))
    await bench.grandchildren(1)
    started = time.monotonic()
    process.kill()
    await within(3, process)
    assert time.monotonic() - started < 1.0


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("how", ["stop", "lost shim"])
async def test_shared_memory_and_temporary_files_of_a_pool_with_its_own_uid_end_with_it(bench: Bench, how: str) -> None:
    name = f"/dev/shm/pm-test-{os.getpid()}"
    script = f"touch {name} $TMPDIR/x; mkdir {name}.d; touch {name}.d/x; echo $TMPDIR; exec sleep 60"
    process = await bench.launch(sh(script))
    await bench.says("/tmp")
    await eventually(lambda: Path(f"{name}.d/x").exists())
    mine = Path(f"{name}-mine")
    mine.touch()
    try:
        process.stop(2000) if how == "stop" else end(process.shim_pid)
        await within(3, process)
        assert not Path(name).exists()
        assert not Path(f"{name}.d").exists()
        assert mine.exists()
        assert list((bench.root / "work/p").iterdir()) == []
    finally:
        mine.unlink()


async def test_orphans_that_end_on_their_own_are_collected_while_the_engine_runs(bench: Bench) -> None:
    process = await bench.launch(sh("(setsid sleep 0.05 & echo grandchild $!); exec sleep 60"))
    (orphan,) = await bench.grandchildren(1)
    await eventually(lambda: procfs.stat(orphan) is None)
    assert alive(process.pid)


async def test_a_spamming_engine_can_be_stopped_and_its_log_stays_small(bench: Bench) -> None:
    options = LaunchOptions(profile="dev", log_max_bytes=500_000, log_keep=1, log_bytes_per_second=2_000_000)
    process = await bench.launch(fake("--spam-mb-s", "200"), options=options)
    await eventually(lambda: bench.files.log_path(InstanceId("p")).with_suffix(".log.1").exists())
    process.stop(2000)
    record = await within(2, process)
    assert record.code == 0
    sizes = [path.stat().st_size for path in bench.root.glob("engine-p.log*")]
    assert len(sizes) == 2
    assert max(sizes) <= 500_000


async def test_a_suspended_shim_does_not_keep_the_engine_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pool_managerd.runtime.process._SHIM_OVERDUE_SECONDS", 0.2)
    process = await bench.launch(fake("--fork-grandchildren", "2", "--setsid"))
    grandchildren = await bench.grandchildren(2)
    end(process.identity.shim_pid, signal.SIGSTOP)
    process.kill()
    record = await within(3, process)
    assert (record.signal, record.stopped_by_us) == (signal.SIGKILL, True)
    assert not alive(process.pid)
    await eventually(lambda: not [pid for pid in grandchildren if alive(pid)])


@pytest.mark.parametrize(
    ("last", "code", "number"), [("exit 3", 3, None), ("kill -SEGV $$", None, signal.SIGSEGV), (":", None, None)]
)
async def test_how_an_engine_ended_under_a_suspended_shim_is_what_the_kernel_shows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, last: str, code: int | None, number: int | None
) -> None:
    monkeypatch.setattr("pool_managerd.runtime.process._SHIM_OVERDUE_SECONDS", 0.2)
    process = await bench.launch(sh(f"trap '{last}; exit' USR1; echo ready; while :; do sleep 0.02; done"))
    await bench.says("ready")
    end(process.identity.shim_pid, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGUSR1)
    record = await within(3, process)
    assert (record.code, record.signal, record.stopped_by_us) == (code, number, False), "a 0 may be what others are shown"


async def test_a_lost_shim_takes_the_engine_with_it_and_the_outcome_is_unknown(bench: Bench) -> None:
    process = await bench.launch(fake("--fork-grandchildren", "2", "--setsid"))
    grandchildren = await bench.grandchildren(2)
    end(process.identity.shim_pid)
    record = await within(3, process)
    assert not record.known
    assert not alive(process.pid)
    await eventually(lambda: not [pid for pid in grandchildren if alive(pid)])
    assert bench.files.records.all() == []


async def test_sigterm_to_the_shim_stops_the_engine_with_the_grace_of_the_order(bench: Bench) -> None:
    process = await bench.launch(fake("--ignore-term"), grace_ms=200)
    await bench.says("listens")
    started = time.monotonic()
    end(process.identity.shim_pid, signal.SIGTERM)
    record = await within(2, process)
    assert (record.signal, record.stopped_by_us) == (signal.SIGKILL, True)
    assert 0.2 <= time.monotonic() - started < 2.2


async def test_the_last_words_of_a_burst_are_in_the_log_though_the_engine_says_nothing_more(bench: Bench) -> None:
    process = await bench.launch(sh("head -c 30000000 /dev/zero | tr '\\0' '\\n'; echo waiting for a lock; exec sleep 60"))
    await bench.says("waiting for a lock")
    assert b"bytes of output were dropped here" in bench.log()
    process.kill()
    await within(5, process)


_SHARING = """
import multiprocessing, os, signal, sys, time
from multiprocessing.shared_memory import SharedMemory

def linger():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)

shared = SharedMemory(create=True, size=4096)
multiprocessing.get_context("fork").Process(target=linger).start()
print("shares", shared.name, flush=True)
os._exit(3)
"""


async def test_a_resource_tracker_is_the_last_to_be_killed_so_that_shared_memory_is_unlinked(bench: Bench) -> None:
    """It does that when all others have ended, and a worker of vLLM may take longer than the moment that is given."""
    other = LaunchOptions(UserRules(user="daemon")) if os.geteuid() == 0 else None  # with no uid of its own nothing is swept
    record = await bench.run(PreparedEngine("p", "/usr/bin/python3", ("-c", _SHARING)), options=other)
    name = bench.log().decode().split("shares ")[1].split()[0]
    assert record.code == 3 and not Path(f"/dev/shm/{name}").exists()
