"""What a probe saw, and what follows from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from pool_managerd.core.engines import CounterNames

_SERIES = re.compile(rb"^([a-z_][\w:]*)(?:\{[^\n]*\})? +(\d+(?:\.\d+)?(?:e[+-]?\d{1,2})?)(?:\s|$)", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """``live``: the engine process (or attached URL) is there. ``ready``: all gates passed and not draining (ORCH-3504)."""

    live: bool = False
    ready: bool = False


class ProbeOutcome(StrEnum):
    """``discarded`` means that the prober itself failed (no free descriptor, say): it says nothing about the engine."""

    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One probe. ``reason`` is a short human-readable phrase, empty on success. ``refused``: nothing listens on the port."""

    outcome: ProbeOutcome
    reason: str = ""
    refused: bool = False

    @property
    def ok(self) -> bool:
        return self.outcome is ProbeOutcome.SUCCESS


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine said of its own work: a count that grows with it, and its requests, those that wait included."""

    tokens: float = 0.0
    requests: int = 0


def read_counters(text: bytes, names: CounterNames) -> Counters | None:
    """The counters in Prometheus text, over all label sets; None when none of them is there."""
    found: dict[str, float] = {}
    for name, value in _SERIES.findall(text):
        key = name.decode()
        if key in names.tokens or key in names.requests:
            found[key] = found.get(key, 0.0) + float(value)
    if not found:
        return None
    tokens, requests = (sum(found.get(name, 0.0) for name in group) for group in (names.tokens, names.requests))
    return Counters(tokens, round(requests))


def check_response(status: int, content_type: str, body: bytes) -> ProbeResult:
    """The verdict on a health response: exactly 200, and not a web page in an engine's place.

    llama.cpp answers 503 while it loads; any status but 200 means not ready (SPEC §9). A JSON body that says
    something other than ok contradicts its own status and is not believed.
    """
    if status != 200:
        return ProbeResult(ProbeOutcome.ERROR, f"answered {status}")
    head = body[:512].lstrip().lower()
    if "html" in content_type or head.startswith((b"<!doctype", b"<html")):
        return ProbeResult(ProbeOutcome.ERROR, "answered 200 with a web page, so something else holds the port")
    if any(byte < 9 for byte in body[:512]):
        return ProbeResult(ProbeOutcome.ERROR, "answered 200 with garbage")
    if head.startswith(b"{") and b'"status"' in head and not any(word in head for word in (b'"ok"', b'"ready"', b'"healthy"')):
        return ProbeResult(ProbeOutcome.ERROR, "answered 200 with a status that is not ok")
    return ProbeResult(ProbeOutcome.SUCCESS)


def start_gap_ms(waited_ms: int, longest_ms: int) -> int:
    """The gap before the next start-up probe: a sixteenth of the wait so far, at least 8 ms, up to ``longest_ms``.

    Readiness is noticed late by a few percent of the load time at most, whatever that is.
    """
    return min(max(8, waited_ms // 16), longest_ms)


def next_probe_at(now: float, interval_s: float) -> float:
    """When a ready engine is asked again: ``interval_s`` from now, at most a tenth earlier.

    The times lie on a grid that all pools share, so that many of them wake the machine once and not each for itself.
    """
    grid = interval_s / 10
    return max(now + interval_s * 0.9, math.floor((now + interval_s) / grid) * grid)
