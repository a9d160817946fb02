"""A node in this process on eight simulated GPUs, with a hundred engines and as many processes of others on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.fleet import COUNT, Settings
from bench.processes import all_pids
from bench.result import NotInstalledError
from bench.stub import free_ports, stamps
from pool_managerd.config import Config
from pool_managerd.errors import NodeError
from pool_managerd.node import PoolManager
from pool_managerd.supervision.gpu.watch import GpuWatch

GPUS, PROCESSES = 8, 20
_VRAM_MIB = 600


@dataclass(frozen=True, slots=True)
class GpuNode:
    """``watch`` looks at the GPUs when told to; by itself once a minute only."""

    node: PoolManager
    watch: GpuWatch
    worker_pid: int

    async def look(self) -> None:
        """One look, as the daemon makes it each ``gpu.rescan_interval_ms``."""
        scan = await self.watch.rescan(periodic=True)
        if scan.problem is not None or sum(len(d.processes) for d in scan.devices) != GPUS * PROCESSES:
            raise RuntimeError(f"the simulated GPUs were not seen as written: {scan.problem}")


@contextlib.asynccontextmanager
async def gpu_node(settings: Settings) -> AsyncIterator[GpuNode]:
    """Every pool is ready and its engine listed. Raises NotInstalledError without a C compiler."""
    engine, topology = settings.engine(), settings.directory / "gpus"
    _write(topology, [])
    try:
        node = PoolManager(_config(settings.directory, topology))
    except NodeError as error:
        raise NotInstalledError(error.message) from error
    with stamps(settings.directory / "gpus.pipe") as pipe:
        async with node:
            ports = free_ports(COUNT)
            names = [f"gpu-pool-{number:03}" for number in range(COUNT)]
            for name, port in zip(names, ports, strict=True):
                flags = ["--port", str(port), "--stamp", str(pipe.path), "--name", name]
                body = {"binary_path": str(engine), "flags": flags, "port": port, "slots_total": 1}
                await (await node.preload(name, node.parse_prepared(body, name))).wait()
            _write(topology, list(_processes(node)))
            watch = node._gpus.watch
            found = GpuNode(node, watch, watch._monitor.pid)  # type: ignore[attr-defined]  # the real one tells its worker
            await found.look()
            _require_owners(node)
            yield found


async def blocked_ms(node: GpuNode, looks: int) -> tuple[list[float], list[float]]:
    """How long the loop was kept from other work: the longest stretch during each look, and the same without a look.

    In processor time of the loop's thread, so that what else the machine does is not counted.
    """
    longest, idle = [], []
    for _ in range(looks):
        idle.append(await _longest_ms(asyncio.sleep(0.02)))
        longest.append(await _longest_ms(node.look()))
    return longest, idle


async def _longest_ms(work: object) -> float:
    """The longest time that a task which only gives way had to wait for its next turn, while ``work`` was done."""
    doing, longest = asyncio.ensure_future(work), 0  # type: ignore[call-overload]
    while not doing.done():
        began = time.thread_time_ns()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time_ns() - began)
    await doing
    return longest / 1e6


async def cpu_ms_per_look(node: GpuNode, looks: int) -> tuple[float, float]:
    """Processor time of one look: in this process, and in the worker."""
    clock = (~node.worker_pid << 3) | 2  # CLOCK_PROCESS_CPUTIME_ID of that process, see clock_getcpuclockid(3)
    ours, theirs = time.process_time_ns(), time.clock_gettime_ns(clock)
    for _ in range(looks):
        await node.look()
    return (time.process_time_ns() - ours) / looks / 1e6, (time.clock_gettime_ns(clock) - theirs) / looks / 1e6


def _config(directory: Path, topology: Path) -> Config:
    places = {"runtime_dir": directory / "gpus-run", "state_dir": directory / "gpus-state"}
    gpu = {"simulate": topology, "rescan_interval_ms": 60_000}
    quiet = {"interval_ms": 200, "probe_interval_ms": 60_000}
    return Config.model_validate({
        "profile": "dev", "daemon": places, "gpu": gpu, "health": quiet, "lifecycle": {"drain_deadline_ms": 500},
    })  # fmt: skip


def _write(topology: Path, processes: list[str]) -> None:
    """Two groups of four H100 on a switch each; replaced at once."""
    cards = [
        f'gpu {n} uuid=GPU-{os.getpid():08x}-0000-4000-8000-{n:012} name="NVIDIA H100 80GB HBM3" pci=0000:{0x11 + n:02x}:00.0'
        f" cc=9.0 vram=80GiB reserved=600MiB numa={n // 4} ecc=on temperature=41 power=70"
        for n in range(GPUS)
    ]
    links = [f"nvlink {n} switch" for n in range(GPUS)]
    scratch = topology.with_name("gpus.new")
    scratch.write_text("".join(f"{line}\n" for line in (*cards, *links, *processes)))
    scratch.replace(topology)


def _processes(node: PoolManager) -> Iterator[str]:
    """The engines where they were placed, and others beside them, so that each GPU lists as many as the next."""
    pids = {status["pool_id"]: status["pid"] for status in node.statuses()}
    others = [pid for pid in all_pids() if pid not in pids.values()]
    for row in node.devices()["devices"]:
        ours = [pids[held["pool_id"]] for held in row["reservations"]][:PROCESSES]
        for pid in [*ours, *others[: PROCESSES - len(ours)]]:
            yield f"process gpu={row['id']} pid={pid} vram={_VRAM_MIB}MiB"


def _require_owners(node: PoolManager) -> None:
    """What is measured must be the whole work: every engine's process recognised as its pool's."""
    known = sum(bool(held["pids"]) for row in node.devices()["devices"] for held in row["reservations"])
    if known != COUNT:
        raise RuntimeError(f"{known} of {COUNT} engines were recognised on the GPUs")
