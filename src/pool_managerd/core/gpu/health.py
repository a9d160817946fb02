"""Whether a GPU is to be used. Pure.

A GPU is healthy, quarantined (nothing starts on it, and what runs there ends when it is ``lost``), or on probation: it was
quarantined, a scan finds nothing wrong with it any more, and nothing starts on it yet.

How it leaves quarantine depends on what brought it there (`Until`). One that was lost has to answer again. One that only a
reset can heal stays until there is evidence of a reset: it was away, or its error counters began again. A recovery that the
driver asks for is over when the driver says so, a pending repair when nothing is pending. Then it is on probation for
`PROBATION_SCANS` healthy scans in a row. An operator's word (`override`) ends all of it at once, and holds while the same
recovery or repair is still pending.

Only periodic scans count, both for a probation and for a memory error whose kind is yet to be heard. Others are made whenever
somebody starts a pool or waits for memory to be given back, dozens within a second: a GPU that fails every few seconds would
be through its probation between two failures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal

from pool_managerd.core.gpu.devices import NOT_PERMITTED, PLACEHOLDER, DeviceSnapshot
from pool_managerd.core.gpu.xid import REBOOT, RESET, Verdict, XidMeaning, recovery

PROBATION_SCANS = 3
"""Healthy periodic scans in a row until a GPU that was bad is used again (FAULTS F11)."""
_LOST = "it is lost: "
_OPEN_IT = "see ls -l /dev/nvidia* and the device rules of the container; nothing is wrong with the GPU itself"
_LOOK_INTO = "run nvidia-smi; see dmesg | grep -i nvrm for the cause"


class Until(Enum):
    """What ends a quarantine. Evidence of a reset ends any."""

    ANSWERS = "it answers again"
    RESET = "it was reset since"
    WITHDRAWN = "the driver does not ask for a recovery any more"
    REPAIRED = "no repair is pending any more"
    OVER = "what it waited for has happened: the next healthy scan ends it"


@dataclass(frozen=True, slots=True)
class Healthy:
    """``overridden``: an operator wants it used although a recovery or a repair is pending."""

    name: ClassVar[str] = "ok"
    reason: ClassVar[None] = None
    overridden: bool = False


@dataclass(frozen=True, slots=True)
class Probation:
    """It was quarantined for ``reason``. ``healthy_scans``: periodic ones in a row."""

    name: ClassVar[str] = "probation"
    reason: str
    healthy_scans: int = 0


@dataclass(frozen=True, slots=True)
class Quarantined:
    """``lost``: programs on it cannot go on. ``away``: it was not there since this began. ``ecc_before``: uncorrected errors
    that were counted when it began."""

    name: ClassVar[str] = "quarantined"
    reason: str
    remedy: str
    lost: bool
    until: Until
    away: bool = False
    ecc_before: int | None = None


@dataclass(frozen=True, slots=True)
class GpuHealth:
    """What is known of the health of one device. ``parent``: the GPU of a MIG instance.

    ``label`` is the UUID of a GPU whose index another one took. ``unreadable``: why it cannot be read now; that changes no
    state, but nothing new starts on it. ``ecc_seen``: uncorrected errors counted last. ``memory_error``: one was counted whose
    kind was not heard yet (``open``), or a contained one was heard of that is not counted yet (``contained``).
    """

    uuid: str
    label: str = "?"
    state: Healthy | Probation | Quarantined = Healthy()
    cordoned: bool = False
    parent: str | None = None
    unreadable: str | None = None
    ecc_seen: int | None = None
    memory_error: Literal["open", "contained"] | None = None

    @property
    def healthy(self) -> bool:
        return isinstance(self.state, Healthy)

    @property
    def lost(self) -> bool:
        """Programs on it cannot go on."""
        return isinstance(self.state, Quarantined) and self.state.lost

    @property
    def usable(self) -> bool:
        """May a start be placed on it?"""
        return self.healthy and not self.cordoned and self.unreadable is None

    @property
    def problem(self) -> str:
        """Why a start may not be placed on it."""
        if not self.healthy:
            state = "on probation" if isinstance(self.state, Probation) else self.state.name
            return f"GPU {self.label} is {state}: {self.state.reason}"
        if self.unreadable is not None:
            return f"GPU {self.label} cannot be read: {self.unreadable}"
        return f"GPU {self.label} is cordoned"

    @property
    def remedy(self) -> str:
        """What to do about it. Names the UUID where the index may be another GPU's by then."""
        if isinstance(self.state, Probation):
            left = PROBATION_SCANS - self.state.healthy_scans
            return f"wait for {left} more healthy scan{'s' * (left > 1)}, or pool-managerd devices uncordon {self.uuid}"
        if isinstance(self.state, Quarantined) and self.state.remedy:
            return self.state.remedy
        if self.healthy and self.unreadable is not None:
            return _OPEN_IT if self.unreadable == NOT_PERMITTED else _LOOK_INTO
        return f"pool-managerd devices uncordon {self.label}"

    @property
    def objection(self) -> str:
        """Both in one sentence."""
        return f"{self.problem} ({self.remedy})"


def after_scan(h: GpuHealth, device: DeviceSnapshot | None, *, periodic: bool = True) -> GpuHealth:
    """What a scan makes of it; ``device`` is None when it is not listed any more."""
    if device is None:
        return _lost(replace(h, unreadable=None), "it is no longer there")
    h = replace(h, label=device.label, parent=device.parent_uuid, unreadable=device.unreadable)
    if device.error is not None:
        return _lost(h, device.error)
    if device.unreadable is not None:
        return h
    h, grave = _counted(h, device, periodic)
    if grave:
        return quarantine(h, "an uncorrectable memory error occurred", RESET, lost=True)
    wanted = recovery(device.recovery_action or 0)
    asked = wanted.verdict is Verdict.FATAL
    if isinstance(h.state, Healthy) and h.state.overridden:
        return replace(h, state=Healthy(overridden=asked or device.reset_pending))
    waits = isinstance(h.state, Quarantined) and h.state.until is not Until.ANSWERS
    if asked:
        if waits:
            return _until(h, Until.WITHDRAWN)
        return quarantine(h, wanted.what, wanted.remedy, lost=wanted.lost, until=Until.WITHDRAWN)
    if device.recovery_action is not None:
        h = withdrawn(h)
    if device.reset_pending:
        why = "repaired memory waits for a reset of the GPU"
        return h if waits else quarantine(h, why, RESET, lost=False, until=Until.REPAIRED)
    return _healthy_scan(h, device, periodic)


def _counted(h: GpuHealth, device: DeviceSnapshot, periodic: bool) -> tuple[GpuHealth, bool]:
    """Uncorrected memory errors, as the driver counts them; true when one is held against the GPU.

    Where errors can be contained the Xid that says so may be heard a moment later, or was heard a moment before.
    """
    now = device.ecc_uncorrected
    grown = h.ecc_seen is not None and now is not None and now > h.ecc_seen
    seen = h if now is None else replace(h, ecc_seen=now)  # what was seen last still counts
    if not grown:
        overdue = h.memory_error == "open" and periodic
        return replace(seen, memory_error=None) if overdue else seen, overdue
    if h.memory_error == "contained":
        return replace(seen, memory_error=None), False
    return (replace(seen, memory_error="open"), False) if device.contains_errors else (seen, True)


def after_xid(h: GpuHealth, meaning: XidMeaning, xid: int) -> GpuHealth:
    """What an Xid makes of it."""
    if meaning.verdict is Verdict.FATAL:
        until = Until.WITHDRAWN if meaning.asked else Until.RESET
        return quarantine(h, f"Xid {xid}: {meaning.what}", meaning.remedy, lost=meaning.lost, until=until)
    if meaning.contained:
        return replace(h, memory_error=None if h.memory_error == "open" else "contained")
    return withdrawn(h) if meaning.withdrawn else h


def withdrawn(h: GpuHealth) -> GpuHealth:
    """The driver does not ask for a recovery any more: what is in quarantine for that alone is tried again."""
    return _until(h, Until.OVER) if isinstance(h.state, Quarantined) and h.state.until is Until.WITHDRAWN else h


def quarantine(h: GpuHealth, reason: str, remedy: str, *, lost: bool, until: Until = Until.RESET) -> GpuHealth:
    """From now on nothing starts on it. A GPU that is lost already stays so."""
    remedy = remedy.format(uuid=_name_for_tools(h))
    return replace(h, state=Quarantined(reason, remedy, lost or h.lost, until, ecc_before=h.ecc_seen))


def override(h: GpuHealth) -> GpuHealth:
    """An operator says that it may be used: quarantine, probation and cordon end."""
    return replace(h, state=Healthy(overridden=True), cordoned=False, memory_error=None)


def _lost(h: GpuHealth, why: str) -> GpuHealth:
    if isinstance(h.state, Quarantined) and h.lost:
        return replace(h, state=replace(h.state, away=True))
    remedy = RESET.format(uuid=_name_for_tools(h)) if why.startswith("RESET_REQUIRED") else REBOOT
    now = Quarantined(f"{_LOST}{why}", remedy, lost=True, until=Until.ANSWERS, away=True)
    if isinstance(h.state, Quarantined):
        now = replace(now, until=h.state.until, ecc_before=h.state.ecc_before)
    return replace(h, state=now)


def _until(h: GpuHealth, until: Until) -> GpuHealth:
    return replace(h, state=replace(h.state, until=until)) if isinstance(h.state, Quarantined) else h


def _name_for_tools(h: GpuHealth) -> str:
    """What nvidia-smi takes: the UUID of the physical GPU, its index where the UUID could never be read."""
    uuid = h.parent or h.uuid
    return h.label if uuid.startswith(PLACEHOLDER) else uuid


def _healthy_scan(h: GpuHealth, device: DeviceSnapshot, periodic: bool) -> GpuHealth:
    """One step out of quarantine and through probation."""
    if isinstance(h.state, Healthy):
        return h
    if isinstance(h.state, Quarantined):
        if h.state.until in (Until.RESET, Until.WITHDRAWN) and not _was_reset(h.state, device):
            return h
        return replace(h, state=Probation(_past(h.state), int(periodic)))
    scans = h.state.healthy_scans + periodic
    if scans < PROBATION_SCANS:
        return replace(h, state=replace(h.state, healthy_scans=scans))
    return replace(h, state=Healthy(), memory_error=None)


def _past(q: Quarantined) -> str:
    """Why it was in quarantine, and how that ended."""
    if q.until is Until.REPAIRED and not q.away:
        return "repaired memory waited for a reset of the GPU, and does not any more"
    if q.until in (Until.WITHDRAWN, Until.OVER) and not q.away:
        return f"{q.reason}; it does not any more"
    since = Until.RESET if q.until is Until.RESET and not q.away else Until.ANSWERS
    return f"{q.reason.replace(_LOST, 'it was lost: ', 1)}; {since.value}"


def _was_reset(q: Quarantined, device: DeviceSnapshot) -> bool:
    """It came back, or its error counters began again."""
    return q.away or (q.ecc_before is not None and device.ecc_uncorrected is not None and device.ecc_uncorrected < q.ecc_before)
