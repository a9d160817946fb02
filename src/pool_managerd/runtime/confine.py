"""What happens to an engine between fork and exec. Stdlib only; runs in the forked child of a shim.

The steps are ordered: what needs privileges comes before they are given up, and the parent-death signal comes once more
after the change of user, which clears it. Each step has a name, so that a failure can be told.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_CAPABILITY_VERSION_3 = 0x20080522
_MORE_LIKELY_OOM_VICTIM = b"500"

# What this process was given or Python changed, looked up once in the fork server, and what a shim changes.
_NOT_DEFAULT = {int(n) for n in signal.valid_signals() if signal.getsignal(n) not in (signal.SIG_DFL, None)} | {
    int(n) for n in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE)
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


def prctl(option: int, argument: int = 0) -> None:
    """prctl(2). Raises OSError."""
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def set_name(name: str) -> None:
    """The short name of this process, as ``ps -o comm`` shows it."""
    buffer = ctypes.create_string_buffer(name.encode())
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


class Orders(Protocol):
    """Where the forked child has its order from. ``descriptors`` are what it needs for that; the others are closed."""

    descriptors: Sequence[int]

    def take(self) -> dict[str, Any]:
        """The order, however long it takes. Does not return when there will be none."""
        ...

    def await_leave(self) -> None:
        """Return when it may be executed. Does not return when it must not be."""
        ...


class OneOrder:
    """For a child that is forked when all is ready."""

    descriptors: Sequence[int] = ()

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order

    def take(self) -> dict[str, Any]:
        return self._order

    def await_leave(self) -> None: ...


def execute(orders: Orders, *, output: int, status: int, shim_pid: int) -> NoReturn:
    """Become the engine that is ordered. Never returns: a failure goes to ``status`` as ``step:errno``.

    What needs no order is done before there is one.
    """
    step = "start"
    try:
        for step, action in _before(output, (status, *orders.descriptors), shim_pid):  # noqa: B007 - used after a failure
            action()
        step = "order"
        order = orders.take()
        for step, action in _after(order, shim_pid):  # noqa: B007
            action()
        orders.await_leave()
        step = "exec"
        os.execve(order["program"], order["argv"], order["env"])  # noqa: S606 - no shell is the point
    except OSError as error:
        os.write(status, f"{step}:{error.errno or 0}".encode())
    except BaseException as error:  # noqa: BLE001 - the boundary of this process: it must end here, whatever happened
        os.write(status, f"{step} ({type(error).__name__}):0".encode())
    os._exit(127)


def _before(output: int, kept: tuple[int, ...], shim_pid: int) -> list[tuple[str, Any]]:
    return [
        ("session", os.setsid),
        ("parent", lambda: _die_with(shim_pid)),
        ("signals", _reset_signals),
        ("limits", _be_modest),
        ("descriptors", lambda: _connect(output, kept)),
        ("capabilities", _drop_bounding_set),
    ]


def _after(order: dict[str, Any], shim_pid: int) -> list[tuple[str, Any]]:
    return [
        ("limits", lambda: _limit(order.get("limits", {}))),
        ("user", lambda: _change_user(order["credentials"])),
        ("capabilities", _drop_capabilities),
        ("no_new_privs", lambda: prctl(PR_SET_NO_NEW_PRIVS, 1)),
        ("parent", lambda: _die_with(shim_pid)),
        ("workdir", lambda: os.chdir(order["cwd"])),
    ]


def _be_modest() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of an engine holds prompts, and is huge
    os.umask(0o077)
    try:
        prctl(PR_SET_DUMPABLE, 1)  # the shim is not; without it this process may not write below its own /proc
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(_MORE_LIKELY_OOM_VICTIM)
        prctl(PR_SET_DUMPABLE, 0)  # until it has given up what the shim has
    except OSError:
        pass  # only a preference: without it the kernel chooses by size alone


def _limit(limits: dict[str, int]) -> None:
    for name, wanted in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        _, hardest = resource.getrlimit(number)
        limit = wanted if hardest == resource.RLIM_INFINITY else min(wanted, hardest)
        resource.setrlimit(number, (limit, limit))


def _connect(output: int, kept: tuple[int, ...]) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    first = 3  # the daemon's channel, which must have one end, and whatever reached the fork server uninvited
    for fd in (*sorted(kept), 1 << 20):
        os.closerange(first, fd)
        first = fd + 1


def _change_user(credentials: dict[str, Any] | None) -> None:
    if credentials is not None:
        os.setgroups(credentials["groups"])
        os.setresgid(credentials["gid"], credentials["gid"], credentials["gid"])
        os.setresuid(credentials["uid"], credentials["uid"], credentials["uid"])


def _drop_bounding_set() -> None:
    if os.geteuid() != 0:
        return
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            # EINVAL: past the last one this kernel knows. EPERM: root without CAP_SETPCAP; then no_new_privs
            # alone keeps exec from regaining what is dropped below, and the read-back says what is true.
            return


def _drop_capabilities() -> None:
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # fails only where there is no ambient set
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    if _libc.capset(header, none) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _die_with(shim_pid: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != shim_pid:  # it died before the signal was armed
        os._exit(127)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)  # the shim's
    for number in _NOT_DEFAULT:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
