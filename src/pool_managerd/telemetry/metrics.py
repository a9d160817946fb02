"""Prometheus series (SPEC §13.2): gauges read from the pools' status when scraped, counters fed by the node's events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest

from pool_managerd.core.event import Event
from pool_managerd.telemetry import series
from pool_managerd.telemetry.families import UNKNOWN, Family, Scrape, checked_labels
from pool_managerd.telemetry.gauges import Gauges
from pool_managerd.telemetry.series import Series

_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_COUNTED: Mapping[str, Series] = MappingProxyType({
    "probe": series.HEALTH_CHECKS, "crash": series.CRASHES, "restart": series.RESTARTS, "storm": series.STORMS,
    "xid": series.XIDS, "device_reset": series.DRIVER_RESETS, "config_reread": series.CONFIG_READ,
    "cache_lost": series.CACHE_LOST, "apply": series.CONFIG_APPLIED, "download": series.DOWNLOADS,
    "model_verified": series.VERIFICATIONS,
})  # fmt: skip
"""What one event of a type adds one to; its labels are fields of the event."""
_ADDED: Mapping[str, tuple[tuple[Series, str], ...]] = MappingProxyType({
    "cache_saved": ((series.SLOTS_SAVED, "slots"), (series.SLOTS_SAVED_BYTES, "bytes")),
    "cache_restored": ((series.SLOTS_RESTORED, "slots"),), "drain_finished": ((series.DRAIN_DURATION, "duration_ms"),),
    "download": ((series.DOWNLOADED_BYTES, "bytes"),), "model_verified": ((series.VERIFY_DURATION, "duration_ms"),),
    "models_gc": ((series.GC_BYTES, "bytes"),),
})  # fmt: skip
"""What the fields of an event add, or are observed as."""


class Metrics:
    """The daemon's own registry. ``labels`` are constant labels on every series (``telemetry.labels``).

    ``on_event`` is a listener of the node's events; ``attach`` names the readers of all pools' status and of the
    devices. Series are bounded by the live pools and devices (DESIGN §8 no. 11): those of a pool or device that is
    gone are removed at the next scrape at the latest.
    """

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        self._constant = checked_labels(labels or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._families = {spec.name: Family(spec, self._constant, self._registry) for spec in series.COUNTED}
        self._gauges = Gauges(self._constant)
        self._http: dict[tuple[str, str, int], Counter] = {}
        self._lag: Callable[[], float] | None = None
        self._models: Callable[[], Mapping[str, int] | None] = lambda: None
        self.attach(list)

    def attach(
        self, statuses: Callable[[], list[dict[str, Any]]], devices: Callable[[], dict[str, Any] | None] = lambda: None,
        degraded: Callable[[], bool | None] = lambda: None,
    ) -> None:  # fmt: skip
        """Show these pools and devices, and whether the state cannot be written, from the next scrape on."""
        self._statuses, self._devices, self._degraded = statuses, devices, degraded

    def watch_loop(self, lag_seconds: Callable[[], float]) -> None:
        """Show how late the daemon's event loop was."""
        self._lag = lag_seconds

    def watch_models(self, figures: Callable[[], Mapping[str, int] | None]) -> None:
        """Show how much is in the cache of models: ``bytes``, and how many are ``active`` and ``retired``."""
        self._models = figures

    def render(self) -> bytes:
        """The exposition text. Pools and devices are read once, so that a series never outlives what it shows."""
        statuses, devices = self._statuses(), self._devices()
        lag = None if self._lag is None else self._lag()
        gauges = [*self._gauges.of_node(statuses, self._degraded(), lag)]
        self._keep("pool_id", {str(status["pool_id"]) for status in statuses})
        if (models := self._models()) is not None:
            gauges += self._gauges.of_models(models)
        if devices is not None:
            gauges += self._gauges.of_devices(devices, statuses)
            self._keep("device", {str(row["device"]) for row in devices["devices"]})
        return generate_latest(Scrape(self._registry, gauges))

    def http_request(self, route: str, method: str, status: int) -> None:
        """Count one answered request; ``route`` is the template, never the path itself."""
        key = (route, method, status)
        child = self._http.get(key)
        if child is None:
            known = method if method in _METHODS else "OTHER"
            child = self._families[series.HTTP_REQUESTS.name].child(route=route, method=known, status=str(status))
            if known == method:
                self._http[key] = child
        child.inc()

    def on_event(self, event: Event) -> None:
        """Count what one event of the node says. Unknown types are ignored."""
        pool, fields = event.pool_id or UNKNOWN, event.fields
        if (spec := _COUNTED.get(event.type)) is not None:
            self._count(spec, **_labels(spec, fields, pool))
        for spec, name in _ADDED.get(event.type, ()):
            (self._count if spec.kind == "counter" else self._observe)(spec, fields.get(name), **_labels(spec, fields, pool))
        match event.type:
            case "preload_succeeded":
                self._count(series.PRELOAD_SUCCESS, pool_id=pool, engine=fields.get("engine"))
                self._observe(series.PRELOAD_DURATION, fields.get("duration_ms"), pool_id=pool, outcome="success")
            case "preload_failed":
                self._count(series.PRELOAD_FAILURE, pool_id=pool, reason=fields.get("reason"))
                self._observe(series.PRELOAD_DURATION, fields.get("duration_ms"), pool_id=pool, outcome="error")
            case "backoff":
                self._count(series.RESTARTS_SCHEDULED, pool_id=pool, crash_reason=fields.get("crash_reason"))
                self._observe(
                    series.BACKOFF_DELAY, fields.get("backoff_ms"), pool_id=pool, crash_reason=fields.get("crash_reason")
                )
            case "breaker" if fields.get("new_state") == "open":
                self._count(series.BREAKER_OPENED, **{"pool_id": pool, "class": fields.get("class")})
            case "reload_succeeded":
                self._count(series.RELOAD_SUCCESS, pool_id=pool)
                self._observe(series.RELOAD_DURATION, fields.get("duration_ms"), pool_id=pool)
            case "reload_failed":
                self._count(series.RELOAD_FAILURE, pool_id=pool, reason=fields.get("reason"))
                self._observe(series.RELOAD_DURATION, fields.get("duration_ms"), pool_id=pool)
            case "handoff":
                self._count(series.HANDOFF_FILES, pool_id=pool, outcome=fields.get("outcome"))
                self._observe(series.HANDOFF_DURATION, fields.get("duration_ms"), pool_id=pool)
            case "pool_removed":
                for family in self._families.values():
                    family.drop("pool_id", lambda value: value == pool)
            case _:
                pass

    def _keep(self, label: str, live: set[str]) -> None:
        """Show ``live`` values of ``label`` from the start, so that the first increase is seen as one, and drop all others."""
        for family in self._families.values():
            if family.spec.kind == "counter" and family.spec.labels == (label,):
                for value in live:
                    family.child(**{label: value})
            family.drop(label, lambda value: value not in live and value != UNKNOWN)

    def _count(self, spec: Series, amount: Any = 1, **labels: Any) -> None:
        self._families[spec.name].child(**labels).inc(amount if isinstance(amount, int) else 0)

    def _observe(self, spec: Series, value: Any, **labels: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._families[spec.name].child(**labels).observe(value)


def _labels(spec: Series, fields: Mapping[str, Any], pool: str) -> dict[str, Any]:
    """By the fields of an event; ``pool`` is whose it is."""
    return {**{label: fields.get(label) for label in spec.labels}, "pool_id": pool}
