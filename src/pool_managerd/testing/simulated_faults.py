"""The faults of a simulated run, each as one function: what it does to machine, disk or daemon, and what ends it."""

from __future__ import annotations

from collections.abc import Callable

from pool_managerd.core.gpu.devices import ScanProblem
from pool_managerd.testing.daemons import Daemons
from pool_managerd.testing.scenario import Action
from pool_managerd.testing.scene import Scene

Fault = Callable[[Scene, Action, str], None]
CODES = (1, 2, 7, 101, 127, 134, 139)
SIGNALS = (4, 6, 9, 11, 15)
LONG_S = 600.0


def strike(scene: Scene, daemons: Daemons, action: Action, pool_id: str) -> None:
    """Let it happen, to ``pool_id`` where it is about a pool."""
    down_s = 0.05 + 60 * action.share**4
    match action.kind:
        case "kill":  # now, or within what happens next
            daemons.kill(callbacks=action.number % 40 if action.number % 3 else 0, down_s=down_s)
        case "shut_down":
            daemons.shut_down(down_s)
        case "pause":
            daemons.pause(200.0 * action.share**3)
        case _:
            FAULTS[action.kind](scene, action, pool_id)


def _end_engine(scene: Scene, pool_id: str, code: int | None, signal: int | None) -> None:
    for engine in scene.machine.running(pool_id):
        scene.machine.end(engine, code, signal)


def exit_(scene: Scene, action: Action, pool_id: str) -> None:
    _end_engine(scene, pool_id, CODES[action.number % len(CODES)], None)


def signal(scene: Scene, action: Action, pool_id: str) -> None:
    _end_engine(scene, pool_id, None, SIGNALS[action.number % len(SIGNALS)])


def exit_0(scene: Scene, action: Action, pool_id: str) -> None:
    _end_engine(scene, pool_id, 0, None)


def hang(scene: Scene, action: Action, pool_id: str) -> None:
    for engine in scene.machine.running(pool_id):
        engine.hung = True
        scene.timeline.after(action.share * LONG_S, lambda engine=engine: setattr(engine, "hung", False))


def busy(scene: Scene, action: Action, pool_id: str) -> None:
    for engine in scene.machine.running(pool_id):
        engine.busy = True
        scene.timeline.after(action.share * LONG_S, lambda engine=engine: setattr(engine, "busy", False))


def crash_loop(scene: Scene, action: Action, pool_id: str) -> None:
    trouble = scene.machine.troubles(pool_id)
    trouble.crashes, trouble.crash_s = 1 + action.number % 12, 20.0 * action.share**3
    _end_engine(scene, pool_id, 1, None)


def slow_load(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "load_s", 40.0 * action.share, action)


def never_ready(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.troubles(pool_id).never_ready = 1 + action.number % 2


def port_taken(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.troubles(pool_id).port_taken = 1 + action.number % 4


def spawns_fail(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.troubles(pool_id).spawns_fail = 1 + action.number % 7


def stagings_fail(scene: Scene, action: Action, pool_id: str) -> None:
    trouble = scene.machine.troubles(pool_id)
    trouble.stagings_fail, trouble.staging_retriable = 1 + action.number % 3, True


def model_missing(scene: Scene, action: Action, pool_id: str) -> None:
    trouble = scene.machine.troubles(pool_id)
    trouble.stagings_fail, trouble.staging_retriable = 1, False


def slow_staging(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "staging_s", 700.0 * action.share**4, action)


def lose_shim(scene: Scene, action: Action, pool_id: str) -> None:
    for engine in scene.machine.running(pool_id):
        scene.machine.lose_shim(engine)


def vram_late(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "vram_late_s", 9.0 * action.share, action)


def vram_held(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "vram_late_s", 120.0 * action.share, action)


def ignores_term(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "ignores_term", True, action)


def unkillable(scene: Scene, action: Action, pool_id: str) -> None:
    _for_a_while(scene, pool_id, "unkillable_s", 40.0 * action.share, action)


def _for_a_while(scene: Scene, pool_id: str, name: str, value: object, action: Action) -> None:
    trouble = scene.machine.troubles(pool_id)
    setattr(trouble, name, value)
    scene.timeline.after(LONG_S * (0.1 + action.share), setattr, trouble, name, type(value)())


def gpu_error(scene: Scene, action: Action, pool_id: str) -> None:
    if scene.machine.gpus:
        gpu = scene.machine.gpus[action.number % len(scene.machine.gpus)]
        gpu.error = "GPU is lost"
        scene.timeline.after(LONG_S * action.share, setattr, gpu, "error", None)


def gpu_missing(scene: Scene, action: Action, pool_id: str) -> None:
    if scene.machine.gpus:
        gpu = scene.machine.gpus[action.number % len(scene.machine.gpus)]
        gpu.missing = True
        scene.timeline.after(LONG_S * action.share, setattr, gpu, "missing", False)


def scan_problem(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.scan_problem = ScanProblem("nvml_hung", "the driver does not answer")
    scene.timeline.after(LONG_S * action.share, setattr, scene.machine, "scan_problem", None)


def slow_scan(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.slow_scan_s = 20.0 * action.share
    scene.timeline.after(LONG_S * action.share, setattr, scene.machine, "slow_scan_s", 0.0)


def pid_unwritable(scene: Scene, action: Action, pool_id: str) -> None:
    scene.machine.troubles(pool_id).pid_unwritable = 1


def probes_fail(scene: Scene, action: Action, pool_id: str) -> None:
    if scene.adapters is not None:
        scene.adapters.prober.fails = 1 + action.number % 40


def disk_full(scene: Scene, action: Action, pool_id: str) -> None:
    scene.disk.fails = True
    scene.disk_failed_at = scene.timeline.now
    scene.timeline.after(60.0 * action.share**2, scene.mend_disk)


FAULTS: dict[str, Fault] = {
    "exit": exit_, "signal": signal, "exit_0": exit_0, "hang": hang, "busy": busy, "crash_loop": crash_loop,
    "slow_load": slow_load,
    "never_ready": never_ready, "port_taken": port_taken, "spawns_fail": spawns_fail, "stagings_fail": stagings_fail,
    "model_missing": model_missing, "slow_staging": slow_staging, "lose_shim": lose_shim, "vram_late": vram_late,
    "vram_held": vram_held, "ignores_term": ignores_term, "unkillable": unkillable, "gpu_error": gpu_error,
    "gpu_missing": gpu_missing, "scan_problem": scan_problem, "slow_scan": slow_scan, "pid_unwritable": pid_unwritable,
    "probes_fail": probes_fail, "disk_full": disk_full,
}  # fmt: skip
