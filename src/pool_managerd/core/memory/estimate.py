"""Will it fit: what an engine will allocate for a model, before it is started (SPEC §6.1, ORCH-3830)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from pool_managerd.core.memory import llamacpp_buffers as buffers
from pool_managerd.core.memory.llamacpp_buffers import EngineSettings
from pool_managerd.core.memory.measurements import Measurement
from pool_managerd.core.memory.model_shape import ModelShape
from pool_managerd.core.memory.tensor_places import bytes_in_ram
from pool_managerd.core.narration import count, size

__all__ = ["DeviceFraction", "EngineSettings", "EstimatePart", "MemoryEstimate", "estimate"]

HOST_BASE_BYTES = 64 << 20
HOST_PER_GPU_BYTES = 256 << 20
HOST_PER_TOKEN_BYTES = 512
"""A process of its own, a driver's part per GPU, and the vocabulary's texts and tables."""

HOST_FRACTION_ENGINE_BYTES = 4 << 30
"""Python and its libraries, of engines that take a share of the GPU."""

SURE, ROUGH, GUESSED = 0.02, 0.25, 1.0


@dataclass(frozen=True, slots=True)
class DeviceFraction:
    """An engine that takes ``fraction`` of each GPU, whatever the model needs (vLLM's ``--gpu-memory-utilization``).

    ``ctx`` tokens, of one request, must have room in its KV cache; 0: as many as the model was trained for. ``gpus``: how many
    it was told to use, where it was.
    """

    fraction: float
    ctx: int = 0
    gpus: int | None = None


@dataclass(frozen=True, slots=True)
class EstimatePart:
    """One part of an estimate. ``error_fraction`` 0.1: it may be a tenth more or less. ``text`` says what it is made of."""

    text: str
    size_bytes: int
    error_fraction: float = 0.0

    @property
    def error_bytes(self) -> int:
        return int(self.size_bytes * self.error_fraction)

    def __str__(self) -> str:
        sure = f" ± {self.error_fraction:.0%}" if self.error_fraction > SURE else ""
        return f"{self.text}: {size(self.size_bytes)}{sure}"


NOTHING = EstimatePart("nothing", 0)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a launch will hold. ``weights`` and ``kv`` are shared out among the GPUs, ``compute`` and ``overhead`` each has.

    Without a GPU all four are in RAM, and in ``host``. ``host_growth_bytes`` may be added to ``host`` while it
    serves; None: without limit. ``layer_bytes`` (weights and KV cache of each layer) and ``output_bytes``, which follow
    the last layer, are known for engines that divide a model by layers. ``claimed_bytes`` per GPU is what an engine takes
    whatever it needs. ``measured`` replaces the estimate where a like launch was seen before. ``notes`` say what is not counted.
    """

    weights: EstimatePart
    kv: EstimatePart
    compute: EstimatePart
    overhead: EstimatePart
    host: EstimatePart
    host_growth_bytes: int | None = 0
    n_devices: int = 1
    layer_bytes: tuple[int, ...] = ()
    output_bytes: int = 0
    claimed_bytes: tuple[int, ...] = ()
    measured: Measurement | None = None
    notes: tuple[str, ...] = ()

    @property
    def fixed_bytes_per_gpu(self) -> int:
        """What each GPU carries beside its share of weights and KV cache: `SplitPlan.compute`'s ``overhead_bytes``."""
        return self.compute.size_bytes + self.overhead.size_bytes

    @property
    def gpu_bytes(self) -> int:
        """Over all GPUs; 0 without any."""
        return sum(self.per_device((1 / self.n_devices,) * self.n_devices)) if self.n_devices else 0

    @property
    def error_bytes(self) -> int:
        """How far the sum over the GPUs may be off, either way; of a measured launch, how far apart its loads were."""
        if self.measured is not None:
            return sum(self.measured.spread_bytes)
        if self.claimed_bytes or not self.n_devices:
            return 0
        each = self.compute.error_bytes + self.overhead.error_bytes
        return self.weights.error_bytes + self.kv.error_bytes + self.n_devices * each

    def per_device(self, ratios: Sequence[float] = (1.0,)) -> tuple[int, ...]:
        """What to reserve on each GPU, in bytes, in the order of ``ratios`` (as of `SplitPlan.ratios`); () without GPUs.

        A measured launch reserves its peak and spread.
        """
        if not self.n_devices:
            return ()
        if self.measured is not None and len(self.measured.peak_bytes) == len(ratios):
            spread = self.measured.spread_bytes or (0,) * len(ratios)
            return tuple(peak + more for peak, more in zip(self.measured.peak_bytes, spread, strict=True))
        if self.claimed_bytes:
            return self.claimed_bytes
        shared = self.weights.size_bytes + self.kv.size_bytes
        by_layer = self._by_layer(ratios) if len(ratios) > 1 else (0,)
        return tuple(
            max(int(ratio * shared), part) + self.fixed_bytes_per_gpu for ratio, part in zip(ratios, by_layer, strict=True)
        )

    def with_measurement(self, measured: Measurement | None) -> MemoryEstimate:
        """The same launch as it was measured before; None leaves the estimate."""
        return replace(self, measured=measured)

    def explain(self) -> tuple[str, ...]:
        """A short human-readable sentence per part."""
        where = f" on each of {count(self.n_devices, 'GPU')}" if self.n_devices > 1 else ""
        lines = [str(part) for part in (self.weights, self.kv) if part.size_bytes]
        lines += [f"{part}{where}" for part in (self.compute, self.overhead) if part.size_bytes]
        if self.claimed_bytes:
            lines.append(f"the engine takes {', '.join(map(size, self.claimed_bytes))} whatever it needs of it")
        growth = self.host_growth_bytes
        more = ", without limit while it serves" if growth is None else f", up to {size(growth)} more while it serves"
        if self.host.size_bytes:
            lines.append(f"{self.host}{'' if growth == 0 else more}")
        if self.measured is not None:
            load, peak = (", ".join(map(size, part)) for part in (self.measured.load_bytes, self.measured.peak_bytes))
            lines.append(f"measured before ({count(self.measured.samples, 'load')}): {load} after loading, {peak} at the peak")
            if any(self.measured.spread_bytes):
                spread = ", ".join(map(size, self.measured.spread_bytes))
                lines.append(f"loads were up to {spread} apart, which is reserved on top of the peak")
        return (*lines, *self.notes)

    def _by_layer(self, ratios: Sequence[float]) -> tuple[int, ...]:
        """llama.cpp's own division: whole layers in order; the output matrix is one more behind them."""
        ends = list(accumulate(ratios))
        held = [0] * len(ratios)
        slots = len(self.layer_bytes) + 1
        for number, part in enumerate((*self.layer_bytes, self.output_bytes)):
            held[min(len(held) - 1, bisect_right(ends, number / slots * ends[-1]))] += part
        return tuple(held)


def estimate(
    shape: ModelShape,
    settings: EngineSettings | DeviceFraction,
    *,
    overhead_bytes_per_gpu: int,
    n_devices: int = 1,
    device_bytes: Sequence[int] = (),
) -> MemoryEstimate:
    """What a launch will allocate. Never raises for what is not known.

    More context never needs less, nor do more slots of the same context; at the same total they may, by the engine's
    rounding of each slot. ``n_devices`` 0, or no layer on a GPU: all is in RAM. ``device_bytes`` are the sizes of
    the GPUs, for an engine that takes a fraction of each.
    """
    if isinstance(settings, DeviceFraction):
        return _claimed(shape, settings, overhead_bytes_per_gpu, n_devices, device_bytes)
    if settings.gpu_layers == 0:
        n_devices = 0
    on_gpu = _fraction_on_gpu(shape, settings) if n_devices else 0.0
    weights = _weights(shape, settings, on_gpu)
    kept = bytes_in_ram(shape.tensors, settings.rules) if n_devices else {}
    in_ram = int(sum(kept.values()) * on_gpu)
    kv, by_layer = _kv(shape, settings)
    compute = EstimatePart(
        f"compute buffers for {settings.ubatch} tokens at once",
        _compute(shape, settings, n_devices),
        ROUGH if shape.n_embd else GUESSED,
    )
    overhead = EstimatePart("overhead", overhead_bytes_per_gpu if n_devices else 0)
    kv_gpu = on_gpu if settings.kv_on_gpu else 0.0
    host = _host(shape, settings, (weights, kv, compute), on_gpu, kv_gpu, n_devices)
    parts = _layers(shape, weights, by_layer, kept) if on_gpu == 1.0 and kv_gpu == 1.0 else ()
    on_gpus = _scaled(weights, on_gpu) if n_devices else weights
    found = MemoryEstimate(
        weights=replace(on_gpus, size_bytes=max(0, on_gpus.size_bytes - in_ram)),
        kv=_scaled(kv, kv_gpu) if n_devices else kv,
        compute=compute,
        overhead=overhead,
        host=replace(host, size_bytes=host.size_bytes + in_ram),
        host_growth_bytes=settings.cache_ram_bytes,
        n_devices=n_devices,
        layer_bytes=parts,
        output_bytes=_output_bytes(shape),
    )
    return _with_notes(found, shape, settings)


def _with_notes(found: MemoryEstimate, shape: ModelShape, settings: EngineSettings) -> MemoryEstimate:
    """What the estimate does not follow is said, and makes it wider."""
    notes: list[str] = []
    if not shape.known:
        notes.append(f"the architecture {shape.architecture!r} is unknown here: its cache and state are a guess")
    if settings.rules and not shape.tensors:
        notes.append("which weights stay in RAM is not counted: the model has too many tensors to read each")
    if settings.unmodelled:
        notes.append(f"not counted: {', '.join(settings.unmodelled)}, which changes what is needed")
    if not notes:
        return found
    if settings.unmodelled or (settings.rules and not shape.tensors):
        found = replace(
            found,
            weights=_widened(found.weights),
            kv=_widened(found.kv),
            compute=_widened(found.compute),
            host=_widened(found.host),
        )
    return replace(found, notes=tuple(notes))


def _widened(part: EstimatePart) -> EstimatePart:
    return replace(part, error_fraction=max(part.error_fraction, ROUGH))


def _weights(shape: ModelShape, settings: EngineSettings, on_gpu: float) -> EstimatePart:
    """What is on the GPU when all layers are: not the token embedding, unless it is the output matrix as well."""
    draft = settings.draft
    whole = shape.weights_bytes + settings.file_bytes + (draft.weights_bytes if draft else 0)
    if on_gpu and not shape.tied_output:
        whole -= shape.input_bytes
    kind = f" ({shape.quantization})" if shape.quantization else ""
    return EstimatePart(f"weights{kind}{' with a draft model' if draft else ''}", whole, SURE)


def _kv(shape: ModelShape, settings: EngineSettings) -> tuple[EstimatePart, tuple[int, ...]]:
    """The cache and state of all slots, and the part of each layer where it is known."""
    if shape.encoder:
        return EstimatePart("no KV cache: an encoder", 0), (0,) * (shape.n_layers or 0)
    by_layer = buffers.kv_bytes_by_layer(shape, settings)
    total = sum(by_layer) if by_layer is not None else buffers.assumed_kv_bytes(shape, settings)
    total += buffers.state_bytes(shape, settings)
    error = GUESSED if by_layer is None or not shape.known else SURE if shape.plain_cache else ROUGH
    if settings.draft is not None:
        total += _kv(settings.draft, settings.of_draft)[0].size_bytes
    cells = buffers.cells_per_sequence(shape, settings)
    slots = f"{cells} tokens for {count(settings.parallel, 'slot')}"
    if not settings.kv_unified:
        slots = f"{settings.parallel} × {cells} tokens"
    types = "/".join(dict.fromkeys((settings.cache_type_k, settings.cache_type_v)))
    copies = f", {settings.state_copies} states each" if shape.recurrent is not None and settings.state_copies > 1 else ""
    return EstimatePart(f"KV cache, {slots}, {types}{copies}", total, error), by_layer or ()


def _compute(shape: ModelShape, settings: EngineSettings, n_devices: int) -> int:
    own = buffers.compute_bytes(shape, settings)
    if n_devices > 1:
        own += buffers.pipeline_bytes(shape, settings)
    return own if settings.draft is None else own + buffers.compute_bytes(settings.draft, settings.of_draft)


def _host(
    shape: ModelShape,
    settings: EngineSettings,
    parts: tuple[EstimatePart, EstimatePart, EstimatePart],
    on_gpu: float,
    kv_gpu: float,
    n_devices: int,
) -> EstimatePart:
    weights, kv, compute = parts
    base = HOST_BASE_BYTES + HOST_PER_TOKEN_BYTES * (shape.n_vocab or 0) + n_devices * HOST_PER_GPU_BYTES
    base += int(weights.size_bytes * (1 - on_gpu)) + int(kv.size_bytes * (1 - kv_gpu))
    if n_devices == 0:
        return EstimatePart("RAM for all of it", base + compute.size_bytes, ROUGH)
    base += shape.input_bytes + buffers.host_compute_bytes(shape, settings)
    return EstimatePart("RAM", base, ROUGH)


def _layers(shape: ModelShape, weights: EstimatePart, kv: tuple[int, ...], kept: Mapping[int | None, int]) -> tuple[int, ...]:
    """Weights and cache of each layer, without what is kept in RAM; as if all layers were alike where names do not tell."""
    if not kv:
        return ()
    each = max(0, weights.size_bytes - _output_bytes(shape)) // len(kv)
    return tuple(max(0, each - kept.get(layer, 0)) + part for layer, part in enumerate(kv))


def _output_bytes(shape: ModelShape) -> int:
    return shape.input_bytes if shape.tied_output else shape.output_bytes


def _fraction_on_gpu(shape: ModelShape, settings: EngineSettings) -> float:
    if settings.gpu_layers is None or shape.n_layers is None or settings.gpu_layers > shape.n_layers:
        return 1.0
    return settings.gpu_layers / max(1, shape.n_layers)


def _scaled(part: EstimatePart, fraction: float) -> EstimatePart:
    return replace(part, size_bytes=int(part.size_bytes * fraction))


def _claimed(
    shape: ModelShape, settings: DeviceFraction, overhead_bytes: int, n_devices: int, device_bytes: Sequence[int]
) -> MemoryEstimate:
    weights = EstimatePart("weights", shape.weights_bytes, SURE)
    kv = NOTHING
    if shape.kv_heads is not None:
        one = EngineSettings(ctx=settings.ctx)
        kv = EstimatePart(
            f"KV cache, at least {buffers.cells_per_sequence(shape, one)} tokens", _kv(shape, one)[0].size_bytes, ROUGH
        )
    on_cpu = weights.size_bytes + kv.size_bytes if n_devices == 0 else 0
    return MemoryEstimate(
        weights=weights,
        kv=kv,
        compute=NOTHING,
        overhead=EstimatePart("overhead", overhead_bytes if n_devices else 0),
        host=EstimatePart("RAM", HOST_FRACTION_ENGINE_BYTES + on_cpu, ROUGH),
        n_devices=n_devices,
        claimed_bytes=tuple(int(total * settings.fraction) for total in device_bytes),
    )
