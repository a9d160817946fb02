"""What one start needs: the configured figure, what a like launch was measured to hold, or the estimate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pool_managerd.core.gpu.devices import DeviceSnapshot
from pool_managerd.core.memory.estimate import NOTHING, Amount, DeviceFraction, EngineSettings, Footprint, estimate
from pool_managerd.core.memory.measurements import FootprintKey, Footprints
from pool_managerd.core.memory.model_shape import ModelShape

GUESS = 0.5
"""How far a footprint may be off that knows the size of the weights alone."""


@dataclass(frozen=True, slots=True)
class LaunchFacts:
    """What is known of a launch before it begins. ``shape`` is None for a model whose header cannot be read, ``model_key``
    tells one model's content from another's. ``configured_bytes`` is the operator's own figure for all GPUs together.
    """

    engine_version: str
    model_key: str
    settings: EngineSettings | DeviceFraction
    shape: ModelShape | None = None
    weights_bytes: int = 0
    overhead_bytes: int = 512 << 20
    configured_bytes: int | None = None

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
class LaunchSizing:
    """The footprint of a launch by the number of GPUs, with what was measured before."""

    facts: LaunchFacts
    known: Footprints

    def footprint(self, n_devices: int, split: tuple[float, ...] = ()) -> Footprint:
        """On any ``n_devices`` GPUs, as it is known before they are chosen; 0: on the CPU."""
        return self._footprint(n_devices, split, (), "")

    def footprint_on(self, devices: Sequence[DeviceSnapshot], split: tuple[float, ...] = ()) -> Footprint:
        """On these GPUs. Launches on another kind of GPU (of the first) are not alike."""
        return self._footprint(len(devices), split, tuple(d.vram_total_bytes for d in devices), devices[0].name)

    def _footprint(self, n_devices: int, split: tuple[float, ...], device_bytes: tuple[int, ...], gpu: str) -> Footprint:
        facts = self.facts
        if isinstance(facts.settings, DeviceFraction):
            shape = facts.shape or ModelShape("unknown", facts.weights_bytes)
            found = estimate(
                shape, facts.settings, overhead_bytes_per_gpu=facts.overhead_bytes, n_devices=n_devices, device_bytes=device_bytes
            )
            if facts.configured_bytes is not None and device_bytes:  # it is told to take this instead of its fraction
                found = replace(found, claimed_bytes=(facts.configured_bytes // n_devices,) * n_devices)
            return found
        if facts.configured_bytes is not None and n_devices:
            return Footprint(
                Amount("as configured", facts.configured_bytes), NOTHING, NOTHING, NOTHING, NOTHING, n_devices=n_devices
            )
        if facts.shape is None:
            found = _guess(facts, n_devices)
        else:
            found = estimate(facts.shape, facts.settings, overhead_bytes_per_gpu=facts.overhead_bytes, n_devices=n_devices)
        if n_devices and not found.n_devices:  # no layer is offloaded; the engine opens the GPUs all the same
            found = Footprint(
                NOTHING, NOTHING, NOTHING, Amount("overhead", facts.overhead_bytes), found.host, n_devices=n_devices
            )
        return found.with_measurement(self.known.get(self.key(split, gpu)) if n_devices else None)

    def key(self, split: tuple[float, ...] = (), gpu: str = "") -> FootprintKey:
        """Whatever decides memory tells launches apart: cache types, offloaded layers, files beside the model.

        Shares are rounded: automatic ones follow the free memory and are never quite the same twice.
        """
        facts, settings = self.facts, self.facts.settings
        if isinstance(settings, DeviceFraction):
            raise ValueError("a launch that takes a fraction of each GPU is not measured")
        rounded = tuple(round(share, 2) for share in split)
        alike = replace(settings, ctx=0, parallel=1)
        rest = hashlib.blake2b(f"{alike!r}:{gpu}".encode(), digest_size=6).hexdigest()
        return FootprintKey(facts.engine_version, f"{facts.model_key}+{rest}", settings.ctx, settings.parallel, rounded)


def _guess(facts: LaunchFacts, n_devices: int) -> Footprint:
    """From the size of the model's file alone."""
    weights = Amount("weights, from the size of the file alone", facts.weights_bytes, GUESS if facts.weights_bytes else 0.0)
    if n_devices == 0:
        return Footprint(NOTHING, NOTHING, NOTHING, NOTHING, weights, n_devices=0)
    return Footprint(weights, NOTHING, NOTHING, Amount("overhead", facts.overhead_bytes), NOTHING, n_devices=n_devices)
