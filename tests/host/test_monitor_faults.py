"""A driver that hangs, crashes, mismatches or loses GPUs: the scan says so, and the loop goes on."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.gpu.devices import DeviceIncident, DeviceScan
from pool_managerd.errors import NodeError
from pool_managerd.host.monitor import MonitorLimits, NvmlMonitor
from pool_managerd.host.simulation import simulated_environment
from pool_managerd.host.worker_process import Worker, WorkerOptions, Workers
from tests.conftest import REPOSITORY, wait_until
from tests.host.conftest import QUICK, Bench
from tests.host.simulated import A100, MIG, ONE_24, TWO_24_12, eight_80, topology
from tests.system.nodes import alive

Make = Callable[..., Bench]


async def scan_until(bench: Bench, wanted: Callable[[DeviceScan], bool], what: str) -> DeviceScan:
    deadline = time.monotonic() + 10
    while not wanted(scan := await bench.monitor.scan()):
        assert time.monotonic() < deadline, f"waited in vain for {what}: {scan}"
        await asyncio.sleep(0.01)
    return scan


def is_well(scan: DeviceScan) -> bool:
    return scan.problem is None and all(d.error is None for d in scan.devices)


async def test_a_lost_gpu_stays_listed_with_what_was_last_known_and_comes_back(make_bench: Make) -> None:
    bench = make_bench(TWO_24_12)
    whole = (await bench.monitor.scan()).devices
    bench.becomes(TWO_24_12, "fault gpu=1 error=15")
    scan = await bench.monitor.scan()
    unknown = {"temperature_c": None, "power_watts": None, "utilization_percent": None}
    assert scan.problem is None and scan.devices == (whole[0], replace(whole[1], error="GPU_IS_LOST (15)", **unknown))  # type: ignore[arg-type]
    assert not scan.devices[1].usable
    bench.becomes(TWO_24_12)
    assert (await bench.monitor.scan()).devices == whole


async def test_a_gpu_that_was_never_seen_well_is_listed_as_unknown(make_bench: Make) -> None:
    scan = await make_bench(TWO_24_12, "fault gpu=1 error=15").monitor.scan()
    assert (scan.devices[1].uuid, scan.devices[1].error) == ("GPU-unknown-1", "GPU_IS_LOST (15)")


async def test_the_mig_instances_of_a_lost_gpu_are_lost_with_it(make_bench: Make) -> None:
    bench = make_bench(MIG)
    before = (await bench.monitor.scan()).devices
    bench.becomes(MIG, "fault gpu=0 error=16")
    after = (await bench.monitor.scan()).devices
    assert [d.uuid for d in after] == [d.uuid for d in before]
    assert {d.error for d in after} == {"RESET_REQUIRED (16)"}


async def test_when_every_gpu_is_lost_a_fresh_worker_looks_again(make_bench: Make) -> None:
    bench = make_bench(A100)
    await bench.monitor.scan()
    first = bench.monitor.pid
    bench.becomes(A100, "fault gpu=0 error=15")
    for _ in range(2):
        scan = await bench.monitor.scan()
        assert scan.problem is None and scan.devices[0].error == "GPU_IS_LOST (15)"
    assert bench.monitor.pid != first
    bench.becomes(A100)
    await scan_until(bench, is_well, "the GPU's return")


@pytest.mark.parametrize(
    ("error", "code", "remedy"),
    [(18, "driver_mismatch", "reboot, or reload"), (9, "no_driver", "modprobe"), (999, "nvml_error", "nvidia-smi")],
)
async def test_a_driver_that_cannot_be_initialised_is_named_with_its_remedy_until_it_can(
    make_bench: Make, error: int, code: str, remedy: str
) -> None:
    bench = make_bench(ONE_24, f"fault init={error}")
    scan = await bench.monitor.scan()
    assert scan.problem is not None and scan.problem.code == code and remedy in scan.problem.hint
    assert scan.devices == () and not scan.no_gpus
    bench.becomes(ONE_24)
    assert len((await scan_until(bench, is_well, "the driver")).devices) == 1


async def test_a_mismatch_that_comes_while_running_keeps_the_last_known_devices(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    before = await bench.monitor.scan()
    bench.becomes(ONE_24, "fault scan=18", "fault init=18")
    scan = await bench.monitor.scan()
    assert scan.stale and scan.problem is not None and scan.problem.code == "driver_mismatch"
    assert (scan.devices, scan.taken_at) == (before.devices, before.taken_at)
    bench.becomes(ONE_24)
    assert (await scan_until(bench, is_well, "the driver")).devices == before.devices


@pytest.mark.parametrize("where", ["init", "scan"])
async def test_a_hanging_driver_costs_a_worker_and_never_the_loop(make_bench: Make, where: str) -> None:
    bench = make_bench(ONE_24, limits=replace(QUICK, first_s=1.0))
    if where == "scan":
        assert is_well(await scan_until(bench, is_well, "a first scan"))
    else:
        bench.becomes(ONE_24, "fault hang=init")
    if where == "scan":
        bench.becomes(ONE_24, "fault hang=scan")
    hung = asyncio.create_task(bench.monitor.scan())
    turns = 0
    while not hung.done():
        await asyncio.sleep(0.001)
        turns += 1
    scan = await hung
    assert scan.problem is not None and scan.problem.code == "nvml_hung" and "did not answer" in scan.problem.message
    assert len(scan.devices) == (1 if where == "scan" else 0)
    assert turns > 100, "the loop went on all the time"
    bench.becomes(ONE_24)
    assert len((await scan_until(bench, is_well, "a new worker")).devices) == 1


async def test_a_worker_that_hung_is_dead_and_collected(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    await bench.monitor.scan()
    pid = bench.monitor.pid
    assert pid is not None
    bench.becomes(ONE_24, "fault hang=scan")
    await bench.monitor.scan()
    await scan_until(bench, lambda _: not Path(f"/proc/{pid}").exists(), "its end")


@pytest.mark.parametrize("where", ["init", "scan"])
async def test_a_driver_that_aborts_takes_only_the_worker_with_it(make_bench: Make, where: str) -> None:
    bench = make_bench(ONE_24, f"fault abort={where}")
    scan = await bench.monitor.scan()
    assert scan.problem is not None and scan.problem.code == "nvml_crashed" and "Aborted" in scan.problem.message
    bench.becomes(ONE_24)
    await scan_until(bench, is_well, "a new worker")


async def test_a_worker_that_is_killed_is_replaced(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    await bench.monitor.scan()
    assert bench.monitor.pid is not None
    os.kill(bench.monitor.pid, signal.SIGKILL)  # our own child, which is not collected yet
    await scan_until(bench, is_well, "a new worker")


async def test_release_ends_the_worker_and_resume_takes_the_driver_up_again(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    before = await bench.monitor.scan()
    pid = bench.monitor.pid
    await bench.monitor.release()
    assert not Path(f"/proc/{pid}").exists() and bench.monitor.pid is None
    scan = await bench.monitor.scan()
    assert scan.problem is not None and scan.problem.code == "released" and scan.devices == before.devices
    await bench.monitor.resume()
    assert is_well(await bench.monitor.scan())


async def test_a_library_that_is_installed_later_is_found(tmp_path: Path, simulated_driver: Path) -> None:
    libraries = tmp_path / "lib"
    libraries.mkdir()
    env = simulated_environment(libraries, topology(tmp_path / "gpus", ONE_24))
    monitor = NvmlMonitor(on_incident=lambda _: None, workers=Workers(WorkerOptions({**env, "LD_LIBRARY_PATH": str(libraries)})))
    absent = await monitor.scan()
    shutil.copy(simulated_driver / "libnvidia-ml.so.1", libraries)
    present = await monitor.scan()
    await monitor.close()
    if absent.problem is None or absent.problem.code != "nvml_unavailable":
        pytest.skip("this machine has a driver library of its own")
    assert present.problem is None and len(present.devices) == 1


async def test_a_worker_that_is_just_being_started_is_ended_by_release_too(make_bench: Make) -> None:
    bench = make_bench(ONE_24)
    scanning = asyncio.create_task(bench.monitor.scan())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # its process is being made in a thread
    assert bench.monitor.pid is None
    await bench.monitor.release()
    problem = (await scanning).problem
    assert problem is not None and problem.code == "released" and bench.monitor.pid is None
    children = {int(p) for p in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    assert not [pid for pid in children if alive(pid) and b"nvml_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_an_error_of_the_listener_costs_no_worker(make_bench: Make) -> None:
    loop, errors = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    bench = make_bench(ONE_24)

    def fail(_incident: DeviceIncident) -> None:
        raise ZeroDivisionError

    bench.monitor = NvmlMonitor(on_incident=fail, workers=Workers(bench.options))
    await bench.monitor.scan()
    pid = bench.monitor.pid
    bench.becomes(ONE_24, "xid gpu=0 code=79 serial=1")
    await scan_until(bench, lambda _: bool(errors), "the listener's error")
    assert bench.monitor.pid == pid and isinstance(errors[0]["exception"], ZeroDivisionError)


async def test_release_does_not_wait_for_a_scan_that_hangs(make_bench: Make) -> None:
    bench = make_bench(ONE_24, "fault hang=scan", limits=replace(QUICK, first_s=30.0))
    hung = asyncio.create_task(bench.monitor.scan())
    async with asyncio.timeout(5):
        while bench.monitor.pid is None:
            await asyncio.sleep(0.005)
        await bench.monitor.release()
        scan = await hung
    assert scan.problem is not None and scan.problem.code == "released"


# --- what no simulated driver can do: processes that SIGKILL does not end, and nonsense ---


class Wedged(Worker):
    """A worker in the kernel's hands: it does not answer and does not die, until the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid, self.has_ended, self.kills = pid, False, 0

    async def scan(self, timeout_s: float) -> dict[str, Any]:
        await asyncio.sleep(0)
        raise TimeoutError

    def kill(self) -> None:
        self.kills += 1

    async def ended(self, timeout_s: float) -> bool:
        await asyncio.sleep(0)
        return self.has_ended


class WedgedWorkers(Workers):
    def __init__(self) -> None:
        self.made: list[Wedged] = []

    async def start(self, on_incident: Callable[[Mapping[str, Any]], None]) -> Wedged:
        self.made.append(Wedged(1_000_000 + len(self.made)))
        return self.made[-1]

    def close(self) -> None:
        pass


async def test_at_most_two_wedged_workers_are_left_behind() -> None:
    workers, now = WedgedWorkers(), [0.0]
    monitor = NvmlMonitor(on_incident=lambda _: None, workers=workers, clock=lambda: now[0])
    scan = await monitor.scan()
    for _ in range(20):
        now[0] += 100
        scan = await monitor.scan()
        await asyncio.sleep(0.001)
        assert scan.problem is not None and scan.problem.code == "nvml_hung"
    assert scan.problem is not None and len(workers.made) == 2 and all(w.kills == 1 for w in workers.made)
    assert "1000000, 1000001" in scan.problem.message and "reboot" in scan.problem.hint
    with pytest.raises(NodeError, match="1000000, 1000001 is stuck"):
        await monitor.release()
    problem = (await monitor.scan()).problem
    assert problem is not None and problem.code == "nvml_hung", "it was not released"
    workers.made[0].has_ended = True
    await monitor.scan()
    assert len(workers.made) == 3
    await monitor.close()


async def test_workers_that_fail_are_started_less_and_less_often() -> None:
    class Failing(WedgedWorkers):
        async def start(self, on_incident: Callable[[Mapping[str, Any]], None]) -> Wedged:
            raise OSError(11, "no process can be made")

    now, starts, workers = [0.0], 0, Failing()
    gaps: list[float] = []
    monitor = NvmlMonitor(on_incident=lambda _: None, workers=workers, clock=lambda: now[0], limits=MonitorLimits())
    last, starting = 0.0, workers.start

    async def counted(on_incident: Callable[[Mapping[str, Any]], None]) -> Wedged:
        nonlocal starts, last
        starts += 1
        gaps.append(now[0] - last)
        last = now[0]
        return await starting(on_incident)

    workers.start = counted  # type: ignore[method-assign]
    for _ in range(600):
        now[0] += 0.5
        await monitor.scan()
    scan = await monitor.scan()
    assert scan.problem is not None and "cannot be started" in scan.problem.message
    assert gaps[1:8] == [1, 2, 4, 8, 16, 32, 60]
    await monitor.close()


async def test_a_worker_that_speaks_nonsense_is_a_crash_and_no_exception() -> None:
    class Babbling(Wedged):
        answers: tuple[Any, ...] = ({"ok": True, "scan": {}}, {"ok": True, "scan": {"devices": [{"no": 1}]}}, {})

        async def scan(self, timeout_s: float) -> dict[str, Any]:
            return dict(self.answers[self.pid % 3])

    class Babblers(WedgedWorkers):
        async def start(self, on_incident: Callable[[Mapping[str, Any]], None]) -> Wedged:
            self.made.append(Babbling(len(self.made)))
            self.made[-1].has_ended = False
            return self.made[-1]

    now, workers = [0.0], Babblers()
    monitor = NvmlMonitor(
        on_incident=lambda _: None, workers=workers, clock=lambda: now[0], limits=replace(MonitorLimits(), most_wedged=99)
    )
    for _ in range(3):
        now[0] += 100
        scan = await monitor.scan()
        assert scan.problem is not None and scan.problem.code == "nvml_crashed"
        await asyncio.sleep(0.001)
    assert len(workers.made) == 3
    await monitor.close()


# --- the daemon's own end ---


async def test_a_driver_that_needs_seconds_for_each_answer_is_called_hung_once_and_then_waited_for() -> None:
    now, takes_s = [0.0], 1.0

    class Slow(Wedged):
        async def scan(self, timeout_s: float) -> dict[str, Any]:
            now[0] += min(takes_s, timeout_s)
            if timeout_s < takes_s:
                raise TimeoutError
            return {"ok": True, "scan": {"devices": [], "driver_version": None, "cuda_version": None}}

        async def ended(self, timeout_s: float) -> bool:
            return True

    class SlowWorkers(WedgedWorkers):
        async def start(self, on_incident: Callable[[Mapping[str, Any]], None]) -> Wedged:
            self.made.append(Slow(1_000_000 + len(self.made)))
            return self.made[-1]

    workers = SlowWorkers()
    limits = MonitorLimits(first_s=5.0, later_s=2.0, backoff_s=0.0)
    monitor = NvmlMonitor(on_incident=lambda _: None, workers=workers, clock=lambda: now[0], limits=limits)
    assert (await monitor.scan()).problem is None
    takes_s = 4.5  # an instance was made on each of eight GPUs
    problems = [(await monitor.scan()).problem for _ in range(300)]
    await monitor.close()
    assert sum(problem is not None for problem in problems) == 1 and len(workers.made) == 2


@pytest.mark.parametrize("fault", ["", "fault hang=scan"])
def test_the_worker_ends_with_the_daemon_even_inside_a_hanging_driver(tmp_path: Path, simulated_driver: Path, fault: str) -> None:
    file = topology(tmp_path / "gpus", ONE_24, *filter(None, [fault]))
    program = textwrap.dedent("""
        import asyncio, sys, json
        from pool_managerd.host.monitor import NvmlMonitor
        from pool_managerd.host.worker_process import WorkerOptions, Workers
        async def main():
            monitor = NvmlMonitor(on_incident=print, workers=Workers(WorkerOptions(json.loads(sys.argv[1]))))
            task = asyncio.create_task(monitor.scan())
            while monitor.pid is None:
                await asyncio.sleep(0.005)
            print(monitor.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    env = json.dumps(simulated_environment(simulated_driver, file))
    daemon = subprocess.Popen(
        [sys.executable, "-c", program, env], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    )
    assert daemon.stdout is not None
    worker = int(daemon.stdout.readline())
    assert alive(worker)
    daemon.kill()
    daemon.wait(10)
    daemon.stdout.close()
    wait_until(lambda: not alive(worker), "the worker's end", 5)


async def test_eight_gpus_and_their_faults_go_together(make_bench: Make) -> None:
    bench = make_bench(eight_80(), "fault gpu=2 error=15", "usage gpu=5 vram=10GiB")
    devices = (await bench.monitor.scan()).devices
    assert [d.error is None for d in devices] == [True, True, False, True, True, True, True, True]
