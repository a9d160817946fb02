"""Gauges of the GPUs (SPEC §13), read from what the node says of its devices at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily

from pool_managerd.telemetry import series
from pool_managerd.telemetry.series import Series

Row = Mapping[str, Any]
_MAX_LABEL_CHARS = 64


def device_metrics(devices: Row, statuses: Sequence[Row], constant: Mapping[str, str]) -> Iterator[GaugeMetricFamily]:
    """Every gauge of the devices and of what the pools hold of them; what is not known has no sample.

    Of a device that is gone there is left that it is quarantined, and which one it was.
    """
    rows, extra = devices["devices"], list(constant.values())
    present = [row for row in rows if row["id"] >= 0]

    def family(spec: Series, samples: Iterable[tuple[list[str], Any]]) -> GaugeMetricFamily:
        found = GaugeMetricFamily(spec.name, spec.help, labels=[*spec.labels, *constant])
        seen: set[tuple[str, ...]] = set()
        for labels, value in samples:
            cut = tuple(label[:_MAX_LABEL_CHARS] for label in labels)
            # A scrape with the same labels twice is refused.
            if value is not None and cut not in seen:
                seen.add(cut)
                found.add_metric([*cut, *extra], float(value))
        return found

    for spec in series.DEVICE_FIELDS:
        yield family(spec, (([str(row["device"])], row.get(spec.source_key or "")) for row in present))
    yield family(series.VRAM_RESERVED, (([str(row["device"])], _reserved(row)) for row in present))
    yield family(series.QUARANTINED, (([str(row["device"])], row["state"] == "quarantined") for row in rows))
    yield family(series.GPU_INFO, (([str(row.get(name) or "") for name in series.GPU_INFO.labels], 1) for row in rows))
    held = list(_held(rows, {str(status["pool_id"]): status for status in statuses}))
    yield family(series.VRAM_USED, ((labels, reservation.get("used_bytes")) for labels, _, reservation in held))
    yield family(series.GPU_UTILIZATION, ((labels, row.get("utilization_percent")) for labels, row, _ in held))
    yield family(series.DEVICES_STALE, [([], bool(devices["stale"]))])
    for spec in (series.DEVICE_SCAN_AGE, series.RAM_AVAILABLE):
        yield family(spec, [([], devices.get(spec.source_key or ""))])


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
