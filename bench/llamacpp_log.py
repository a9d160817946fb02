"""What llama-server says in its log that it allocated, to hold the estimate against.

It says so from ``--log-verbosity 4`` on; at its default of 3 the log tells nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_LINE_CHARS = 2_048
MAX_ALLOCATIONS = 4_096


@dataclass(frozen=True, slots=True)
class Allocation:
    """One buffer as logged: ``device`` is llama.cpp's name (CPU, CPU_Mapped, CUDA0, CUDA_Host …), ``kind`` model, KV, RS
    (recurrent state), output or compute.
    """

    device: str
    kind: str
    size_bytes: int

    @property
    def on_host(self) -> bool:
        return self.device.startswith("CPU") or self.device.split("[")[0].endswith(("_Host", "BLAS"))


@dataclass(frozen=True, slots=True)
class Allocations:
    """All that one launch said it allocated."""

    entries: tuple[Allocation, ...] = ()

    @property
    def gpu_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries if not entry.on_host)

    @property
    def host_bytes(self) -> int:
        """RAM, mapped files included."""
        return sum(entry.size_bytes for entry in self.entries if entry.on_host)

    def of(self, kind: str) -> int:
        return sum(entry.size_bytes for entry in self.entries if entry.kind == kind)

    def by_device(self) -> dict[str, int]:
        """Bytes by llama.cpp's device name, in the order of first mention."""
        found: dict[str, int] = {}
        for entry in self.entries:
            found[entry.device] = found.get(entry.device, 0) + entry.size_bytes
        return found


_BUFFER = re.compile(
    r"(?<=:)\s+(?P<device>[A-Za-z]\w*(?:\[[^\]\s]{1,80}\])?)\s+(?:(?P<kind>model|KV|RS|output|compute) )?buffer size ="
    r"\s+(?P<mib>\d{1,9}(?:\.\d{1,4})?) MiB"
)
_TRIAL = re.compile(r"print_info: no_alloc\s+= (?P<on>[01])\b")
_NEW_PROCESS = re.compile(r"(?:common_params_print_info|main): build\b")
_NEW_CONTEXT = "constructing llama_context"


def parse_allocations(log_lines: Iterable[str]) -> Allocations:
    """Buffers in an engine's log, old formats included; of several launches the last one's. Lines may be anything.

    The engine may load without allocating first, to see what fits: such a trial does not count. A compute buffer that is
    reserved again replaces the one before.
    """
    found: list[Allocation] = []
    computing: dict[str, int] = {}
    trial = False
    for line in log_lines:
        text = line[:MAX_LINE_CHARS]
        if _NEW_PROCESS.search(text):
            found, computing, trial = [], {}, False
        elif (told := _TRIAL.search(text)) is not None:
            trial = told["on"] == "1"
        elif _NEW_CONTEXT in text:
            computing = {}
        elif not trial and "buffer size =" in text and (buffer := _BUFFER.search(text)) and len(found) < MAX_ALLOCATIONS:
            size_bytes = int(float(buffer["mib"]) * (1 << 20))
            _note(found, computing, Allocation(buffer["device"], buffer["kind"] or "model", size_bytes))
    return Allocations(tuple(found))


def _note(found: list[Allocation], computing: dict[str, int], one: Allocation) -> None:
    if one.kind == "compute" and one.device in computing:
        found[computing[one.device]] = one
        return
    if one.kind == "compute":
        computing[one.device] = len(found)
    found.append(one)
