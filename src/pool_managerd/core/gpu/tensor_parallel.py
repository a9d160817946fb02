"""Engines that divide every layer among GPUs (vLLM): equal parts, as large as the smallest GPU can carry (SPEC §5.4)."""

from __future__ import annotations

from collections.abc import Sequence

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.gpu.split import SplitPlan, normalised
from pool_managerd.core.memory.estimate import DeviceFraction
from pool_managerd.core.memory.estimator import LaunchEstimator, LaunchInputs
from pool_managerd.errors import SpecError

_EQUAL = 1e-6


def check(inputs: LaunchInputs, n_devices: int, split: str | tuple[float, ...] | None) -> None:
    """Raises SpecError for a division that such an engine cannot do. ``n_devices``: of the mask, 0 without one."""
    configured = _configured_gpus(inputs)
    if configured is not None:
        if 0 < n_devices < configured:
            raise SpecError(
                f"cannot run an engine over {configured} GPUs: its device mask has {n_devices}",
                hint="name as many GPUs as it is told to use",
            )
        return
    if split is None and n_devices > 1:
        raise SpecError(
            f"cannot use {n_devices} GPUs: without tensor_split this engine uses the first alone",
            hint="set `tensor_split: auto` to divide the model among them, or name one device",
        )
    if isinstance(split, tuple):
        shares = normalised(split, len(split))
        if max(shares) - min(shares) > _EQUAL:
            raise SpecError(
                "cannot divide the model by these shares: this engine divides equally", hint="set `tensor_split: auto`"
            )
        n_devices = len(split)
    if split is not None and n_devices and not divisible(inputs, n_devices):
        heads = inputs.shape.n_heads if inputs.shape is not None else None
        raise SpecError(
            f"cannot divide the model's {heads} attention heads among {n_devices} GPUs: their number is no multiple of it",
            hint="use a number of GPUs that divides it",
        )


def configured_split(inputs: LaunchInputs) -> tuple[float, ...] | None:
    """The division that the engine was given, in the flags it was submitted with."""
    configured = _configured_gpus(inputs)
    return (1 / configured,) * configured if configured is not None and configured > 1 else None


def used(inputs: LaunchInputs, devices: Sequence[DeviceSnapshot]) -> tuple[DeviceSnapshot, ...]:
    """Those of ``devices`` that the engine takes memory of, in PCI order: all, or as many as it was told to use."""
    return in_pci_order(devices)[: _configured_gpus(inputs)]


def _configured_gpus(inputs: LaunchInputs) -> int | None:
    return inputs.settings.gpus if isinstance(inputs.settings, DeviceFraction) else None


def divisible(inputs: LaunchInputs, n_devices: int) -> bool:
    """True when each GPU gets as many attention heads. What the header does not tell is left to the engine."""
    return inputs.shape is None or inputs.shape.n_heads is None or inputs.shape.n_heads % n_devices == 0


def plan(launch: LaunchEstimator, devices: Sequence[DeviceSnapshot]) -> SplitPlan:
    """The equal division, held against what the engine takes of each GPU. Raises NodeError INSUFFICIENT_VRAM."""
    whole = launch.estimate_on(devices)
    taken = whole.per_device((1 / len(devices),) * len(devices))
    return SplitPlan.equal(
        devices, whole.weights.size_bytes, kv_bytes=whole.kv.size_bytes, overhead_bytes=whole.fixed_bytes_per_gpu,
        free={d.uuid: part for d, part in zip(devices, taken, strict=True)},
    )  # fmt: skip
