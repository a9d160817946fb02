"""What of a GPU's health must survive the daemon: a cordon, and a quarantine that only a reset ends.

The keys are those of every release, so that a daemon reads what an earlier or a later one wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pool_managerd.core.gpu.health import GpuHealth, Quarantined, Until


def to_stored(h: GpuHealth, boot_id: str) -> dict[str, Any] | None:
    """None when there is nothing to remember."""
    q = h.state if isinstance(h.state, Quarantined) and h.state.until is not Until.ANSWERS else None
    if q is None:
        return {"label": h.label, "cordoned": True, "boot_id": boot_id} if h.cordoned else None
    return {
        "label": h.label, "cordoned": h.cordoned, "boot_id": boot_id, "state": q.name, "reason": q.reason, "remedy": q.remedy,
        "lost": q.lost, "away": q.away, "ecc_at": q.ecc_before, "asked": q.until in (Until.WITHDRAWN, Until.OVER),
        "pending": q.until in (Until.REPAIRED, Until.OVER),
    }  # fmt: skip


def from_stored(uuid: str, raw: Mapping[str, Any], boot_id: str) -> GpuHealth:
    """A quarantine of another ``boot_id`` is over: the machine was reset since.

    Unknown and mistyped keys are left out: a cordon must survive any change of the rest.
    """
    known = GpuHealth(uuid, str(raw.get("label", "?")), cordoned=bool(raw.get("cordoned")))
    if raw.get("state") != Quarantined.name or raw.get("boot_id") != boot_id:
        return known
    number, asked, pending = raw.get("ecc_at"), bool(raw.get("asked")), bool(raw.get("pending"))
    until = (Until.OVER if pending else Until.WITHDRAWN) if asked else (Until.REPAIRED if pending else Until.RESET)
    quarantined = Quarantined(
        str(raw.get("reason")), str(raw.get("remedy") or ""), bool(raw.get("lost")), until,
        away=bool(raw.get("away")), ecc_before=number if isinstance(number, int) else None,
    )  # fmt: skip
    return replace(known, state=quarantined)
