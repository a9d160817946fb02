"""Families of series with their constant labels filled in, and their label values bounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from pool_managerd.errors import SpecError
from pool_managerd.telemetry import series
from pool_managerd.telemetry.series import Series

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNKNOWN = "unknown"
_LABEL = re.compile(r"^(?!__)[A-Za-z_][A-Za-z0-9_]*$")
_SLUG = re.compile(r"[^A-Za-z0-9_.-]+")
_MAX_VALUE_CHARS = 64


class Family:
    """One counter or histogram family with the constant labels filled in and its label values bounded."""

    def __init__(self, spec: Series, constant: Mapping[str, str], registry: CollectorRegistry) -> None:
        self.spec = spec
        self._constant = tuple(constant.values())
        names = (*spec.labels, *constant)
        self._metric: Counter | Histogram
        if spec.kind == "counter":
            self._metric = Counter(spec.name, spec.help, names, registry=registry)
        else:
            self._metric = Histogram(spec.name, spec.help, names, buckets=spec.buckets, registry=registry)
        self._seen: dict[str, set[str]] = {label: set() for label in spec.labels if label in series.LABEL_BUDGETS}
        self._children: dict[tuple[str, ...], Any] = {}

    def child(self, **labels: Any) -> Any:
        """The counter or histogram with these labels."""
        values = tuple(self._bounded(label, labels.get(label)) for label in self.spec.labels)
        child = self._children.get(values)
        if child is None:
            filled = (*values, *self._constant)
            child = self._children[values] = self._metric.labels(*filled) if filled else self._metric
        return child

    def _bounded(self, label: str, value: Any) -> str:
        text = UNKNOWN if value is None or value == "" else str(value)
        if label not in self._seen:
            return text
        text = _SLUG.sub("_", text)[:_MAX_VALUE_CHARS]
        seen = self._seen[label]
        if text not in seen:
            if len(seen) >= series.LABEL_BUDGETS[label]:
                return "other"
            seen.add(text)
        return text

    def drop(self, label: str, gone: Callable[[str], bool]) -> None:
        """Show nothing any more with those values of ``label``."""
        if label not in self.spec.labels:
            return
        at = self.spec.labels.index(label)
        for values in [values for values in self._children if gone(values[at])]:
            del self._children[values]
            self._metric.remove(*values, *self._constant)


class Scrape(Collector):
    """What is counted, without the client's own ``*_created`` gauges, which are no part of the contract; then ``gauges``."""

    def __init__(self, registry: CollectorRegistry, gauges: Iterable[Metric]) -> None:
        self._registry = registry
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
        yield from self._gauges


def together(texts: Sequence[bytes]) -> bytes:
    """Several processes' exposition texts as one, where every series has the label that says whose it is."""
    if len(texts) == 1:
        return texts[0]
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for text in texts:
        family = b""
        for line in text.splitlines():
            if line.startswith(b"# HELP "):
                family = line.split(b" ", 3)[2]
                heads[family] = []
            (heads[family] if line.startswith(b"#") else samples.setdefault(family, [])).append(line)
    return b"".join(b"\n".join([*head, *samples.get(family, ())]) + b"\n" for family, head in heads.items())


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
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
