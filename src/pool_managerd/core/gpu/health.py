"""Whether a GPU is to be used: quarantine, probation, cordon. Pure; ``now`` is a monotonic second.

A GPU that is lost comes back through probation by itself. One that only a reset can heal stays in quarantine until
there is evidence of a reset (it was away, or its error counters began again), or an operator uncordons it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from pool_managerd.core.gpu.devices import NOT_PERMITTED, PLACEHOLDER, DeviceSnapshot
from pool_managerd.core.gpu.xid import REBOOT, RESET, Verdict, XidMeaning, recovery

PROBATION_LOOKS = 3
"""Good periodic looks in a row until a GPU that was bad is used again (FAULTS F11)."""
_LOST = "it is lost: "
_OPEN_IT = "see ls -l /dev/nvidia* and the device rules of the container; nothing is wrong with the GPU itself"
_LOOK_INTO = "run nvidia-smi; see dmesg | grep -i nvrm for the cause"


class Trust(StrEnum):
    OK = "ok"
    QUARANTINED = "quarantined"
    PROBATION = "probation"


@dataclass(frozen=True, slots=True)
class DeviceTrust:
    """What is thought of one device.

    ``lost``: programs on it cannot go on. ``needs_reset``: only a reset heals it. ``pending``: nothing but a pending
    repair was wrong. ``away``: it was not there since the quarantine began. ``parent``: the GPU of a MIG instance.
    ``pardoned``: an operator wants it used although a repair is pending. ``unclear``: why its figures cannot be read now;
    that costs it no trust, but nothing new starts on it. ``label`` is the UUID of a GPU whose index another one took;
    ``remedy`` is kept, and so names the UUID.
    ``ecc_at`` and ``ecc_seen``: uncorrected errors then and last. ``asked``: the driver asks for a recovery, and will say when
    it does not any more. ``memory_error``: one was counted whose kind was not heard yet (``open``), or a contained one was
    heard of that is not counted yet (``contained``).
    """

    uuid: str
    label: str = "?"
    state: Trust = Trust.OK
    cordoned: bool = False
    reason: str | None = None
    remedy: str | None = None
    lost: bool = False
    needs_reset: bool = False
    pending: bool = False
    away: bool = False
    good_looks: int = 0
    parent: str | None = None
    pardoned: bool = False
    ecc_seen: int | None = None
    ecc_at: int | None = None
    unclear: str | None = None
    asked: bool = False
    memory_error: str = ""

    @property
    def usable(self) -> bool:
        """May a start be placed on it?"""
        return self.state is Trust.OK and not self.cordoned and self.unclear is None

    @property
    def trouble(self) -> str:
        """Why a start may not be placed on it."""
        if self.state is not Trust.OK:
            return f"GPU {self.label} is {'on probation' if self.state is Trust.PROBATION else 'quarantined'}: {self.reason}"
        if self.unclear is not None:
            return f"GPU {self.label} cannot be read: {self.unclear}"
        return f"GPU {self.label} is cordoned"

    @property
    def cure(self) -> str:
        """What to do about it."""
        if self.state is Trust.OK and self.unclear is not None:
            return _OPEN_IT if self.unclear == NOT_PERMITTED else _LOOK_INTO
        return self.remedy or f"pool-managerd devices uncordon {self.label}"

    @property
    def objection(self) -> str:
        """Both in one sentence."""
        return f"{self.trouble} ({self.cure})"


def look(t: DeviceTrust, device: DeviceSnapshot | None, *, periodic: bool = True) -> DeviceTrust:
    """What a fresh scan makes of it; ``device`` is None when it is not listed any more. Only periodic looks end a probation."""
    if device is None:
        return _lost(replace(t, unclear=None), "it is no longer there", away=True)
    t = replace(t, label=device.label, parent=device.parent_uuid, unclear=device.unclear)
    if device.error is not None:
        return _lost(t, device.error, away=True)
    if device.unclear is not None:
        return t
    t, grave = _counted(t, device, periodic)
    if grave:
        return condemn(t, "an uncorrectable memory error occurred", RESET, lost=True)
    wanted = recovery(device.recovery_action or 0)
    if wanted.verdict is Verdict.FATAL and not t.pardoned:
        if t.state is Trust.QUARANTINED and t.needs_reset:
            return replace(t, asked=True)
        return condemn(t, wanted.what, wanted.remedy, lost=wanted.lost, asked=True)
    if t.asked and device.recovery_action is not None:
        t = relieved(t)
    if device.reset_pending and not t.pardoned:
        if t.state is Trust.QUARANTINED and t.needs_reset:
            return t
        return replace(condemn(t, "repaired memory waits for a reset of the GPU", RESET, lost=False), pending=True)
    still = device.reset_pending or wanted.verdict is Verdict.FATAL
    return _good_look(replace(t, pardoned=t.pardoned and still), device, periodic)


def _counted(t: DeviceTrust, device: DeviceSnapshot, periodic: bool) -> tuple[DeviceTrust, bool]:
    """Uncorrected memory errors, as the driver counts them; true when one is held against the GPU.

    Where errors can be contained the Xid that says so may be heard a moment later, or was heard a moment before.
    """
    now = device.ecc_uncorrected
    grown = t.ecc_seen is not None and now is not None and now > t.ecc_seen
    seen = t if now is None else replace(t, ecc_seen=now)  # what was seen last still counts
    if not grown:
        overdue = t.memory_error == "open" and periodic
        return replace(seen, memory_error="") if overdue else seen, overdue
    if t.memory_error == "contained":
        return replace(seen, memory_error=""), False
    return (replace(seen, memory_error="open"), False) if device.contains_errors else (seen, True)


def judge(t: DeviceTrust, meaning: XidMeaning, xid: int) -> DeviceTrust:
    """What an Xid makes of it."""
    if meaning.verdict is Verdict.FATAL:
        return condemn(t, f"Xid {xid}: {meaning.what}", meaning.remedy, lost=meaning.lost, asked=meaning.asked)
    if meaning.contained:
        return replace(t, memory_error="" if t.memory_error == "open" else "contained")
    return relieved(t) if meaning.relieved else t


def relieved(t: DeviceTrust) -> DeviceTrust:
    """The driver does not ask for a recovery any more: what was in quarantine for that alone is tried again."""
    return replace(t, pending=True) if t.asked else t


def condemn(t: DeviceTrust, reason: str, remedy: str, *, lost: bool, asked: bool = False) -> DeviceTrust:
    """Into quarantine until a reset. A GPU that is known to be lost keeps that."""
    return replace(
        t, state=Trust.QUARANTINED, reason=reason, remedy=remedy.format(uuid=_name_for_tools(t)), lost=lost or t.lost,
        needs_reset=True, pending=False, away=False, good_looks=0, ecc_at=t.ecc_seen, asked=asked,
    )  # fmt: skip


def pardon(t: DeviceTrust) -> DeviceTrust:
    """An operator says that it may be used: quarantine, probation and cordon end."""
    return DeviceTrust(t.uuid, t.label, parent=t.parent, pardoned=True, ecc_seen=t.ecc_seen, unclear=t.unclear)


def _lost(t: DeviceTrust, why: str, *, away: bool) -> DeviceTrust:
    if t.state is Trust.QUARANTINED and t.lost:
        return replace(t, away=t.away or away, good_looks=0)
    remedy = RESET.format(uuid=_name_for_tools(t)) if why.startswith("RESET_REQUIRED") else REBOOT
    return replace(
        t, state=Trust.QUARANTINED, reason=f"{_LOST}{why}", remedy=remedy, lost=True, away=away, good_looks=0,
    )  # fmt: skip


def _name_for_tools(t: DeviceTrust) -> str:
    """What nvidia-smi takes: the UUID of the physical GPU, its index where the UUID could never be read."""
    uuid = t.parent or t.uuid
    return t.label if uuid.startswith(PLACEHOLDER) else uuid


def _good_look(t: DeviceTrust, device: DeviceSnapshot, periodic: bool) -> DeviceTrust:
    if t.state is Trust.OK:
        return t
    if t.state is Trust.QUARANTINED and t.needs_reset and not _was_reset(t, device):
        return t
    looks = t.good_looks + periodic
    if looks >= PROBATION_LOOKS:
        return replace(pardon(t), cordoned=t.cordoned, pardoned=False)
    left = PROBATION_LOOKS - looks
    wait = f"wait for {left} more good look{'s' * (left > 1)}, or pool-managerd devices uncordon {t.uuid}"
    reason = t.reason if t.state is Trust.PROBATION else _in_the_past(t)
    return replace(t, state=Trust.PROBATION, reason=reason, remedy=wait, good_looks=looks, needs_reset=False, asked=False)


def _in_the_past(t: DeviceTrust) -> str:
    """Why it was in quarantine, and how that ended."""
    if t.asked:
        return f"{t.reason}; it does not any more"
    if t.pending:
        return "repaired memory waited for a reset of the GPU, and does not any more"
    since = "it was reset since" if t.needs_reset and not t.away else "it answers again"
    return f"{(t.reason or '').replace(_LOST, 'it was lost: ', 1)}; {since}"


def _was_reset(t: DeviceTrust, device: DeviceSnapshot) -> bool:
    if t.away or t.pending:  # it came back, or nothing is pending any more
        return True
    return t.ecc_at is not None and device.ecc_uncorrected is not None and device.ecc_uncorrected < t.ecc_at
