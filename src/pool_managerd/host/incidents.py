"""One GPU error is told of twice, by NVML and by the kernel's log: it is passed on once."""

from __future__ import annotations

from pool_managerd.core.gpu.devices import DeviceIncident

_SAME_EVENT_S = 3.0
_NEEDS_ITS_TEXT = 154  # the recovery action that the driver asks for is in the text alone
_MAX_REMEMBERED = 256


class IncidentFilter:
    """Remembers who told of what: the same source may repeat itself, another one says nothing new."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], tuple[str, float]] = {}

    def is_news(self, incident: DeviceIncident, now: float) -> bool:
        """False for what another source told of a moment ago."""
        if incident.xid is None or incident.pci_bus_id is None:
            return True
        key = (_slot(incident.pci_bus_id), incident.xid)
        source, at = self._told.get(key, (incident.source, now))
        if source != incident.source and now - at < _SAME_EVENT_S:
            return incident.xid == _NEEDS_ITS_TEXT and bool(incident.text)
        if len(self._told) >= _MAX_REMEMBERED:
            self._told.clear()
        self._told[key] = (incident.source, now)
        return True


def _slot(pci_bus_id: str) -> str:
    """``00000000:01:00.0`` and ``0000:01:00`` are one slot."""
    domain, _, rest = pci_bus_id.lower().partition(".")[0].partition(":")
    return f"{domain.lstrip('0')}:{rest}"
