"""The faults of a simulated run, each as one function: what it does to machine, disk or daemon, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pool_managerd.core.gpu.devices import ScanProblem
from pool_managerd.testing.scenario import Action

if TYPE_CHECKING:
    from pool_managerd.testing.world import World

Fault = Callable[["World", Action, str], None]
CODES = (1, 2, 7, 101, 127, 134, 139)
SIGNALS = (4, 6, 9, 11, 15)
LONG_S = 600.0


def strike(world: World, action: Action, pool_id: str) -> None:
    """Let it happen, to ``pool_id`` where it is about a pool."""
    FAULTS[action.kind](world, action, pool_id)


def _end_engine(world: World, pool_id: str, code: int | None, signal: int | None) -> None:
    for engine in world.machine.running(pool_id):
        world.machine.end(engine, code, signal)


def exit_(world: World, action: Action, pool_id: str) -> None:
    _end_engine(world, pool_id, CODES[action.number % len(CODES)], None)


def signal(world: World, action: Action, pool_id: str) -> None:
    _end_engine(world, pool_id, None, SIGNALS[action.number % len(SIGNALS)])


def exit_0(world: World, action: Action, pool_id: str) -> None:
    _end_engine(world, pool_id, 0, None)


def hang(world: World, action: Action, pool_id: str) -> None:
    for engine in world.machine.running(pool_id):
        engine.hung = True
        world.timeline.after(action.share * LONG_S, lambda engine=engine: setattr(engine, "hung", False))


def busy(world: World, action: Action, pool_id: str) -> None:
    for engine in world.machine.running(pool_id):
        engine.busy = True
        world.timeline.after(action.share * LONG_S, lambda engine=engine: setattr(engine, "busy", False))


def crash_loop(world: World, action: Action, pool_id: str) -> None:
    trouble = world.machine.troubles(pool_id)
    trouble.crashes, trouble.crash_s = 1 + action.number % 12, 20.0 * action.share**3
    _end_engine(world, pool_id, 1, None)


def slow_load(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "load_s", 40.0 * action.share, action)


def never_ready(world: World, action: Action, pool_id: str) -> None:
    world.machine.troubles(pool_id).never_ready = 1 + action.number % 2


def port_taken(world: World, action: Action, pool_id: str) -> None:
    world.machine.troubles(pool_id).port_taken = 1 + action.number % 4


def spawns_fail(world: World, action: Action, pool_id: str) -> None:
    world.machine.troubles(pool_id).spawns_fail = 1 + action.number % 7


def stagings_fail(world: World, action: Action, pool_id: str) -> None:
    trouble = world.machine.troubles(pool_id)
    trouble.stagings_fail, trouble.staging_retriable = 1 + action.number % 3, True


def model_missing(world: World, action: Action, pool_id: str) -> None:
    trouble = world.machine.troubles(pool_id)
    trouble.stagings_fail, trouble.staging_retriable = 1, False


def slow_staging(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "staging_s", 700.0 * action.share**4, action)


def lose_shim(world: World, action: Action, pool_id: str) -> None:
    for engine in world.machine.running(pool_id):
        world.machine.lose_shim(engine)


def vram_late(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "vram_late_s", 9.0 * action.share, action)


def vram_held(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "vram_late_s", 120.0 * action.share, action)


def ignores_term(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "ignores_term", True, action)


def unkillable(world: World, action: Action, pool_id: str) -> None:
    _for_a_while(world, pool_id, "unkillable_s", 40.0 * action.share, action)


def _for_a_while(world: World, pool_id: str, name: str, value: object, action: Action) -> None:
    trouble = world.machine.troubles(pool_id)
    setattr(trouble, name, value)
    world.timeline.after(LONG_S * (0.1 + action.share), setattr, trouble, name, type(value)())


def gpu_error(world: World, action: Action, pool_id: str) -> None:
    if world.machine.gpus:
        gpu = world.machine.gpus[action.number % len(world.machine.gpus)]
        gpu.error = "GPU is lost"
        world.timeline.after(LONG_S * action.share, setattr, gpu, "error", None)


def gpu_missing(world: World, action: Action, pool_id: str) -> None:
    if world.machine.gpus:
        gpu = world.machine.gpus[action.number % len(world.machine.gpus)]
        gpu.missing = True
        world.timeline.after(LONG_S * action.share, setattr, gpu, "missing", False)


def scan_problem(world: World, action: Action, pool_id: str) -> None:
    world.machine.scan_problem = ScanProblem("nvml_hung", "the driver does not answer")
    world.timeline.after(LONG_S * action.share, setattr, world.machine, "scan_problem", None)


def slow_scan(world: World, action: Action, pool_id: str) -> None:
    if world.adapters is not None:
        world.adapters.monitor.slow_s = 20.0 * action.share
        world.timeline.after(LONG_S * action.share, setattr, world.adapters.monitor, "slow_s", 0.0)


def pid_unwritable(world: World, action: Action, pool_id: str) -> None:
    world.machine.troubles(pool_id).pid_unwritable = 1


def probes_fail(world: World, action: Action, pool_id: str) -> None:
    if world.adapters is not None:
        world.adapters.prober.fails = 1 + action.number % 40


def disk_full(world: World, action: Action, pool_id: str) -> None:
    world.disk.fails = True
    world.oracle.disk_failed_at = world.timeline.now
    world.timeline.after(60.0 * action.share**2, world.mend_disk)


def pause(world: World, action: Action, pool_id: str) -> None:
    world.pause(200.0 * action.share**3)


def kill(world: World, action: Action, pool_id: str) -> None:
    """Now, or within what happens next."""
    world.kill_daemon(callbacks=action.number % 40 if action.number % 3 else 0, down_s=0.05 + 60 * action.share**4)


def shut_down(world: World, action: Action, pool_id: str) -> None:
    world.shut_down(down_s=0.05 + 60 * action.share**4)


FAULTS: dict[str, Fault] = {
    "exit": exit_, "signal": signal, "exit_0": exit_0, "hang": hang, "busy": busy, "crash_loop": crash_loop,
    "slow_load": slow_load,
    "never_ready": never_ready, "port_taken": port_taken, "spawns_fail": spawns_fail, "stagings_fail": stagings_fail,
    "model_missing": model_missing, "slow_staging": slow_staging, "lose_shim": lose_shim, "vram_late": vram_late,
    "vram_held": vram_held, "ignores_term": ignores_term, "unkillable": unkillable, "gpu_error": gpu_error,
    "gpu_missing": gpu_missing, "scan_problem": scan_problem, "slow_scan": slow_scan, "pid_unwritable": pid_unwritable,
    "probes_fail": probes_fail, "disk_full": disk_full, "pause": pause, "kill": kill, "shut_down": shut_down,
}  # fmt: skip
