"""The fork server: takes sockets from the daemon, forks a shim for each (DESIGN §4).

Run as ``python -I -S forkserver.py FD``. It stays small, single-threaded and without state, so that forking is
safe and cheap; if it dies, the daemon starts another one, and the shims never notice. It ends when the daemon's
end of its socket closes.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn


def make_package_importable() -> None:
    """Let ``pool_managerd.runtime`` be imported without running the packages' ``__init__``, which load a lot."""
    here = os.path.dirname(os.path.abspath(__file__))
    for name, path in (("pool_managerd", os.path.dirname(here)), ("pool_managerd.runtime", here)):
        package: Any = type(sys)(name)
        package.__path__ = [path]
        sys.modules[name] = package


class ForkServer:
    """Forks a shim for every socket that arrives, until the daemon is gone.

    It is a subreaper: what a shim that was killed leaves behind comes to it, whatever session, title or environment
    that has, and is killed at once. Nothing else becomes its child.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._shims: set[int] = set()
        self._wakeup, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the poll

    def serve(self) -> None:
        """Until the daemon's end of the socket closes."""
        poll = select.poll()
        for fd in (self._control.fileno(), self._wakeup):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wakeup in ready:
                os.read(self._wakeup, 4096)
                self._clear_away()
            if self._control.fileno() in ready:
                data, fds, _, _ = socket.recv_fds(self._control, 1, 1, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    return
                for fd in fds:
                    with socket.socket(fileno=fd) as channel:
                        self._fork(channel)

    def _fork(self, channel: socket.socket) -> None:
        from pool_managerd.runtime import shim, wire

        try:
            pid = os.fork()
        except OSError as error:
            channel.send(wire.encode({"ok": False, "step": "fork", "errno": error.errno}))
            return
        if pid == 0:
            self._control.close()
            _become_shim(channel, shim)
        self._shims.add(pid)

    def _clear_away(self) -> None:
        """Collect who ended, and kill what a dead shim left; each of those deaths brings us here again."""
        from pool_managerd.runtime import procfs

        with suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._shims.discard(pid)
        for pid in procfs.children(os.getpid()):
            if pid not in self._shims:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)  # a child of ours that is not reaped: the pid is still its own


def _become_shim(channel: socket.socket, shim: Any) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        shim.run(channel)
    except BaseException:  # noqa: BLE001 - the boundary of this process: it must not return into the fork server
        import traceback

        traceback.print_exc()  # to the pipe that the daemon reads when something is lost
        os._exit(1)
    os._exit(0)


def main() -> None:
    make_package_importable()
    gc.disable()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    from pool_managerd.runtime import confine, shim, wire  # noqa: F401 - the shim is there before the first order

    confine.set_name(wire.FORKSERVER_NAME)
    confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    confine.prctl(confine.PR_SET_DUMPABLE, 0)  # who shares our uid gets at neither us nor the shims
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = ForkServer(control)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    control.send(b"R")
    server.serve()


if __name__ == "__main__":
    main()
