"""The duty of process 1, where the daemon is the first process of a container: to collect what nobody else collects.

A small parent does that and nothing else, so that the daemon itself has only children of its own. It passes signals on and ends
as the daemon ends; all else in the container ends with it, as the kernel has it.
"""

from __future__ import annotations

import os
import signal
import sys

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def become_init() -> None:
    """As process 1: returns in a child, in which the daemon goes on. As any other process: does nothing."""
    if os.getpid() != 1:
        return
    waited = {*_PASSED_ON, signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waited)
    daemon = os.fork()
    if daemon == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    sys.exit(_collect(daemon, waited))


def _collect(daemon: int, waited: set[signal.Signals]) -> int:
    """Until the daemon has ended; its exit code, 128 and the signal's number for a signal."""
    while True:
        number = signal.sigwait(waited)
        if number != signal.SIGCHLD:
            os.kill(daemon, number)  # not collected yet, so the pid is still its own
            continue
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == daemon:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            if pid == 0:
                break
