"""Ways to bring faults about that need tools or rights; each skips the test with the reason where it cannot."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAKE_ENGINE, free_port, wait_until
from tests.faults.watched import Watched

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def strace(*injections: str, files: tuple[Path, ...] = ()) -> tuple[str, ...]:
    """What to put before a command: it and all its threads run with these faults injected. ``files``: only on these."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("strace is not installed")
    if subprocess.run([program, "-o", "/dev/null", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("strace may not trace here")
    wanted = [word for path in files for word in ("-P", str(path))]
    return (program, "-f", "-qq", "-o", "/dev/null", *wanted, *(word for one in injections for word in ("-e", f"inject={one}")))


def of_its_own(code: str, *flags: str, port: int | None = None, **fields: Any) -> dict[str, Any]:
    """The scripted engine behind ``code``, which runs before it and may change ``fake_engine``."""
    port = port or free_port()
    whole = (
        f"import sys; sys.path.insert(0, {str(FAKE_ENGINE.parent)!r}); import fake_engine, os, time, threading\n{code}\n"
        "fake_engine.FakeEngine(fake_engine.options(sys.argv[1:])).run()\n"
    )
    return {"binary_path": sys.executable, "flags": ["-I", "-c", whole, "--port", str(port), *flags], "port": port, **fields}


@contextmanager
def no_more_files(pid: int) -> Iterator[None]:
    """Inside the block the process cannot open one more file or socket."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network of its own with nothing but loopback."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if libc.unshare(_CLONE_NEWNET) != 0:
        os.close(here)
        pytest.skip("no network namespace can be made here")
    try:
        with socket.socket() as any_socket:
            asked = struct.pack("16sh22x", b"lo", 0)
            flags = struct.unpack("16sh22x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, asked))[1]
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))
        yield
    finally:
        libc.setns(here, _CLONE_NEWNET)
        os.close(here)


@contextmanager
def cgroup(controller: str, **values: int) -> Iterator[Path]:
    """A cgroup (v1) with these settings; what is in it at the end goes back to the root."""
    group = Path(f"/sys/fs/cgroup/{controller}/pool-managerd-faults-{os.getpid()}-{time.monotonic_ns()}")
    try:
        group.mkdir()
        for name, value in values.items():
            (group / f"{controller}.{name}").write_text(str(value))
    except OSError as problem:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup (v1) with {values} can be made here: {problem}")
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(pid)
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the group to be empty", 5)
        group.rmdir()


def with_pid(pid: int, argv: list[str], tries: int = 200) -> subprocess.Popen[bytes]:
    """Start ``argv`` as the process ``pid``, which must be free."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(tries):
        try:
            last.write_text(str(pid - 1))
        except OSError as problem:
            pytest.skip(f"the next pid cannot be chosen here: {problem}")
        started = subprocess.Popen(argv)
        if started.pid == pid:
            return started
        started.kill()
        started.wait(10)
    pytest.skip(f"others took pid {pid} again and again")


def build(source: str, folder: Path, name: str) -> Path:
    """A shared library from C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (folder / f"{name}.c").write_text(source)
    library = folder / f"{name}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / f"{name}.c"), "-ldl"], check=True)
    return library


def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPU so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def grandchildren(daemon: Watched, pool: str = "p") -> list[int]:
    """Those that the scripted engine said it had started."""
    log = (daemon.run / f"engine-{pool}.log").read_text(errors="replace")
    return [int(line.split()[1]) for line in log.splitlines() if line.startswith("grandchild ")]


def leader_of(daemon: Watched) -> int:
    pid = daemon.leader()
    assert pid is not None
    return pid
