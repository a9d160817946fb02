"""GPU errors in the kernel's log: ``NVRM: Xid`` lines. Runs in the worker: standard library only."""

from __future__ import annotations

import math
import os
import re
import select
from collections.abc import Generator
from pathlib import Path
from typing import Any

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})[^)]{0,32}\): (\d{1,5})\b,?\s*(.*)")
_RECORD = re.compile(r"(\d{1,10}),(\d{1,20}),[^;]*;(.*)", re.ASCII)
_READ_BYTES = 8192  # a record of /dev/kmsg is never longer; a shorter buffer would be refused
_MAX_LINE_BYTES = 65_536


def xid_of(line: str) -> dict[str, Any] | None:
    """The incident that a line of the log tells of. Lines that a program wrote into the log are not believed."""
    record = _RECORD.fullmatch(line)
    if record is not None:
        if int(record[1]) >> 3:  # the facility: 0 is the kernel itself, and only the kernel can claim it
            return None
        line = record[3]
    found = _XID.search(line)
    if found is None:
        return None
    return {"xid": int(found[2]), "source": "kernel_log", "pci_bus_id": found[1].lower(), "text": found[3][:400]}


def follow(path: Path, after: int | None = None) -> Generator[tuple[int | None, str]]:
    """Records that come after number ``after``, with their numbers: the kernel counts them from the boot on.

    Without ``after``: those that come from now on, and first of all the number of the last one that is there, with no words.
    A FIFO's lines have no numbers; a plain file has an end. Sleeps in poll(2). Raises OSError when it cannot be opened or read.
    """
    fifo = path.is_fifo()
    flags = os.O_RDWR if fifo else os.O_RDONLY  # a FIFO that we could write ourselves never ends
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    known, number = math.inf if after is None else after, None
    try:
        for line in _lines(fd):
            if line is None:
                if known == math.inf:
                    known = -1 if number is None else number
                    if number is not None:
                        yield number, ""
                continue
            number = _number_of(line, number)
            if fifo or (number is not None and number > known):
                yield number, line
    finally:
        os.close(fd)


def _number_of(line: str, before: int | None) -> int | None:
    """A line that begins no record goes on with the one ``before``."""
    record = _RECORD.fullmatch(line)
    return before if record is None else int(record[2])


def _lines(fd: int) -> Generator[str | None]:
    """From the oldest that is left; None each time that there is no more for now."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    rest = b""
    while True:
        try:
            chunk = os.read(fd, _READ_BYTES)
        except BrokenPipeError:  # the log overran us; the next read goes on after the gap
            continue
        except BlockingIOError:
            yield None
            poll.poll(60_000)
            continue
        if not chunk:  # no log: a file's end, or /dev/null
            yield None
            return
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[-_MAX_LINE_BYTES:]
        yield from (line.decode(errors="replace") for line in lines)
