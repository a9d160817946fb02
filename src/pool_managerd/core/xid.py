"""What the driver's Xid numbers mean for the work on a GPU, and what to do about them.

Source: NVIDIA's Xid catalogue; which ones blame the application follows the practice of the cluster device plugins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

RESET_STEPS = ("pool-managerd devices release", "sudo nvidia-smi --gpu-reset -i {uuid}", "pool-managerd devices resume")
"""No GPU is reset while a process holds it open, and the daemon's own look at the GPUs is such a process."""
RESET = f"drain its pools, then: {'; '.join(RESET_STEPS)}"
_VOUCH = f"{RESET}; pool-managerd devices uncordon {{uuid}}"
"""Where nothing may show that it was reset: an operator says so."""
REBOOT = "reboot the machine; if it happens again, reseat or replace the GPU"


class Verdict(StrEnum):
    """``application``: the program is at fault, not the GPU. ``suspect``: worth a look at once. ``fatal``: do not use it."""

    APPLICATION = "application"
    SUSPECT = "suspect"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """One Xid: what happened, as the end of a sentence, and the remedy with ``{uuid}`` for the GPU: its index may move."""

    verdict: Verdict
    what: str
    remedy: str = ""


_RECOVERY_ACTION = 154
_APPLICATION = {
    13: "a program caused a graphics engine exception",
    31: "a program touched GPU memory that is not its own",
    43: "a program's GPU channel was reset",
    45: "a program's GPU work was removed when it ended",
    68: "the video decoder of a program failed",
    109: "a program's context switch timed out",
}
_FATAL = {
    46: ("the GPU stopped processing", _VOUCH),
    48: ("an uncorrectable memory error (double bit) occurred", _VOUCH),
    61: ("the GPU's micro-controller hit a breakpoint", _VOUCH),
    62: ("the GPU's micro-controller halted", _VOUCH),
    64: ("broken memory could not be remapped", "replace the GPU: its spare memory rows are used up"),
    74: ("an NVLink failed", _VOUCH),
    79: ("the GPU has fallen off the bus", REBOOT),
    95: ("an uncontained memory error hit every program on the GPU", _VOUCH),
    110: ("the GPU reports a security fault", REBOOT),
    119: ("the GPU's system processor (GSP) does not answer", _VOUCH),
    120: ("the GPU's system processor (GSP) failed", _VOUCH),
    136: ("the GPU could not be recovered by its driver", _VOUCH),
    140: ("an unrecovered memory error occurred", _VOUCH),
    143: ("the GPU failed to initialise", REBOOT),
}
_SUSPECT = {
    63: "broken memory was or will be remapped",
    92: "the rate of corrected memory errors is high",
    94: "a contained memory error ended a program",
    _RECOVERY_ACTION: "the recovery action that the driver asks for changed",
}
_RECOVERY = re.compile(r"\bto 0x([0-9a-fA-F]{1,8}) \(([^()]{1,60})\)")
"""What is asked for from now on: ``changed from 0x0 (None) to 0x1 (GPU Reset Required)``."""


def meaning(xid: int, text: str = "") -> XidMeaning:
    """What ``xid`` says about the GPU. An unknown one is suspect: looked into, not held against the GPU."""
    if xid in _APPLICATION:
        return XidMeaning(Verdict.APPLICATION, _APPLICATION[xid])
    if xid in _FATAL:
        return XidMeaning(Verdict.FATAL, *_FATAL[xid])
    wanted = _RECOVERY.search(text) if xid == _RECOVERY_ACTION else None
    if wanted is not None and int(wanted[1], 16) == 0:
        return XidMeaning(Verdict.SUSPECT, "the recovery that the driver asked for was done")
    if wanted is not None:
        remedy = REBOOT if "reboot" in wanted[2].lower() else _VOUCH
        return XidMeaning(Verdict.FATAL, f"the driver asks for a recovery action ({wanted[2]})", remedy)
    return XidMeaning(Verdict.SUSPECT, _SUSPECT.get(xid, "an error that this version does not know occurred"))
