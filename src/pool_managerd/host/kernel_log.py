"""GPU errors in the kernel's log: ``NVRM: Xid`` lines. Runs in the worker: standard library only."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})[^)]*\): (\d{1,5})\b,?\s*(.*)")
_RECORD = re.compile(r"(\d+),\d+,[^;]*;(.*)")
_READ_BYTES = 8192  # a record of /dev/kmsg is never longer; a shorter buffer would be refused
_MAX_LINE_BYTES = 65_536


def xid_of(line: str) -> dict[str, Any] | None:
    """The incident that a line of the log tells of. Lines that a program wrote into the log are not believed."""
    record = _RECORD.fullmatch(line)
    if record is not None:
        if int(record[1]) >> 3:  # the facility: 0 is the kernel itself, and only the kernel can claim it
            return None
        line = record[2]
    found = _XID.search(line)
    if found is None:
        return None
    return {"xid": int(found[2]), "source": "kernel_log", "pci_bus_id": found[1].lower(), "text": found[3][:400]}


def follow(path: Path) -> Generator[str, None, None]:
    """Lines written from now on, a FIFO's too; a plain file has none. Sleeps in poll(2).

    Raises OSError when it cannot be opened or read.
    """
    flags = os.O_RDWR if path.is_fifo() else os.O_RDONLY  # a FIFO that we could write ourselves never ends
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a FIFO has no end to go to
            os.lseek(fd, 0, os.SEEK_END)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        rest = b""
        while True:
            poll.poll(60_000)
            try:
                chunk = os.read(fd, _READ_BYTES)
            except (BlockingIOError, BrokenPipeError):  # EPIPE: the log overran us; the next read goes on after the gap
                continue
            if not chunk:  # no log: a file's end, or /dev/null
                return
            *lines, rest = (rest + chunk).split(b"\n")
            rest = rest[-_MAX_LINE_BYTES:]
            yield from (line.decode(errors="replace") for line in lines)
    finally:
        os.close(fd)
