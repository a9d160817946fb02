"""Prometheus series (SPEC §13.2): gauges read from the pools' status when scraped, counters fed by the node's events."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pool_managerd._version import __version__
from pool_managerd.core.event import Event
from pool_managerd.errors import SpecError
from pool_managerd.telemetry import series
from pool_managerd.telemetry.device_metrics import device_metrics
from pool_managerd.telemetry.series import Series

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_POOL = "unknown"
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_LABEL = re.compile(r"^(?!__)[A-Za-z_][A-Za-z0-9_]*$")
_SLUG = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_VALUE_CHARS = 64


class Metrics:
    """The daemon's own registry. ``labels`` are constant labels on every series (``telemetry.labels``).

    ``on_event`` is a listener of the node's events; ``attach`` names the readers of all pools' status and of the
    devices. Series are bounded by the live pools and devices (DESIGN §8 no. 11): those of a pool or device that is
    gone are removed at the next scrape at the latest.
    """

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        self._constant = _checked(labels or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._families = {spec.name: _Family(spec, self._constant, self._registry) for spec in series.COUNTED}
        self._statuses: Callable[[], list[dict[str, Any]]] | None = None
        self._devices: Callable[[], dict[str, Any]] | None = None
        self._degraded: Callable[[], bool] | None = None
        self._http: dict[tuple[str, str, int], Counter] = {}
        self._registry.register(_Gauges(self))

    @property
    def constant_labels(self) -> dict[str, str]:
        return dict(self._constant)

    def attach(
        self, statuses: Callable[[], list[dict[str, Any]]], devices: Callable[[], dict[str, Any]] | None = None,
        degraded: Callable[[], bool] | None = None,
    ) -> None:  # fmt: skip
        """Show these pools and devices, and whether the state cannot be written, from the next scrape on."""
        self._statuses, self._devices, self._degraded = statuses, devices, degraded

    def statuses(self) -> list[dict[str, Any]]:
        return [] if self._statuses is None else self._statuses()

    def devices(self) -> dict[str, Any] | None:
        return None if self._devices is None else self._devices()

    def degraded(self) -> bool | None:
        return None if self._degraded is None else self._degraded()

    def render(self) -> bytes:
        """The exposition text."""
        if self._statuses is not None:
            live = {str(status["pool_id"]) for status in self._statuses()}
            for family in self._families.values():
                family.keep("pool_id", live)
        if (devices := self.devices()) is not None:
            present = {str(row["device"]) for row in devices["devices"]}
            for family in self._families.values():
                family.keep("device", present)
        return generate_latest(_ContractOnly(self._registry))

    def http_request(self, route: str, method: str, status: int) -> None:
        """Count one answered request; ``route`` is the template, never the path itself."""
        key = (route, method, status)
        child = self._http.get(key)
        if child is None:
            known = method if method in _METHODS else "OTHER"
            child = self._families[series.HTTP_REQUESTS.name].counter(route=route, method=known, status=str(status))
            if known == method:
                self._http[key] = child
        child.inc()

    def on_event(self, event: Event) -> None:
        """Count what one event of the node says. Unknown types are ignored."""
        pool, fields = event.pool_id or NO_POOL, event.fields
        match event.type:
            case "preload_succeeded":
                self._count(series.PRELOAD_SUCCESS, pool_id=pool, engine=fields.get("engine"))
                self._observe(series.PRELOAD_DURATION, fields.get("duration_ms"), pool_id=pool, outcome="success")
            case "preload_failed":
                self._count(series.PRELOAD_FAILURE, pool_id=pool, reason=fields.get("reason"))
                self._observe(series.PRELOAD_DURATION, fields.get("duration_ms"), pool_id=pool, outcome="error")
            case "probe":
                self._count(series.HEALTH_CHECKS, pool_id=pool, outcome=fields.get("outcome"))
            case "restart":
                self._count(series.RESTARTS, pool_id=pool)
            case "backoff":
                self._count(series.RESTARTS_SCHEDULED, pool_id=pool, crash_reason=fields.get("crash_reason"))
                self._observe(
                    series.BACKOFF_DELAY, fields.get("backoff_ms"), pool_id=pool, crash_reason=fields.get("crash_reason")
                )
            case "drain_finished":
                self._observe(series.DRAIN_DURATION, fields.get("duration_ms"), pool_id=pool)
            case "handoff":
                self._count(series.HANDOFF_FILES, pool_id=pool, outcome=fields.get("outcome"))
                self._observe(series.HANDOFF_DURATION, fields.get("duration_ms"), pool_id=pool)
            case "xid":
                self._count(series.XIDS, device=fields.get("device"), xid=fields.get("xid"))
            case "device_reset":
                self._count(series.DRIVER_RESETS, device=fields.get("device"))
            case "pool_removed":
                for family in self._families.values():
                    family.drop_pool(pool)
            case _:
                pass

    def _count(self, spec: Series, **labels: Any) -> None:
        self._families[spec.name].counter(**labels).inc()

    def _observe(self, spec: Series, value: Any, **labels: Any) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._families[spec.name].histogram(**labels).observe(value)


class _Family:
    """One counter or histogram family with the constant labels filled in and its label values bounded."""

    def __init__(self, spec: Series, constant: Mapping[str, str], registry: CollectorRegistry) -> None:
        self._spec = spec
        self._constant = tuple(constant.values())
        names = (*spec.labels, *constant)
        self._metric: Counter | Histogram
        if spec.kind == "counter":
            self._metric = Counter(spec.name, spec.help, names, registry=registry)
        else:
            self._metric = Histogram(spec.name, spec.help, names, buckets=spec.buckets, registry=registry)
        self._seen: dict[str, set[str]] = {label: set() for label in spec.labels if label in series.LABEL_BUDGETS}
        self._children: dict[tuple[str, ...], Any] = {}

    def counter(self, **labels: Any) -> Counter:
        child: Counter = self._child(labels)
        return child

    def histogram(self, **labels: Any) -> Histogram:
        child: Histogram = self._child(labels)
        return child

    def _child(self, labels: Mapping[str, Any]) -> Any:
        values = tuple(self._bounded(label, labels.get(label)) for label in self._spec.labels)
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values, *self._constant)
        return child

    def _bounded(self, label: str, value: Any) -> str:
        text = NO_POOL if value is None or value == "" else str(value)
        if label not in self._seen:
            return text
        text = _SLUG.sub("_", text)[:_MAX_VALUE_CHARS]
        seen = self._seen[label]
        if text not in seen:
            if len(seen) >= series.LABEL_BUDGETS[label]:
                return "other"
            seen.add(text)
        return text

    def keep(self, label: str, live: set[str]) -> None:
        """Show ``live`` values of ``label`` from the start, so that the first increase is seen as one, and drop all others."""
        if label not in self._spec.labels:
            return
        if self._spec.kind == "counter" and self._spec.labels == (label,):
            for value in live:
                self.counter(**{label: value})
        at = self._spec.labels.index(label)
        self._drop([values for values in self._children if values[at] not in live and values[at] != NO_POOL])

    def drop_pool(self, pool_id: str) -> None:
        if "pool_id" in self._spec.labels:
            at = self._spec.labels.index("pool_id")
            self._drop([values for values in self._children if values[at] == pool_id])

    def _drop(self, gone: Iterable[tuple[str, ...]]) -> None:
        for values in gone:
            del self._children[values]
            self._metric.remove(*values, *self._constant)


class _ContractOnly(Collector):
    """A registry without the client's own ``*_created`` gauges, which are no part of the contract."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Gauges(Collector):
    """Reads the pools and the devices once per scrape, so that a gauge never outlives what it shows."""

    def __init__(self, owner: Metrics) -> None:
        self._owner = owner

    def collect(self) -> Iterable[Metric]:
        constant = self._owner.constant_labels
        extra = list(constant.values())
        build = GaugeMetricFamily(series.BUILD_INFO.name, series.BUILD_INFO.help, labels=[*series.BUILD_INFO.labels, *constant])
        build.add_metric([__version__, platform.python_version(), *extra], 1.0)
        yield build
        statuses = self._owner.statuses()
        for spec in series.GAUGES:
            family = GaugeMetricFamily(spec.name, spec.help, labels=[*spec.labels, *constant])
            for status in statuses:
                value = status.get(spec.source_key or "")
                if value is not None:
                    family.add_metric([str(status["pool_id"]), *extra], float(value))
            yield family
        state = GaugeMetricFamily(series.POOL_STATE.name, series.POOL_STATE.help, labels=[*series.POOL_STATE.labels, *constant])
        for status in statuses:
            state.add_metric([str(status["pool_id"]), str(status["state"]), *extra], 1.0)
        yield state
        if (degraded := self._owner.degraded()) is not None:
            spec = series.STATE_DEGRADED
            family = GaugeMetricFamily(spec.name, spec.help, labels=[*constant])
            family.add_metric(extra, float(degraded))
            yield family
        devices = self._owner.devices()
        if devices is not None:
            yield from device_metrics(devices, statuses, constant)


def _checked(labels: Mapping[str, str]) -> dict[str, str]:
    taken = {label for spec in series.ALL for label in spec.labels} | {"le"}
    for name in labels:
        if not _LABEL.match(name) or name in taken:
            why = "a series has a label of that name" if name in taken else "it is no label name"
            raise SpecError(
                f"cannot use telemetry.labels key {name!r}: {why}",
                code="CONFIG_ERROR",
                hint="use letters, digits and '_', and another name than the labels in the metrics reference",
            )
    return dict(labels)
