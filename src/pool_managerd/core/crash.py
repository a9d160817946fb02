"""What ended an engine, in a word: the class of a crash decides what follows it, and labels it for machines."""

from __future__ import annotations

import signal as signals
from enum import StrEnum


class CrashClass(StrEnum):
    """The value is the label in metrics (``crash_reason``), logs and reports (SPEC §8.5)."""

    GRACEFUL = "graceful"
    PROCESS_EXIT = "process_exit"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out_of_memory"
    """The kernel's OOM killer ended it."""
    OOM_STORM = "oom_storm"
    """It ran out of memory, and had done so again and again within a minute."""
    VRAM_OOM = "vram_oom"
    CUDA = "cuda"
    DRIVER_RESET = "driver_reset"
    ECC = "ecc"
    DRIVER_MISMATCH = "driver_mismatch"
    HEALTH_FAILURE = "health_failure"
    """It ran, and was not or no longer healthy."""
    HUNG = "hung"
    """It answered its health probes while its work stood still, or nothing in it moved at all."""
    PORT_CONFLICT = "port_conflict"
    BAD_MODEL = "bad_model"
    BAD_FLAGS = "bad_flags"
    MISSING_LIBRARY = "missing_library"
    PERMISSION = "permission"
    ILLEGAL_INSTRUCTION = "illegal_instruction"
    NOT_STARTED = "not_started"
    """The start never came as far as a process."""
    UNKNOWN = "unknown"
    """How it ended is not known: its exit record was lost."""

    @property
    def deterministic(self) -> bool:
        """Another start of the same would end the same way."""
        return self in _DETERMINISTIC

    @property
    def cuda(self) -> bool:
        """A GPU's or its driver's fault: counted by a breaker of its own, and waited for longer (SPEC §8.3)."""
        return self in _CUDA

    @property
    def memory(self) -> bool:
        """It ran out of memory, of the machine or of a GPU."""
        return self in _MEMORY


_DETERMINISTIC = frozenset({
    CrashClass.BAD_FLAGS, CrashClass.BAD_MODEL, CrashClass.MISSING_LIBRARY, CrashClass.PERMISSION,
    CrashClass.ILLEGAL_INSTRUCTION,
})  # fmt: skip
_CUDA = frozenset({CrashClass.CUDA, CrashClass.DRIVER_RESET, CrashClass.ECC, CrashClass.DRIVER_MISMATCH})
_MEMORY = frozenset({CrashClass.OUT_OF_MEMORY, CrashClass.VRAM_OOM})


def signal_name(number: int | None) -> str | None:
    """``SIGSEGV`` for 11; ``signal 34`` where the system has no name; None for None."""
    if number is None:
        return None
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


def of_a_child(code: int | None) -> int | None:
    """The signal that a shell or another wrapper tells of with its own exit code, 128 and the number; None for any other code."""
    number = (code or 0) - 128
    return number if number in _ENDING else None


_ENDING = frozenset({
    signals.SIGHUP, signals.SIGINT, signals.SIGQUIT, signals.SIGILL, signals.SIGTRAP, signals.SIGABRT, signals.SIGBUS,
    signals.SIGFPE, signals.SIGKILL, signals.SIGSEGV, signals.SIGPIPE, signals.SIGALRM, signals.SIGTERM, signals.SIGSYS,
})  # fmt: skip
