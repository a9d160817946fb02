"""What is to be found about the GPUs, their driver, and what stands around them."""

from __future__ import annotations

from collections.abc import Iterator

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.xid import RESET_STEPS
from pool_managerd.core.preflight.facts import HostFacts, PoolWants, Wants
from pool_managerd.core.preflight.findings import FAIL, GPU_REQUIRED, NO_CUDA, OK, WARN, Finding
from pool_managerd.core.preflight.tools import install, install_driver
from pool_managerd.errors import PoolError

_DEV = "profile: dev"
_PROBLEM_REMEDIES: dict[str, tuple[str, ...]] = {
    "no_driver": ("sudo modprobe nvidia", "sudo dmesg | grep -i nvrm"),
    "driver_mismatch": (
        "cat /proc/driver/nvidia/version",
        "sudo rmmod nvidia_drm nvidia_modeset nvidia_uvm nvidia",
        "sudo reboot",
    ),
    "nvml_hung": ("sudo dmesg | grep -i xid", "sudo reboot"),
    "nvml_crashed": ("sudo dmesg | grep -i nvrm", "nvidia-smi -q"),
    "nvml_error": ("nvidia-smi -q",),
    "released": ("pool-managerd devices resume",),
    "not_scanned": ("pool-managerd devices",),
}
_NO_FAULT = frozenset({"released", "not_scanned"})
SWITCHES = "nvidia-nvswitchctl"


def gpu_findings(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    yield from _enforcement(facts, wants)
    yield from _scan(facts, wants)
    for pool in wants.local_pools:
        yield from _pool(pool, facts)
    for device in facts.scan.devices:
        yield from _device(device, facts)
    if facts.gpus and not wants.simulated:
        yield from _around(facts)


def _enforcement(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    """GPU-only (ORCH-1102): nothing here tries the CPU, and nothing in the configuration but the profile changes that."""
    found = facts.cuda_tool
    if found is not None:
        yield Finding("cuda", OK, found, f"{found} is at {facts.tools[found]}")
    elif wants.gpu_only:
        yield Finding(GPU_REQUIRED, FAIL, "CUDA", NO_CUDA, (install_driver(facts), install("nvcc", facts), _DEV))
    if wants.gpu_only and found is not None and facts.scan.problem is None and not facts.scan.devices:
        message = "GPU-only enforcement: the driver lists no GPU, so no engine is started on this machine"
        yield Finding(GPU_REQUIRED, FAIL, "GPU", message, ("nvidia-smi -L", "lspci | grep -i nvidia", _DEV))
    if not wants.gpu_only and facts.scan.no_gpus:
        yield Finding("no_gpu", OK, "GPU", "there is no GPU here: profile dev runs engines on the CPU")


def _scan(facts: HostFacts, wants: Wants) -> Iterator[Finding]:
    problem = facts.scan.problem
    if problem is not None:
        if problem.code == "nvml_unavailable" and not wants.gpu_only:
            return
        level = WARN if problem.code in _NO_FAULT else FAIL  # profile dev runs without GPUs, not beside ones that cannot be seen
        remedy = _PROBLEM_REMEDIES.get(problem.code, (f"# {problem.hint}",) if problem.hint else ())
        if problem.code == "nvml_unavailable":
            remedy = (install_driver(facts), _DEV)
        yield Finding(problem.code, level, "NVML", problem.message, remedy)
    elif facts.scan.devices:
        names = ", ".join(f"{device.label} ({device.name or device.uuid})" for device in facts.scan.devices)
        versions = f"; driver {facts.scan.driver_version}, CUDA {facts.scan.cuda_version}" if facts.scan.driver_version else ""
        simulated = "simulated: " if wants.simulated else ""
        subject = f"{len(facts.gpus)} GPU" + ("s" if len(facts.gpus) > 1 else "")
        yield Finding("gpus", OK, subject, f"{simulated}{names}{versions}")


def _pool(pool: PoolWants, facts: HostFacts) -> Iterator[Finding]:
    subject = f"pool {pool.pool_id}"
    devices: tuple[DeviceSnapshot, ...] = tuple(device for device in facts.scan.devices if device.usable)
    known = not facts.scan.stale and (bool(devices) or pool.mask is not None)
    if not known:
        return
    if pool.mask is not None:
        try:
            devices = pool.mask.resolve(facts.scan.devices)
        except PoolError as error:
            yield Finding("device_mask", FAIL, subject, error.message, ("nvidia-smi -L", f"devices: []  # pool {pool.pool_id}"))
            return
    driver = facts.scan.cuda_version
    if pool.engine_cuda and driver and _version(driver) and _version(driver) < _version(pool.engine_cuda):
        message = f"cannot run an engine built for CUDA {pool.engine_cuda}: the driver {facts.scan.driver_version} takes {driver}"
        yield Finding("driver_too_old", FAIL, subject, message, (install_driver(facts), "nvidia-smi"))
    for device in devices:
        has = device.compute_capability
        if pool.engine_capabilities and has and not _runs_on(pool.engine_capabilities, has):
            built = ", ".join(pool.engine_capabilities)
            message = f"cannot run the engine on GPU {device.label}: it has compute capability {has}, the build is for {built}"
            flag = f"-DCMAKE_CUDA_ARCHITECTURES={has.replace('.', '')}"
            remedy = f'provisioning: {{source: {{build: {{cmake_flags: ["{flag}"]}}}}}}'
            yield Finding("compute_capability", FAIL, subject, message, (remedy,))


def _device(device: DeviceSnapshot, facts: HostFacts) -> Iterator[Finding]:
    name = f"GPU {device.label}"
    if not device.readable:
        why = device.error or device.unreadable
        yield Finding("gpu_unreadable", WARN, name, f"cannot read {name}: {why}", ("sudo dmesg | grep -i nvrm",))
    if device.reset_pending:
        steps = tuple(step.format(uuid=device.parent_uuid or device.uuid) for step in RESET_STEPS)
        yield Finding("gpu_reset_pending", WARN, name, f"{name} has repaired memory that waits for a reset", steps)
    if device.mig_enabled and not any(other.parent_uuid == device.uuid for other in facts.scan.devices):
        ways = (f"sudo nvidia-smi mig -i {device.id} -cgi 0 -C", f"sudo nvidia-smi -i {device.id} -mig 0")
        yield Finding("mig_empty", WARN, name, f"{name} is in MIG mode and has no instances: nothing can use it", ways)


def _around(facts: HostFacts) -> Iterator[Finding]:
    """What the driver needs beside itself. Engines run with no_new_privs: they cannot make what is missing."""
    off = [device for device in facts.gpus if device.persistence_mode is False]
    if off:
        names = ", ".join(device.label for device in off)
        message = f"persistence mode is off on GPU {names}: each first use waits for the driver to load"
        remedy = ("sudo systemctl enable --now nvidia-persistenced", "sudo nvidia-smi -pm 1")
        yield Finding("persistence_mode", WARN, f"GPU {names}", message, remedy)
    if not {"nvidia-uvm", "dxg"} & facts.device_nodes:  # WSL has /dev/dxg for all of it
        message = "cannot start CUDA in an engine: /dev/nvidia-uvm is missing, and engines may not create it (no_new_privs)"
        yield Finding("nvidia_uvm", FAIL, "/dev/nvidia-uvm", message, ("sudo nvidia-modprobe -u -c=0",))
    if SWITCHES in facts.device_nodes and facts.fabric_manager is not True:
        seen = facts.fabric_manager is False
        state = "does not run" if seen else "cannot be seen from here; where it does not run"
        message = f"this machine has NVSwitches, and the fabric manager {state}: CUDA does not start on any GPU"
        remedy = ("sudo systemctl enable --now nvidia-fabricmanager", "sudo journalctl -u nvidia-fabricmanager -n 50")
        yield Finding("fabric_manager", FAIL if seen else WARN, "fabric manager", message, remedy)


def _version(text: str) -> tuple[int, ...]:
    """``12.8`` as (12, 8); empty for what is no version."""
    parts = text.split(".")
    return tuple(int(part) for part in parts[:2]) if all(part.isdigit() for part in parts[:2]) else ()


def _runs_on(built: tuple[str, ...], has: str) -> bool:
    """A build for 8.0 runs on 8.9, not on 9.0 or 7.5; one with PTX (``8.0+PTX``) on every later GPU."""
    for one in built:
        made_for = _version(one.removesuffix("+PTX"))
        if made_for <= _version(has) and (one.endswith("+PTX") or made_for[:1] == _version(has)[:1]):
            return True
    return False
