"""The gateway's own series (SPEC §13.1): what came in, what it waited for, what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from pool_managerd.telemetry import series
from pool_managerd.telemetry.families import Family, Scrape, checked_labels
from pool_managerd.telemetry.series import Series

NO_POOL = "none"


class OfPool:
    """The series of one pool, looked up once."""

    def __init__(self, child: Callable[..., Any], engine: str, pool_id: str) -> None:
        def of(spec: Series) -> Any:
            return child(spec, engine=engine, pool_id=pool_id)

        self.started, self.cancelled = (
            of(series.TASKS_STARTED),
            child(series.TASKS_CANCELED, engine=engine, pool_id=pool_id, reason="client"),
        )
        self.admission, self.first, self.decode = of(series.ADMISSION_LATENCY), of(series.FIRST_BYTE), of(series.DECODE_LATENCY)
        self.tokens_in, self.tokens_cached, self.tokens_out = (
            of(series.TOKENS_IN), of(series.TOKENS_CACHED), of(series.TOKENS_OUT)
        )  # fmt: skip


class GatewayMetrics:
    """``labels`` are constant labels on every series (``telemetry.labels``)."""

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        constant = checked_labels(labels or {})
        self._registry = CollectorRegistry(auto_describe=False)
        self._families = {spec.name: Family(spec, constant, self._registry) for spec in series.GATEWAY}
        self._pools: dict[tuple[str, str], OfPool] = {}
        self._answered: dict[tuple[str, str, int], Any] = {}

    def of_pool(self, engine: str, pool_id: str) -> OfPool:
        """What one pool's requests are counted in."""
        found = self._pools.get((engine, pool_id))
        if found is None:
            found = self._pools[engine, pool_id] = OfPool(self._child, engine, pool_id)
        return found

    def answered(self, pool_id: str, path: str, status: int) -> None:
        """Count one request that is over."""
        key = (pool_id, path, status)
        found = self._answered.get(key)
        if found is None:
            child = self._child(series.GATEWAY_REQUESTS, pool_id=pool_id, path=path, status=str(status))
            found = self._answered[key] = child
        found.inc()

    def rejected(self, reason: str) -> None:
        """Count one request that got no engine."""
        self._child(series.TASKS_REJECTED, reason=reason).inc()

    def keep(self, pool_ids: set[str]) -> None:
        """Show nothing any more of pools that are gone."""
        for family in self._families.values():
            family.drop("pool_id", lambda value: value not in pool_ids and value != NO_POOL)
        self._pools.clear()
        self._answered.clear()

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(Scrape(self._registry, ()))

    def _child(self, spec: Series, **labels: str) -> Any:
        return self._families[spec.name].child(**labels)
