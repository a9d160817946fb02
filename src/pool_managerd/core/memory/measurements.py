"""What engines were measured to hold, remembered per engine version, model and settings (bounded)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MAX_MEASUREMENTS = 512
MAX_DEVICES = 64
MAX_SAMPLES = 1_000_000
_SPLIT_DIGITS = 4

Row = tuple[str, str, int, int, str, str, str, str, int]
"""Engine version, digest, ctx, parallel, split, then load, peak and spread per GPU (numbers between commas), samples."""


@dataclass(frozen=True, slots=True)
class MeasurementKey:
    """What makes two launches alike. ``ctx`` and ``parallel`` are the launch's totals, ``split`` the share of each GPU
    (empty: one GPU, or the engine's own choice).
    """

    engine_version: str
    model_digest: str
    ctx: int
    parallel: int
    split: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurement:
    """Bytes per GPU in PCI order: after the latest load, the highest ever seen, and how far apart loads have been."""

    load_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]
    samples: int = 1
    spread_bytes: tuple[int, ...] = ()

    def loaded(self, held: tuple[int, ...]) -> Measurement:
        """With one more launch that holds ``held`` after loading."""
        spread = self.spread_bytes or (0,) * len(held)
        return Measurement(
            held, _highest(_faded(self.peak_bytes, self.load_bytes), held), min(MAX_SAMPLES, self.samples + 1),
            tuple(max(s // 2, abs(new - old)) for s, new, old in zip(spread, held, self.load_bytes, strict=True)),
        )  # fmt: skip

    def serving(self, held: tuple[int, ...]) -> Measurement:
        """With one more scan of a launch that is known already."""
        return Measurement(self.load_bytes, _highest(self.peak_bytes, held), self.samples, self.spread_bytes)


def _faded(peak: tuple[int, ...], load: tuple[int, ...]) -> tuple[int, ...]:
    """Half of what a peak rose above the load: a leak of one launch must not raise reservations for ever."""
    return tuple(low + (high - low) // 2 for high, low in zip(peak, load, strict=True))


@dataclass
class Measurements:
    """The last ``limit`` kinds of launch that were measured; the least recently used is forgotten first."""

    limit: int = MAX_MEASUREMENTS
    _known: OrderedDict[MeasurementKey, Measurement] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: MeasurementKey) -> Measurement | None:
        """What was seen of such launches. Looking does not count as use: `observe` does."""
        return self._known.get(_canonical(key))

    def observe(self, key: MeasurementKey, per_gpu_bytes: Sequence[int], *, loaded: bool) -> Measurement:
        """Take note of what one launch holds per GPU in PCI order; ``loaded`` on the first scan after it became ready.

        A later scan of a launch that is not known yet counts as its first. Another number of GPUs starts anew.
        Raises ValueError for no GPUs, too many, or negative sizes.
        """
        held = tuple(int(size) for size in per_gpu_bytes)
        if not 0 < len(held) <= MAX_DEVICES or min(held) < 0:
            raise ValueError(f"cannot take note of {len(held)} sizes: one per GPU, none negative")
        key = _canonical(key)
        before = self._known.get(key)
        if before is None or len(before.load_bytes) != len(held):
            now = Measurement(held, held)
        else:
            now = before.loaded(held) if loaded else before.serving(held)
        self._known[key] = now
        self._known.move_to_end(key)
        while len(self._known) > self.limit:
            self._known.popitem(last=False)
        return now

    def to_rows(self) -> list[Row]:
        """All of it for a store, the least recently used first."""
        return [
            (
                key.engine_version, key.model_digest, key.ctx, key.parallel, _join(key.split),
                _join(seen.load_bytes), _join(seen.peak_bytes), _join(seen.spread_bytes), seen.samples,
            )
            for key, seen in self._known.items()
        ]  # fmt: skip

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[object]], limit: int = MAX_MEASUREMENTS) -> Measurements:
        """Rows of ``to_rows``, as a store gave them back; those that are not well formed are left out."""
        found = cls(limit)
        for row in rows:
            pair = _from_row(row)
            if pair is not None:
                found._known[pair[0]] = pair[1]
        while len(found._known) > limit:
            found._known.popitem(last=False)
        return found


def _canonical(key: MeasurementKey) -> MeasurementKey:
    """Shares that differ in their last digits only are the same split."""
    split = tuple(round(share, _SPLIT_DIGITS) for share in key.split)
    return MeasurementKey(key.engine_version, key.model_digest, key.ctx, key.parallel, split)


def _highest(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(pair) for pair in zip(a, b, strict=True))


def _join(numbers: Sequence[float]) -> str:
    return ",".join(map(repr, numbers))


def _from_row(row: Sequence[object]) -> tuple[MeasurementKey, Measurement] | None:
    try:
        version, digest, ctx, parallel, split, load, peak, spread, samples = row
        key = MeasurementKey(str(version), str(digest), int(str(ctx)), int(str(parallel)), tuple(map(float, _parts(split))))
        sizes = [tuple(map(int, _parts(text))) for text in (load, peak, spread)]
        seen = Measurement(sizes[0], sizes[1], int(str(samples)), sizes[2])
    except ValueError:
        return None
    lengths = {len(seen.load_bytes), len(seen.peak_bytes), len(seen.spread_bytes) or len(seen.load_bytes)}
    numbers = (*seen.load_bytes, *seen.peak_bytes, *seen.spread_bytes, seen.samples)
    sound = len(lengths) == 1 and 0 < len(seen.load_bytes) <= MAX_DEVICES and min(numbers) >= 0
    return (_canonical(key), seen) if sound and all(map(math.isfinite, key.split)) else None


def _parts(text: object) -> list[str]:
    return str(text).split(",") if text else []
