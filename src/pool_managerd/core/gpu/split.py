"""Sharing one model among GPUs of different size (SPEC §5.4, ORCH-3052): the plan, and why none works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.gpu.masks import in_pci_order
from pool_managerd.core.narration import count, size
from pool_managerd.errors import NodeError, SpecError

OVERHEAD_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Which share of a model each GPU carries, in PCI order: ``ratio × (model + KV cache) + overhead ≤ free``.

    Weights and KV cache of a layer lie on the same GPU, so one share divides both.
    """

    devices: tuple[DeviceSnapshot, ...]
    shares: tuple[float, ...]
    free_bytes: tuple[int, ...]
    model_bytes: int
    kv_bytes: int = 0
    overhead_bytes: int = OVERHEAD_BYTES

    @classmethod
    def compute(
        cls,
        devices: Sequence[DeviceSnapshot],
        model_size_bytes: int,
        *,
        kv_bytes: int = 0,
        overhead_bytes: int = OVERHEAD_BYTES,
        ratios: Sequence[float] | None = None,
        free: Mapping[str, int] | None = None,
    ) -> SplitPlan:
        """A plan that fits. ``ratios`` are in the order of ``devices``; without them shares follow the usable VRAM.

        ``free`` gives usable bytes by UUID, else each device's free VRAM. Raises SpecError for what was asked, NodeError
        INSUFFICIENT_VRAM when it cannot fit, with what each GPU lacks and the plan that came closest.
        """
        ordered = _checked(devices, model_size_bytes, kv_bytes, overhead_bytes)
        room = tuple(max(0, (free or {}).get(d.uuid, d.vram_free_bytes)) for d in ordered)
        best = cls(ordered, _by_room(room, overhead_bytes), room, model_size_bytes, kv_bytes, overhead_bytes)
        plan = best
        if ratios is not None:
            by_uuid = dict(zip((d.uuid for d in devices), normalised(ratios, len(devices)), strict=True))
            shares = tuple(by_uuid[d.uuid] for d in ordered)
            plan = cls(ordered, shares, room, model_size_bytes, kv_bytes, overhead_bytes)
        plan._check(best, devices)
        return plan

    @classmethod
    def equal(
        cls,
        devices: Sequence[DeviceSnapshot],
        model_size_bytes: int,
        *,
        kv_bytes: int = 0,
        overhead_bytes: int = OVERHEAD_BYTES,
        free: Mapping[str, int] | None = None,
    ) -> SplitPlan:
        """Tensor parallel: every GPU carries the same, so each what the smallest can. Raises as `compute`."""
        ordered = _checked(devices, model_size_bytes, kv_bytes, overhead_bytes)
        room = tuple(max(0, (free or {}).get(d.uuid, d.vram_free_bytes)) for d in ordered)
        plan = cls(ordered, (1 / len(ordered),) * len(ordered), room, model_size_bytes, kv_bytes, overhead_bytes)
        plan.validate()
        return plan

    def ratios(self) -> tuple[float, ...]:
        """One share per device, in PCI order; they sum to 1.0."""
        return self.shares

    def validate(self) -> None:
        """Raises NodeError INSUFFICIENT_VRAM when a GPU cannot hold its share."""
        self._check(self)

    @property
    def shares_bytes(self) -> tuple[int, ...]:
        """What each GPU must hold: its share of weights and KV cache, and the overhead."""
        whole = self.model_bytes + self.kv_bytes
        return tuple(math.floor(share * whole) + self.overhead_bytes for share in self.shares)

    @property
    def max_kv_bytes(self) -> int:
        """The largest KV cache, over all GPUs, that this division leaves room for; the tightest GPU decides."""
        rooms = (
            (free - self.overhead_bytes - share * self.model_bytes) / share
            for share, free in zip(self.shares, self.free_bytes, strict=True)
        )
        return max(0, math.floor(min(rooms)))

    @property
    def kv_bytes_per_device(self) -> tuple[int, ...]:
        """Each GPU's part of the KV cache, capped by what the tightest GPU can hold of its own."""
        total = min(self.kv_bytes, self.max_kv_bytes)
        return tuple(math.floor(share * total) for share in self.shares)

    @property
    def shortfall_bytes(self) -> int:
        """How much the worst GPU lacks; 0 when the plan fits."""
        return max(0, *(need - free for need, free in zip(self.shares_bytes, self.free_bytes, strict=True)))

    def tensor_split_flag(self) -> str:
        """The value of llama.cpp's ``--tensor-split``."""
        return ",".join(f"{share:.6g}" for share in self.shares)

    def _check(self, alternative: SplitPlan, order: Sequence[DeviceSnapshot] = ()) -> None:
        """``order`` is the caller's, in which a remedy is written."""
        if not self.shortfall_bytes:
            return
        closest = min((self, alternative), key=lambda plan: plan.shortfall_bytes)
        empty = sum(device.vram_total_bytes - device.vram_reserved_bytes for device in self.devices)
        raise NodeError(
            f"cannot {'divide the model among' if len(self.devices) > 1 else 'put the model on'}"
            f" {count(len(self.devices), 'GPU')}: {self._needs()}; {closest._verdict()}",
            code="INSUFFICIENT_VRAM", status=503, retriable=sum(self.shares_bytes) <= empty,
            hint=f"set `tensor_split: {closest._in_order(order)}`" if not closest.shortfall_bytes
            else "free memory there, add a GPU, lower ctx or slots, or use a smaller quantisation",
            details={
                "needed_bytes": sum(self.shares_bytes), "free_bytes": sum(self.free_bytes), "devices": self._rows(),
                "closest": {
                    "ratios": list(closest.shares), "shortfall_bytes": closest.shortfall_bytes, "devices": closest._rows(),
                },
            },
        )  # fmt: skip

    def _needs(self) -> str:
        """Per GPU, the worst first."""
        rows = zip(self.devices, self.shares_bytes, self.free_bytes, strict=True)
        worst = sorted(rows, key=lambda row: row[2] - row[1])
        return ", ".join(f"GPU {d.label} needs {size(need)} and has {size(free)} for it" for d, need, free in worst)

    def _verdict(self) -> str:
        if len(self.devices) == 1:
            return f"that is {size(self.shortfall_bytes)} too much"
        if not self.shortfall_bytes:
            return f"it would fit with {self._shown()}"
        return f"{self._shown()} came closest, {size(self.shortfall_bytes)} too much for one GPU"

    def _shown(self) -> str:
        return ", ".join(f"{share:.1%} on GPU {d.label}" for d, share in zip(self.devices, self.shares, strict=True))

    def _in_order(self, devices: Sequence[DeviceSnapshot]) -> str:
        """As a configuration is written: a share per device of the mask, in its order."""
        by_uuid = dict(zip((d.uuid for d in self.devices), self.shares, strict=True))
        return f"[{', '.join(f'{by_uuid[d.uuid]:.4g}' for d in devices)}]"

    def _rows(self) -> list[dict[str, Any]]:
        rows = zip(self.devices, self.shares, self.shares_bytes, self.free_bytes, strict=True)
        return [
            {"device": d.label, "uuid": d.uuid, "ratio": share, "needed_bytes": need, "free_bytes": free}
            for d, share, need, free in rows
        ]


def normalised(ratios: Sequence[float], n_devices: int) -> tuple[float, ...]:
    """``ratios`` scaled to the sum 1.0. Raises SpecError unless there is one positive finite number per device."""
    if len(ratios) != n_devices:
        raise _refused(f"there are {len(ratios)} ratios for {count(n_devices, 'GPU')}", "write one ratio per device of the pool")
    for ratio in ratios:
        if isinstance(ratio, bool) or not math.isfinite(ratio) or ratio < 0:
            raise _refused(f"{ratio!r} is no ratio", "use positive numbers")
        if ratio == 0:
            raise _refused("a GPU would carry nothing", "remove that GPU from `devices`, or give it a ratio above 0")
    largest = max(ratios)
    scaled = [ratio / largest for ratio in ratios]
    shares = tuple(ratio / math.fsum(scaled) for ratio in scaled)
    if min(shares) <= 0:
        raise _refused("a ratio is too small beside the others", "use numbers of like size")
    return shares


def _by_room(room: tuple[int, ...], overhead_bytes: int) -> tuple[float, ...]:
    """Shares by usable VRAM. A GPU without any gets the least share there is: the check then says what it lacks."""
    usable = [max(1, free - overhead_bytes) for free in room]
    return tuple(part / sum(usable) for part in usable)


def _checked(devices: Sequence[DeviceSnapshot], *sizes: int) -> tuple[DeviceSnapshot, ...]:
    if not devices:
        raise _refused("there is no GPU to use", "name the pool's `devices`")
    if any(number < 0 for number in sizes):
        raise _refused("a size is negative", "sizes count bytes")
    if len({d.uuid for d in devices}) != len(devices):
        raise _refused("a GPU is named twice", "name each device once")
    if len(devices) > 1 and any(d.parent_uuid is not None for d in devices):
        raise _refused("MIG instances cannot share a model", "give the pool one MIG instance, or whole GPUs")
    whole = next((d for d in devices if d.mig_enabled), None)
    if whole is not None:
        raise _refused(f"GPU {whole.label} is in MIG mode", "use another GPU, or one of its MIG instances")
    dark = next((d for d in devices if not d.readable), None)
    if dark is not None:
        raise NodeError(
            f"cannot divide the model among the GPUs: GPU {dark.label} cannot be read: {dark.error or dark.unreadable}",
            hint="use another GPU",
        )
    return in_pci_order(devices)


def _refused(why: str, hint: str) -> SpecError:
    return SpecError(f"cannot divide the model among the GPUs: {why}", hint=hint)
