"""The gauges of a scrape, read from what the node says of its pools and devices at that moment (SPEC §13)."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from pool_managerd._version import __version__
from pool_managerd.telemetry import series
from pool_managerd.telemetry.series import Series

Row = Mapping[str, Any]
Samples = Iterable[tuple[list[str], Any]]
_MAX_LABEL_CHARS = 64
_CIRCUITS: Mapping[str, int] = MappingProxyType({"closed": 0, "open": 1, "half_open": 2})


class Gauges:
    """Makes families with the ``constant`` labels on each. What is not known has no sample."""

    def __init__(self, constant: Mapping[str, str]) -> None:
        self._constant = constant

    def of_node(
        self, statuses: Sequence[Row], degraded: bool | None, lag_seconds: float | None = None
    ) -> Iterator[GaugeMetricFamily]:
        """Of the daemon and its pools; ``degraded``: whether its state cannot be written, None where that is not known; as is
        ``lag_seconds``, how late its event loop was.
        """
        yield self._family(series.BUILD_INFO, [([__version__, platform.python_version()], 1)])
        for spec in series.GAUGES:
            yield self._family(spec, (([str(pool["pool_id"])], pool.get(spec.source_key)) for pool in statuses))
        yield self._family(series.POOL_STATE, (([str(pool["pool_id"]), str(pool["state"])], 1) for pool in statuses))
        yield self._family(series.BREAKER_STATE, _circuits(statuses))
        for spec, key in ((series.FIRST_TOKEN, "first_token_ms"), (series.TOKENS_PER_S, "tokens_per_s")):
            yield self._family(spec, _measured(statuses, key))
        if degraded is not None:
            yield self._family(series.STATE_DEGRADED, [([], degraded)])
        if lag_seconds is not None:
            yield self._family(series.LOOP_LAG, [([], lag_seconds)])

    def of_models(self, figures: Mapping[str, int]) -> Iterator[GaugeMetricFamily]:
        """Of the cache of models."""
        yield self._family(series.CACHE_BYTES, [([], figures["bytes"])])
        yield self._family(series.CATALOG_ENTRIES, (([state], figures[state]) for state in ("active", "retired")))

    def of_devices(self, devices: Row, statuses: Sequence[Row]) -> Iterator[GaugeMetricFamily]:
        """Of the devices and of what the pools hold of them.

        Of a device that is gone there is left that it is quarantined, and which one it was.
        """
        rows = devices["devices"]
        present = [row for row in rows if row["id"] >= 0]
        for spec in series.DEVICE_FIELDS:
            yield self._family(spec, (([str(row["device"])], row.get(spec.source_key)) for row in present))
        yield self._family(series.VRAM_RESERVED, (([str(row["device"])], _reserved(row)) for row in present))
        yield self._family(series.QUARANTINED, (([str(row["device"])], row["state"] == "quarantined") for row in rows))
        yield self._family(series.GPU_INFO, (([str(row.get(name) or "") for name in series.GPU_INFO.labels], 1) for row in rows))
        held = list(_held(rows, {str(status["pool_id"]): status for status in statuses}))
        yield self._family(series.VRAM_USED, ((labels, reservation.get("used_bytes")) for labels, _, reservation in held))
        yield self._family(series.GPU_UTILIZATION, ((labels, row.get("utilization_percent")) for labels, row, _ in held))
        yield self._family(series.DEVICES_STALE, [([], bool(devices["stale"]))])
        for spec in (series.DEVICE_SCAN_AGE, series.RAM_AVAILABLE):
            yield self._family(spec, [([], devices.get(spec.source_key))])

    def _family(self, spec: Series, samples: Samples) -> GaugeMetricFamily:
        found = GaugeMetricFamily(spec.name, spec.help, labels=[*spec.labels, *self._constant])
        seen: set[tuple[str, ...]] = set()
        for labels, value in samples:
            cut = tuple(label[:_MAX_LABEL_CHARS] for label in labels)
            # A scrape with the same labels twice is refused.
            if value is not None and cut not in seen:
                seen.add(cut)
                found.add_metric([*cut, *self._constant.values()], float(value))
        return found


def _circuits(statuses: Sequence[Row]) -> Samples:
    """Each breaker of each pool, as a number."""
    for pool in statuses:
        for name, circuit in pool.get("circuits", {}).items():
            yield [str(pool["pool_id"]), name], _CIRCUITS.get(circuit)


def _measured(statuses: Sequence[Row], key: str) -> Samples:
    """One figure of each pool, once by its bench and once by its warm-ups."""
    for pool in statuses:
        for baseline in pool.get("baselines", ()):
            yield [str(pool["pool_id"]), str(baseline["kind"])], baseline.get(key)


def _held(rows: Sequence[Row], pools: Mapping[str, Row]) -> Iterator[tuple[list[str], Row, Row]]:
    """Each device with each pool that has something of it, and the labels of that pair."""
    for row in rows:
        for reservation in row["reservations"]:
            pool = pools.get(str(reservation["pool_id"]))
            if pool is not None:
                known = {**pool, "device": row["device"], "replica_id": reservation.get("replica_id", pool.get("replica_id"))}
                yield [str(known.get(label) or "unknown") for label in series.VRAM_USED.labels], row, reservation


def _reserved(row: Row) -> int:
    return sum(int(reservation["reserved_bytes"]) for reservation in row["reservations"])
