"""What the driver's Xid numbers and recovery actions mean for the work on a GPU, and what to do about them.

Source: NVIDIA's Xid catalogue (its immediate actions: RESTART_APP blames the program, RESET_GPU and above the GPU, IGNORE
is a note). From driver 570 on the driver says itself which recovery it wants: its word comes as Xid 154 and can be asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

RESET_STEPS = ("pool-managerd devices release", "sudo nvidia-smi --gpu-reset -i {uuid}", "pool-managerd devices resume")
"""No GPU is reset while a process holds it open, and the daemon's own scan of the GPUs is such a process."""
RESET = f"drain its pools, then: {'; '.join(RESET_STEPS)}"
_RESET_AND_SAY_SO = f"{RESET}; pool-managerd devices uncordon {{uuid}}"
"""Where nothing may show that it was reset: an operator says so."""
REBOOT = "reboot the machine; if it happens again, reseat or replace the GPU"


class Verdict(StrEnum):
    """``application``: the program is at fault, not the GPU. ``suspect``: worth a scan at once. ``fatal``: do not use it."""

    APPLICATION = "application"
    SUSPECT = "suspect"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class XidMeaning:
    """One Xid: what happened, as the end of a sentence, and the remedy with ``{uuid}`` for the GPU: its index may move.

    ``lost``: programs on the GPU cannot go on; without it they may end by themselves. ``asked``: the driver asks for a
    recovery, and says so when it does not any more (``withdrawn``). ``contained``: the program that met a memory error was
    ended by the driver, all others go on.
    """

    verdict: Verdict
    what: str
    remedy: str = ""
    lost: bool = True
    asked: bool = False
    withdrawn: bool = False
    contained: bool = False


CONTAINED, _RECOVERY_ACTION = 94, 154
_APPLICATION = {
    8: "a program's GPU work stopped",
    11: "a program sent the GPU a broken command stream",
    13: "a program caused a graphics engine exception",
    31: "a program touched GPU memory that is not its own",
    32: "a program sent the GPU a broken command stream",
    43: "a program's GPU channel was reset",
    45: "a program's GPU work was removed when it ended",
    60: "the video processor of a program failed",
    68: "the video decoder of a program failed",
    69: "a program caused a graphics engine class error",
    80: "a program sent the GPU corrupted data",
    CONTAINED: "a contained memory error ended a program",
    109: "a program's context switch timed out",
    137: "a program made an illegal access over NVLink",
    **dict.fromkeys((39, 40, 41, 70, 71, 72, 75, 76, 77, 85, *range(126, 136)), "a program's copy on the GPU failed"),
    **dict.fromkeys((82, 83, 84, 86, 88, 89, *range(96, 106), 139, 142), "a program's video or image engine failed"),
}
_FATAL = {
    46: ("the GPU stopped processing", _RESET_AND_SAY_SO),
    48: ("an uncorrectable memory error (double bit) occurred", _RESET_AND_SAY_SO),
    61: ("the GPU's micro-controller hit a breakpoint", _RESET_AND_SAY_SO),
    62: ("the GPU's micro-controller halted", _RESET_AND_SAY_SO),
    64: ("broken memory could not be remapped", "replace the GPU: its spare memory rows are used up"),
    74: ("an NVLink failed", _RESET_AND_SAY_SO),
    79: ("the GPU has fallen off the bus", REBOOT),
    95: ("an uncontained memory error hit every program on the GPU", _RESET_AND_SAY_SO),
    110: ("the GPU reports a security fault", REBOOT),
    119: ("the GPU's system processor (GSP) does not answer", _RESET_AND_SAY_SO),
    120: ("the GPU's system processor (GSP) failed", _RESET_AND_SAY_SO),
    136: ("an NVLink could not be trained", _RESET_AND_SAY_SO),
    140: ("an unrecovered memory error occurred", _RESET_AND_SAY_SO),
    143: ("the GPU failed to initialise", REBOOT),
    158: ("the GPU met a fatal timeout", _RESET_AND_SAY_SO),
    167: ("the GPU met a fatal timeout on the PCIe bus", REBOOT),
    173: ("the link between processor and GPU failed", REBOOT),
}
_NVLINK_5 = {144: "SAW", 145: "RLW", 146: "TLW", 147: "TREX", 148: "NVLPW_CTRL", 149: "NETIR", 150: "MSE"}
"""Blackwell's links: their text says whether it is fatal. Where only NVML tells of it, NETIR means that a link went down."""
_SUSPECT = {
    63: "broken memory was or will be remapped",
    92: "the rate of corrected memory errors is high",
    121: "corrected errors on the link between processor and GPU",
    141: "a fast path of CUDA failed",
    151: "the rotation of the GPU's keys failed",
    _RECOVERY_ACTION: "the recovery action that the driver asks for changed",
    155: "an NVLink went down as software asked for",
    156: "broken memory will be replaced at the next reset",
    157: "broken memory could not be replaced: nothing is left to replace it with",
    159: "an error on the link between processor and GPU",
    160: "a broken memory channel will be replaced at the next reset",
    161: "a broken memory channel could not be replaced",
    **dict.fromkeys((162, 163, 164, 165), "the GPU's power smoothing changed"),
    **dict.fromkeys((166, 170), "an error on an encrypted NVLink"),
    168: "errors in the GPU's protected memory reduce its capacity",
    169: "the GPU's security processor halted",
    171: "the uncorrectable memory error was in DRAM",
    172: "the uncorrectable memory error was in SRAM",
}
_RECOVERY = re.compile(r"\bto 0x([0-9a-fA-F]{1,8}) \(([^()]{1,60})\)")
"""What is asked for from now on: ``changed from 0x0 (None) to 0x1 (GPU Reset Required)``."""
_FATAL_ACTIONS = {
    1: ("GPU reset", _RESET_AND_SAY_SO, True), 2: ("node reboot", REBOOT, True), 4: ("drain and reset", _RESET_AND_SAY_SO, False),
    6: ("bus reset", REBOOT, True), 7: ("system reboot", REBOOT, True),
}  # fmt: skip
"""By NVML's numbers: what, the remedy, and whether what runs there cannot go on."""
_OTHER_ACTIONS = {3: "drain of peer-to-peer work", 5: "recovery of the IMEX domain"}
"""Work on one GPU alone is not touched by these."""


def meaning(xid: int, text: str = "") -> XidMeaning:
    """What ``xid`` says about the GPU. An unknown one is suspect: looked into, not held against the GPU."""
    if xid in _APPLICATION:
        return XidMeaning(Verdict.APPLICATION, _APPLICATION[xid], contained=xid == CONTAINED)
    if xid in _FATAL:
        return XidMeaning(Verdict.FATAL, *_FATAL[xid])
    if xid in _NVLINK_5:
        fatal = re.search(r"\bfatal\b", text, re.IGNORECASE) is not None or (xid == 149 and not text)
        what = f"an NVLink failed ({_NVLINK_5[xid]})" if fatal else f"an NVLink reports an error ({_NVLINK_5[xid]})"
        return XidMeaning(Verdict.FATAL, what, _RESET_AND_SAY_SO) if fatal else XidMeaning(Verdict.SUSPECT, what)
    wanted = _RECOVERY.search(text) if xid == _RECOVERY_ACTION else None
    if wanted is not None:
        return recovery(int(wanted[1], 16), wanted[2])
    return XidMeaning(Verdict.SUSPECT, _SUSPECT.get(xid, "an error that this version does not know occurred"))


def recovery(action: int, words: str = "") -> XidMeaning:
    """What the driver's recovery ``action`` (NVML's numbers, ``words`` its own) says about the GPU."""
    if action == 0:
        return XidMeaning(Verdict.SUSPECT, "the driver asks for no recovery any more", withdrawn=True)
    if action not in _FATAL_ACTIONS:
        what = words or _OTHER_ACTIONS.get(action, f"action {action}")
        return XidMeaning(Verdict.SUSPECT, f"the driver asks for a recovery that concerns several GPUs ({what})", withdrawn=True)
    what, remedy, lost = _FATAL_ACTIONS[action]
    return XidMeaning(Verdict.FATAL, f"the driver asks for a recovery ({words or what})", remedy, lost=lost, asked=True)
