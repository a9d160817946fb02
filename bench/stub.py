"""The smallest engine program, compiled once per run, and the pipe in which its processes say when they began."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.result import NotInstalledError

_FIRST_PORT, _LAST_PORT = 12_000, 30_000  # below the ports that the kernel hands out by itself


def compile_engine(directory: Path) -> Path:
    """The engine program in ``directory``. Raises NotInstalledError without a C compiler."""
    return compile_program(directory, "engine")


def compile_program(directory: Path, name: str) -> Path:
    """The program of ``name``.c in ``directory``. Raises NotInstalledError without a C compiler."""
    program = directory / name
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotInstalledError("a C compiler (cc or gcc) is not installed")
    if not program.exists():
        command = [compiler, "-O2", "-o", str(program), str(Path(__file__).with_name(f"{name}.c"))]
        linked = subprocess.run([*command, "-static"], capture_output=True, timeout=60, check=False)
        if linked.returncode != 0:  # no static libc here
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        program.chmod(0o755)
    return program


def free_ports(count: int, first: int = _FIRST_PORT) -> list[int]:
    """Ports that nothing holds now, from ``first`` up."""
    found: list[int] = []
    for port in range(first, _LAST_PORT):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"cannot find {count} free ports from {first} to {_LAST_PORT}")


@dataclass(frozen=True, slots=True)
class Began:
    """A process, and when it executed its first instruction (CLOCK_MONOTONIC)."""

    pid: int
    at_ns: int


class Stamps:
    """What the engines wrote into the pipe, by name; the newest launch of each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        path.chmod(0o666)  # engines run as another user
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""
        self.latest: dict[str, Began] = {}

    def read(self, timeout_s: float) -> None:
        """Take what is there, waiting for it at most ``timeout_s``."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return
        *lines, self._rest = (self._rest + os.read(self._fd, 65536)).split(b"\n")
        for line in lines:
            name, pid, at_ns = line.decode().split()
            self.latest[name] = Began(int(pid), int(at_ns))

    def next_after(self, name: str, old: Began | None, timeout_s: float = 30.0) -> Began:
        """The launch of ``name`` that follows ``old``. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while (found := self.latest.get(name)) == old or found is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} did not start within {timeout_s:g} s")
            self.read(0.5)
        return found

    def close(self) -> None:
        os.close(self._fd)
        self.path.unlink()


@contextlib.contextmanager
def stamps(path: Path) -> Iterator[Stamps]:
    """The pipe, for the time of one row."""
    pipe = Stamps(path)
    try:
        yield pipe
    finally:
        pipe.close()
