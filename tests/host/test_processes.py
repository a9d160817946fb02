"""Who holds GPU memory: foreign processes, engines by their environment, the dead, and other pid namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pool_managerd.core.gpu.devices import DeviceProcess
from pool_managerd.host.processes import NONCE_VARIABLE, Processes
from pool_managerd.host.simulation import simulated_environment
from pool_managerd.runtime import procfs
from tests.conftest import REPOSITORY, wait_until
from tests.host.conftest import Bench
from tests.host.simulated import MIG, MIG_UUIDS, ONE_24, TWO_24_12, gpu_uuid, topology

Make = Callable[..., Bench]
GIB, MIB = 1 << 30, 1 << 20
UUID, OTHER = gpu_uuid(0), gpu_uuid(1)
START = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def sleeper() -> Iterator[START]:
    """Long sleeps with an environment, ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*wrapper: str, **env: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*wrapper, "sleep", "60"], env={"PATH": os.environ["PATH"], **env})
        started.append(process)
        wait_until(lambda: b"sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes(), "the exec")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(10)


async def test_a_foreign_process_is_listed_with_its_name_and_memory(make_bench: Make) -> None:
    bench = make_bench(ONE_24, f"process gpu=0 pid={os.getpid()} vram=2GiB", "process gpu=0 pid=1 vram=64MiB kind=graphics")
    device = (await bench.monitor.scan()).devices[0]
    mine, first = device.processes
    assert (mine.pid, mine.vram_bytes, mine.kind, mine.certain) == (os.getpid(), 2 * GIB, "compute", True)
    assert mine.name == Path("/proc/self/comm").read_text().strip()
    assert mine.start_ticks == procfs.start_ticks(os.getpid()) and mine.nonce is None
    assert os.getppid() in (*mine.ancestors, 1), "the ancestors end below pid 1"
    assert (first.pid, first.vram_bytes, first.kind) == (1, 64 * MIB, "graphics")
    assert device.vram_used_bytes == 2 * GIB + 64 * MIB


async def test_memory_that_was_not_released_is_listed_under_the_dead_pid(make_bench: Make) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    device = (await make_bench(ONE_24, f"process gpu=0 pid={gone.pid} vram=5GiB").monitor.scan()).devices[0]
    assert device.processes == (DeviceProcess(gone.pid, None, 5 * GIB, certain=True, ended=True),)
    assert device.vram_free_bytes == 19 * GIB - 400 * MIB


async def test_memory_that_the_driver_does_not_tell_is_none(make_bench: Make) -> None:
    device = (await make_bench(ONE_24, "process gpu=0 pid=1 vram=unknown").monitor.scan()).devices[0]
    assert device.processes[0].vram_bytes is None and device.vram_used_bytes == 0


async def test_a_program_that_computes_and_draws_is_listed_once(make_bench: Make) -> None:
    lines = [f"process gpu=0 pid=1 vram=1GiB kind={kind}" for kind in ("compute", "graphics")]
    assert [p.kind for p in (await make_bench(ONE_24, *lines).monitor.scan()).devices[0].processes] == ["compute"]


async def test_an_engine_counts_on_the_gpus_that_its_environment_names_and_its_nonce_is_read(
    make_bench: Make, sleeper: START
) -> None:
    bench = make_bench(TWO_24_12, "engines vram=3GiB")
    both = sleeper(CUDA_VISIBLE_DEVICES=f"{UUID},{OTHER}", POOL_MANAGERD_NONCE="ab" * 16)
    first = sleeper(CUDA_VISIBLE_DEVICES=UUID)
    sleeper(CUDA_VISIBLE_DEVICES=""), sleeper(CUDA_VISIBLE_DEVICES="GPU-ffff"), sleeper()
    zero, one = (await bench.monitor.scan()).devices
    assert {p.pid for p in zero.processes} == {both.pid, first.pid}
    assert {p.pid for p in one.processes} == {both.pid}
    listed = next(p for p in zero.processes if p.pid == both.pid)
    assert (listed.nonce, listed.name, listed.vram_bytes, listed.ancestors[0]) == ("ab" * 16, "sleep", 3 * GIB, os.getpid())
    assert zero.vram_used_bytes == 6 * GIB
    both.kill()
    both.wait()
    zero, one = (await bench.monitor.scan()).devices
    assert {p.pid for p in zero.processes} == {first.pid} and zero.vram_used_bytes == 3 * GIB


async def test_an_engines_mask_may_hold_an_index_or_the_beginning_of_a_uuid(make_bench: Make, sleeper: START) -> None:
    lines = [f"gpu {number} vram=1GiB" for number in range(38)]  # index 37: nobody else's process names that one
    bench = make_bench(ONE_24, *lines[1:], "engines vram=1KiB")
    by_index, by_beginning = sleeper(CUDA_VISIBLE_DEVICES="37"), sleeper(CUDA_VISIBLE_DEVICES=UUID[:12])
    devices = (await bench.monitor.scan()).devices
    assert [d.id for d in devices if by_index.pid in {p.pid for p in d.processes}] == [37]
    assert [d.id for d in devices if by_beginning.pid in {p.pid for p in d.processes}] == [0]


async def test_an_engine_holds_what_it_has_in_ram_when_told_so(make_bench: Make, sleeper: START) -> None:
    engine = sleeper(CUDA_VISIBLE_DEVICES=UUID)
    (process,) = (await make_bench(ONE_24, "engines vram=rss").monitor.scan()).devices[0].processes
    pages = int(Path(f"/proc/{engine.pid}/statm").read_text().split()[1])
    assert process.vram_bytes == pages * os.sysconf("SC_PAGESIZE") > 0


async def test_an_engine_of_a_mig_instance_counts_there_and_on_no_other(make_bench: Make, sleeper: START) -> None:
    bench = make_bench(MIG, "engines vram=1GiB")
    engine = sleeper(CUDA_VISIBLE_DEVICES=MIG_UUIDS[1])
    parent, first, second = (await bench.monitor.scan()).devices
    assert [p.pid for p in second.processes] == [engine.pid] and first.processes == parent.processes == ()
    assert (second.vram_free_bytes, first.vram_free_bytes) == (19 * GIB, 10 * GIB)
    assert parent.vram_used_bytes == GIB


@pytest.mark.root
async def test_engines_of_another_user_are_seen_by_root(make_bench: Make, sleeper: START) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can change users")
    engine = sleeper("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CUDA_VISIBLE_DEVICES=UUID)
    (process,) = (await make_bench(ONE_24, "engines vram=1GiB").monitor.scan()).devices[0].processes
    assert process.pid == engine.pid and process.certain


async def test_pids_of_an_outer_namespace_that_cannot_be_mapped_are_not_certain(make_bench: Make) -> None:
    bench = make_bench(ONE_24, "process gpu=0 pid=1 vram=2GiB", "pids namespace=outer")
    (process,) = (await bench.monitor.scan()).devices[0].processes
    assert process == DeviceProcess(1, None, 2 * GIB, certain=False)  # nothing of our own pid 1 is claimed


def test_the_nonce_is_looked_for_where_engines_carry_it() -> None:
    assert procfs.NONCE_VARIABLE.encode() + b"=" == NONCE_VARIABLE


@pytest.mark.parametrize(
    ("version", "ours"), [("535.113.01", True), ("570.86.15", True), ("545.23", True), ("535.104.05", False), ("", False)]
)
def test_a_driver_since_535_113_tells_pids_as_a_container_counts_them(version: str, ours: bool, tmp_path: Path) -> None:
    """In a nested pid namespace with its own /proc, as in any container."""
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").touch()  # an inode that is not the initial namespace's
    (tmp_path / "self/status").write_text("NSpid:\t7\n")
    (tmp_path / "7").mkdir()
    (tmp_path / "7/stat").write_text("7 (x) S 1 " + " ".join("0" * 17) + " 99 0\n".replace("\\n", ""))
    assert Processes(proc=tmp_path, version=version).describe(7)["certain"] is ours


async def test_a_listed_process_with_no_bytes_is_one_whose_memory_is_not_told(make_bench: Make) -> None:
    device = (await make_bench(ONE_24, "process gpu=0 pid=1 vram=0B").monitor.scan()).devices[0]
    assert device.processes[0].vram_bytes is None


def test_in_the_initial_pid_namespace_a_real_drivers_pids_are_ours() -> None:
    if Path("/proc/self/ns/pid").stat().st_ino != 0xEFFFFFFC:
        pytest.skip("this machine's tests run in a nested pid namespace")
    assert Processes().describe(os.getpid())["certain"] is True


_INSIDE = """
import asyncio, json, os, subprocess, sys
from pool_managerd.host.monitor import NvmlMonitor
from pool_managerd.host.worker_process import WorkerOptions, Workers

async def main():
    engine = subprocess.Popen(["sleep", "60"], env={"CUDA_VISIBLE_DEVICES": sys.argv[3], "POOL_MANAGERD_NONCE": "cd"})
    monitor = NvmlMonitor(on_incident=print, workers=Workers(WorkerOptions(json.loads(sys.argv[1]))))
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        scan = await monitor.scan()
        found = [p for d in scan.devices for p in d.processes]
        if [p for p in found if p.pid == engine.pid] or asyncio.get_running_loop().time() > deadline:
            break
    print(json.dumps({"mine": [p.certain for p in found if p.pid == engine.pid], "nonce": [p.nonce for p in found if p.certain],
                      "parents": [p.ancestors for p in found if p.certain], "me": os.getpid(), "problem": str(scan.problem),
                      "others": [p.certain for p in found if p.pid == int(sys.argv[2])]}))
    await monitor.close()
    engine.kill()
    engine.wait()

asyncio.run(main())
"""


@pytest.mark.root
@pytest.mark.parametrize("own_proc", [False, True])
def test_in_a_nested_namespace_pids_are_mapped_where_proc_is_the_outer_one_and_doubted_elsewhere(
    tmp_path: Path, simulated_driver: Path, sleeper: START, own_proc: bool
) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can make a pid namespace")
    outside = sleeper(CUDA_VISIBLE_DEVICES=UUID)
    file = topology(tmp_path / "gpus", ONE_24, "engines vram=1GiB", "pids namespace=outer",
                    f"process gpu=0 pid={outside.pid} vram=1GiB")  # fmt: skip
    options = ["--mount-proc"] if own_proc else []
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", *options, sys.executable, "-c", _INSIDE,
         json.dumps(simulated_environment(simulated_driver, file)), str(outside.pid), UUID],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}, capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    if b"cannot change root filesystem propagation" in done.stderr:
        pytest.skip("in a chroot no /proc can be mounted for a namespace")
    assert done.returncode == 0, done.stderr.decode()
    told = json.loads(done.stdout)
    assert told["others"] and not any(told["others"])
    if own_proc:  # our own numbers, but who could know that the driver means them
        assert told["mine"] == [False] and told["nonce"] == []
    else:
        assert told["mine"] == [True] and told["nonce"] == ["cd"] and told["parents"] == [[told["me"]]]
