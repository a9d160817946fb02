"""The fork server: takes sockets from the daemon, forks a shim for each (DESIGN §4).

Run as ``python -I -S forkserver.py FD``. It stays small, single-threaded and without state, so that forking is
safe and cheap; if it dies, the daemon starts another one, and the shims never notice. It ends when the daemon's
end of its socket closes.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from typing import Any, NoReturn


def _make_package_importable() -> None:
    """Let ``pool_managerd.runtime`` be imported without running the packages' ``__init__``, which load a lot."""
    here = os.path.dirname(os.path.abspath(__file__))
    for name, path in (("pool_managerd", os.path.dirname(here)), ("pool_managerd.runtime", here)):
        package: Any = type(sys)(name)
        package.__path__ = [path]
        sys.modules[name] = package


def serve(control: socket.socket) -> None:
    """Fork a shim for every socket that arrives, until the daemon is gone."""
    from pool_managerd.runtime import confine, shim, wire

    confine.set_name(wire.FORKSERVER_NAME)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the shims
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection in a fork would touch, and so copy, every page
    control.send(b"R")
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        for fd in fds:
            with socket.socket(fileno=fd) as channel:
                try:
                    pid = os.fork()
                except OSError as error:
                    channel.send(wire.encode({"ok": False, "step": "fork", "errno": error.errno}))
                    continue
                if pid == 0:
                    control.close()
                    _become_shim(channel, shim)


def _become_shim(channel: socket.socket, shim: Any) -> NoReturn:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        shim.run(channel)
    except BaseException:  # noqa: BLE001 - the boundary of this process: it must not return into the fork server
        import traceback

        traceback.print_exc()  # to the pipe that the daemon reads when something is lost
        os._exit(1)
    os._exit(0)


def main() -> None:
    _make_package_importable()
    gc.disable()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    serve(control)


if __name__ == "__main__":
    main()
