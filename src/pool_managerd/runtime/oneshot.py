"""Runs one program to its end, confined as an engine is, and tells what it printed. Stdlib only.

Run as ``python -I -S oneshot.py``: the order is one line of JSON on stdin, the answer one on stdout. Nothing of the
program outlives this process: it is its subreaper, and kills what is left at the end, at the deadline, when enough was
printed, and when stdin closes because the daemon died.
"""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from typing import Any

_MAX_ORDER_BYTES = 1 << 20


def main() -> None:
    from forkserver import make_package_importable  # type: ignore[import-not-found]

    make_package_importable()
    from pool_managerd.runtime import confine, reaper, removal

    confine.set_name("pm-probe")
    confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    confine.prctl(confine.PR_SET_DUMPABLE, 0)
    order = json.loads(sys.stdin.buffer.readline(_MAX_ORDER_BYTES))
    output, output_of_child = os.pipe2(os.O_CLOEXEC)
    status, status_of_child = os.pipe2(os.O_CLOEXEC)
    wakeup, wakeup_of_handler = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup_of_handler, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        confine.execute(confine.OneOrder(order), output=output_of_child, status=status_of_child, shim_pid=parent)
    os.close(output_of_child)
    os.close(status_of_child)
    failed = os.read(status, 256).decode("ascii", "replace")
    printed, ended = _collect(pid, output, order)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # not reaped yet, so the group is still the child's
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    reaper.kill_descendants(wakeup)
    if (temporary := order.get("temporary")) is not None:  # a daemon that died cannot do it
        removal.remove_temporary(*os.path.split(temporary))
    answer = {"output": base64.b64encode(printed).decode(), "code": code if ended else None, "failed": failed}
    os.write(1, json.dumps(answer).encode() + b"\n")


def _collect(pid: int, output: int, order: dict[str, Any]) -> tuple[bytes, bool]:
    """What was printed, and whether the program ended by itself."""
    os.set_blocking(output, False)
    pidfd, printed, until = os.pidfd_open(pid), bytearray(), time.monotonic() + order["timeout_s"]
    poll = select.poll()
    for fd in (pidfd, output, 0):
        poll.register(fd, select.POLLIN)
    ended = False
    while (left := until - time.monotonic()) > 0:
        ready = {fd for fd, _ in poll.poll(left * 1000 + 1)}
        if output in ready and not _read(output, printed, order["max_bytes"]):
            poll.unregister(output)
        if len(printed) >= order["max_bytes"]:
            break
        if pidfd in ready:
            _read(output, printed, order["max_bytes"])
            ended = True
            break
        if 0 in ready:
            break  # nobody waits for the answer any more
    return bytes(printed), ended


def _read(output: int, printed: bytearray, most: int) -> bool:
    """Everything that is there; False when the pipe has no writer any more."""
    with suppress(BlockingIOError):
        while len(printed) < most:
            data = os.read(output, min(65536, most - len(printed)))
            if not data:
                return False
            printed += data
    return True


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    main()
