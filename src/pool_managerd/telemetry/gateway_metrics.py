"""The gateway's own series (SPEC §13.1): what came in, what it waited for, what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from pool_managerd.telemetry import series
from pool_managerd.telemetry.families import Family, Scrape, checked_labels
from pool_managerd.telemetry.series import Series

NO_POOL = "none"


class GatewayMetrics:
    """``labels`` are constant labels on every series (``telemetry.labels``)."""

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        constant = checked_labels(labels or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._families = {spec.name: Family(spec, constant, self._registry) for spec in series.GATEWAY}
        self._children: dict[tuple[str, ...], Any] = {}

    def count(self, spec: Series, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._child(spec, labels).inc(amount)

    def observe(self, spec: Series, value: float, **labels: str) -> None:
        """Note one value of a histogram."""
        self._child(spec, labels).observe(value)

    def keep(self, pool_ids: set[str]) -> None:
        """Show nothing any more of pools that are gone."""
        for family in self._families.values():
            family.drop("pool_id", lambda value: value not in pool_ids and value != NO_POOL)
        self._children.clear()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(Scrape(self._registry, ()))

    def _child(self, spec: Series, labels: dict[str, str]) -> Any:
        key = (spec.name, *labels.values())
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = self._families[spec.name].child(**labels)
        return found
