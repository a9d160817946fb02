"""What the driver's Xid numbers mean for the work on a GPU, and what to do about them.

Source: NVIDIA's Xid catalogue; which ones blame the application follows the practice of the cluster device plugins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RESET = "drain the GPU, then reset it: nvidia-smi --gpu-reset -i {index}"
REBOOT = "reboot the machine; if it happens again, reseat or replace the GPU"


class Verdict(StrEnum):
    """``application``: the program is at fault, not the GPU. ``suspect``: worth a look at once. ``fatal``: do not use it."""

    APPLICATION = "application"
    SUSPECT = "suspect"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """One Xid: what happened, as the end of a sentence, and the remedy with ``{index}`` for the GPU."""

    verdict: Verdict
    what: str
    remedy: str = ""


_APPLICATION = {
    13: "a program caused a graphics engine exception",
    31: "a program touched GPU memory that is not its own",
    43: "a program's GPU channel was reset",
    45: "a program's GPU work was removed when it ended",
    68: "the video decoder of a program failed",
    109: "a program's context switch timed out",
}
_FATAL = {
    46: ("the GPU stopped processing", RESET),
    48: ("an uncorrectable memory error (double bit) occurred", RESET),
    61: ("the GPU's micro-controller hit a breakpoint", RESET),
    62: ("the GPU's micro-controller halted", RESET),
    64: ("broken memory could not be remapped", "replace the GPU: its spare memory rows are used up"),
    74: ("an NVLink failed", RESET),
    79: ("the GPU has fallen off the bus", REBOOT),
    95: ("an uncontained memory error hit every program on the GPU", RESET),
    110: ("the GPU reports a security fault", REBOOT),
    119: ("the GPU's system processor (GSP) does not answer", RESET),
    120: ("the GPU's system processor (GSP) failed", RESET),
    136: ("the GPU could not be recovered by its driver", RESET),
    140: ("an unrecovered memory error occurred", RESET),
    143: ("the GPU failed to initialise", REBOOT),
}
_SUSPECT = {
    63: "broken memory was or will be remapped",
    92: "the rate of corrected memory errors is high",
    94: "a contained memory error ended a program",
    154: "the driver asks for a recovery action",
}


def meaning(xid: int, text: str = "") -> XidMeaning:
    """What ``xid`` says about the GPU. An unknown one is suspect: looked into, not held against the GPU."""
    if xid in _APPLICATION:
        return XidMeaning(Verdict.APPLICATION, _APPLICATION[xid])
    if xid in _FATAL:
        return XidMeaning(Verdict.FATAL, *_FATAL[xid])
    if xid == 154 and "Required" in text:
        return XidMeaning(Verdict.FATAL, "the driver asks for a reset or a reboot", RESET)
    return XidMeaning(Verdict.SUSPECT, _SUSPECT.get(xid, "an error that this version does not know occurred"))
