"""What one launch needs: what is configured, what a like launch was measured to hold, or the estimate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pool_managerd.core.memory.estimate import NOTHING, DeviceFraction, EngineSettings, EstimatePart, MemoryEstimate, estimate
from pool_managerd.core.memory.measurements import MeasurementKey, Measurements
from pool_managerd.core.memory.model_shape import ModelShape

GUESS = 0.5
"""How far an estimate may be off that knows the size of the weights alone."""


class Gpu(Protocol):
    """What an estimate goes by: its kind and its size."""

    @property
    def name(self) -> str: ...
    @property
    def vram_total_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LaunchInputs:
    """What is known of a launch before it begins. ``shape`` is None for a model whose header cannot be read, ``model_key``
    tells one model's content from another's. ``configured_bytes`` is what the operator says, for all GPUs together. ``fetched``
    is false for a model that is not on this machine yet: all this is known from its headers alone.
    """

    engine_version: str
    model_key: str
    settings: EngineSettings | DeviceFraction
    shape: ModelShape | None = None
    weights_bytes: int = 0
    overhead_bytes: int = 512 << 20
    configured_bytes: int | None = None
    fetched: bool = True

    @property
    def divides_equally(self) -> bool:
        """Engines that take a fraction of each GPU divide every layer among them (tensor parallel), not layer by layer."""
        return isinstance(self.settings, DeviceFraction)

    @property
    def only_device(self) -> int | None:
        """Of the GPUs it is shown, the one that it uses alone, by its place among them; None when it uses all."""
        return self.settings.only_device if isinstance(self.settings, EngineSettings) else None

    @property
    def shares(self) -> tuple[float, ...]:
        """How a command line divides the model among the GPUs that it is shown, in their order; () where it does not say."""
        return self.settings.shares if isinstance(self.settings, EngineSettings) else ()


@dataclass(frozen=True, slots=True)
class LaunchEstimator:
    """What a launch needs by the number of GPUs, with what was measured before."""

    inputs: LaunchInputs
    known: Measurements

    def estimate(self, n_devices: int, split: tuple[float, ...] = ()) -> MemoryEstimate:
        """On any ``n_devices`` GPUs, as it is known before they are chosen; 0: on the CPU."""
        return self._estimate(n_devices, split, (), "")

    def estimate_on(self, devices: Sequence[Gpu], split: tuple[float, ...] = ()) -> MemoryEstimate:
        """On these GPUs. Launches on another kind of GPU (of the first) are not alike."""
        return self._estimate(len(devices), split, tuple(d.vram_total_bytes for d in devices), devices[0].name)

    def _estimate(self, n_devices: int, split: tuple[float, ...], device_bytes: tuple[int, ...], gpu: str) -> MemoryEstimate:
        inputs = self.inputs
        if isinstance(inputs.settings, DeviceFraction):
            shape = inputs.shape or ModelShape("unknown", inputs.weights_bytes)
            found = estimate(
                shape,
                inputs.settings,
                overhead_bytes_per_gpu=inputs.overhead_bytes,
                n_devices=n_devices,
                device_bytes=device_bytes,
            )
            if inputs.configured_bytes is not None and device_bytes:  # it is told to take this instead of its fraction
                found = replace(found, claimed_bytes=(inputs.configured_bytes // n_devices,) * n_devices)
            return found
        if inputs.configured_bytes is not None and n_devices:
            return MemoryEstimate(
                EstimatePart("as configured", inputs.configured_bytes), NOTHING, NOTHING, NOTHING, NOTHING, n_devices=n_devices
            )
        if inputs.shape is None:
            found = _guess(inputs, n_devices)
        else:
            found = estimate(inputs.shape, inputs.settings, overhead_bytes_per_gpu=inputs.overhead_bytes, n_devices=n_devices)
        if n_devices and not found.n_devices:  # no layer is offloaded; the engine opens the GPUs all the same
            found = MemoryEstimate(
                NOTHING, NOTHING, NOTHING, EstimatePart("overhead", inputs.overhead_bytes), found.host, n_devices=n_devices
            )
        return found.with_measurement(self.known.get(self.key(split, gpu)) if n_devices else None)

    def key(self, split: tuple[float, ...] = (), gpu: str = "") -> MeasurementKey:
        """Whatever decides memory tells launches apart: cache types, offloaded layers, files beside the model.

        Shares are rounded: automatic ones follow the free memory and are never quite the same twice.
        """
        inputs, settings = self.inputs, self.inputs.settings
        if isinstance(settings, DeviceFraction):
            raise ValueError("a launch that takes a fraction of each GPU is not measured")
        rounded = tuple(round(share, 2) for share in split)
        alike = replace(settings, ctx=0, parallel=1)
        rest = hashlib.blake2b(f"{alike!r}:{gpu}".encode(), digest_size=6).hexdigest()
        return MeasurementKey(inputs.engine_version, f"{inputs.model_key}+{rest}", settings.ctx, settings.parallel, rounded)


def _guess(inputs: LaunchInputs, n_devices: int) -> MemoryEstimate:
    """From the size of the model's file alone."""
    weights = EstimatePart(
        "weights, from the size of the file alone", inputs.weights_bytes, GUESS if inputs.weights_bytes else 0.0
    )
    if n_devices == 0:
        return MemoryEstimate(NOTHING, NOTHING, NOTHING, NOTHING, weights, n_devices=0)
    return MemoryEstimate(
        weights, NOTHING, NOTHING, EstimatePart("overhead", inputs.overhead_bytes), NOTHING, n_devices=n_devices
    )
