"""Downloads in processes of their own, to be killed.

``python -m tests.faults.download_child ENDPOINT TOKEN CA FOLDER REF DIGEST`` reads numbers, and forks a download for each: 0 runs
to its end, n is killed just before its nth operation on a file, where half of a write is done. It says the pid of each, what that
says at its end (how many operations it took, and where the model is), and its exit code. DIGEST may be empty. With LYING_LOCKS in
the environment every lock is had at once.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pool_managerd.models import download, part
from pool_managerd.models.buckets import BucketAccess
from tests.faults.download_sources import POLICY
from tests.models.fetching import fetching

EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"})
CALLS = ("pwritev", "write", "fsync", "fdatasync", "ftruncate", "fchmod")


class Countdown:
    """Operations on what is below ``folder``; SIGKILL before number ``last`` of them."""

    def __init__(self, folder: str, last: int) -> None:
        self.done, self._folder, self._last = 0, folder, last
        self._lock = threading.Lock()
        sys.addaudithook(self._heard)
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name), name))

    def _step(self, first: Callable[[], object] = lambda: None) -> None:
        with self._lock:
            self.done += 1
            if self.done == self._last:
                first()
                os.kill(os.getpid(), signal.SIGKILL)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and str(arguments[0]).startswith(self._folder):
            self._step()

    def _counted(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(fd: int, *arguments: Any) -> Any:
            self._step(lambda: real(fd, *_half(name, arguments)) if "write" in name else None)
            return real(fd, *arguments)

        return call


def _half(name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    data = b"".join(arguments[0]) if name == "pwritev" else bytes(arguments[0])
    some = data[: len(data) // 2]
    return ([some], *arguments[1:]) if name == "pwritev" else (some, *arguments[1:])


def main(endpoint: str, token: str, ca: str, folder: str, ref: str, digest: str) -> None:
    tls, buckets = ssl.create_default_context(cafile=ca), BucketAccess.of(os.environ)
    download.WRITE_BYTES, part.FLUSH_BYTES = 16_000, 100_000
    if os.environ.get("LYING_LOCKS"):
        fcntl.flock = lambda *_: None

    async def run(countdown: Countdown) -> None:
        async with fetching(Path(folder), endpoint, token=token, tls=tls, policy=POLICY, buckets=buckets) as f:
            found = await f.models.ensure_present(ref, digest or None)
        say(f"{countdown.done} {found.local_path}")

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                asyncio.run(run(Countdown(folder, int(line))))
            except Exception as problem:  # noqa: BLE001 - it is told, and the others go on
                say(f"failed: {problem!r}")
            os._exit(0)
        say(str(pid))
        say(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
