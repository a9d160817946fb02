"""The NVML worker as the daemon's loop sees it: a request, a reply, a pidfd. Nothing here waits in the loop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

_PROGRAM = Path(__file__).with_name("nvml_worker.py")
_CHUNK_BYTES = 65_536
_MAX_LINE_BYTES = 1 << 20
_STDERR_BYTES = 2048
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL")


class WorkerDied(Exception):
    """The worker ended, or spoke nonsense, before it answered; the words say how."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """``environment`` is added to the few variables that a worker needs; ``kmsg`` may be a FIFO instead."""

    environment: Mapping[str, str] | None = None
    kmsg: Path | None = None


class Workers:
    """Starts nvml_worker.py. One thread does it, and stays: a worker is killed when the thread that made it ends.

    ``options`` None: they are not known yet, and none is started. ``log_read`` is the last record of the kernel's log that a
    worker has read: the next one begins behind it.
    """

    def __init__(self, options: WorkerOptions | None = None) -> None:
        self.options = options
        self.log_read: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nvml-worker")

    async def start(self, on_incident: Callable[[Mapping[str, Any]], None]) -> Worker:
        """Raises OSError."""
        if self.options is None:
            raise OSError("the node is not open yet")
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self._thread, self._popen, self.options)
        try:
            return Worker(await asyncio.shield(starting), on_incident, self._on_log)
        except asyncio.CancelledError:
            starting.add_done_callback(_end_unwanted)
            raise

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _on_log(self, number: int) -> None:
        self.log_read = number

    def _popen(self, options: WorkerOptions) -> subprocess.Popen[bytes]:
        env = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        kmsg = str(options.kmsg or "/dev/kmsg")
        after = () if self.log_read is None else (str(self.log_read),)
        return subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), str(os.getpid()), kmsg, *after],
            env={**env, **(options.environment or {})}, cwd="/", start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        )  # fmt: skip


class Worker:
    """A started worker, read by the running loop."""

    def __init__(
        self, popen: subprocess.Popen[bytes], on_incident: Callable[[Mapping[str, Any]], None], on_log: Callable[[int], None]
    ) -> None:
        self._popen, self._on_incident, self._on_log = popen, on_incident, on_log
        self._loop = asyncio.get_running_loop()
        self._in, self._out, self._err = (cast("IO[bytes]", pipe) for pipe in (popen.stdin, popen.stdout, popen.stderr))
        self.pid, self.has_ended = popen.pid, False
        self._pidfd = os.pidfd_open(popen.pid)
        self._end = asyncio.Event()
        self._rest, self._said = b"", b""
        self._serial = 0
        self._awaited: dict[int, asyncio.Future[dict[str, Any]]] = {}
        for stream in (self._in, self._out, self._err):
            os.set_blocking(stream.fileno(), False)
        self._loop.add_reader(self._pidfd, self._on_end)
        self._loop.add_reader(self._out.fileno(), self._on_output)
        self._loop.add_reader(self._err.fileno(), self._on_words)

    async def scan(self, timeout_s: float) -> dict[str, Any]:
        """What it answers. Raises WorkerDied, or TimeoutError after ``timeout_s``."""
        if self.has_ended:
            raise WorkerDied(self._how_it_ended())
        self._serial += 1
        awaited: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._awaited[self._serial] = awaited
        try:
            os.write(self._in.fileno(), json.dumps({"id": self._serial}).encode() + b"\n")
            async with asyncio.timeout(timeout_s):
                return await awaited
        except BlockingIOError as error:  # it has not read what it was asked before
            raise TimeoutError from error
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise WorkerDied(f"it closed its input ({error.strerror})") from error
        finally:
            self._awaited.pop(self._serial, None)

    def kill(self) -> None:
        """SIGKILL, by pidfd: never another process that got the same pid."""
        if not self.has_ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def ended(self, timeout_s: float) -> bool:
        """True once it is dead and collected."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._end.wait()
        return self.has_ended

    def _on_output(self) -> None:
        chunk = self._read(self._out)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        try:
            if len(self._rest) > _MAX_LINE_BYTES:
                raise ValueError("a line without an end")
            for line in lines:
                self._take(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            self._rest = b""
            self._fail(f"it spoke nonsense: {error!r}"[:200])
            self.kill()

    def _take(self, message: dict[str, Any]) -> None:
        if "log" in message and (number := message.pop("log")) is not None:
            self._on_log(number)
        if "incident" in message:
            self._on_incident(message["incident"])
        if "incident" in message or not message:
            return
        awaited = self._awaited.get(message["id"])
        if awaited is not None and not awaited.done():
            awaited.set_result(message)

    def _on_words(self) -> None:
        self._said = (self._said + self._read(self._err))[-_STDERR_BYTES:]

    def _read(self, stream: IO[bytes]) -> bytes:
        try:
            chunk = os.read(stream.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return b""
        if not chunk:  # the end stays readable for ever
            self._loop.remove_reader(stream.fileno())
        return chunk

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._on_output()
        self._on_words()
        self._popen.poll()  # does not wait: it has ended
        for stream in (self._out, self._err):
            self._loop.remove_reader(stream.fileno())
        for stream in (self._in, self._out, self._err):
            stream.close()
        os.close(self._pidfd)
        self.has_ended = True
        self._end.set()
        self._fail(self._how_it_ended())

    def _how_it_ended(self) -> str:
        code = self._popen.returncode
        how = f"signal {signal.strsignal(-code) or -code}" if code is not None and code < 0 else f"code {code}"
        said = self._said.decode(errors="replace").strip()[-400:]
        return f"it ended with {how}" + (f", saying: {said}" if said else "")

    def _fail(self, why: str) -> None:
        for awaited in self._awaited.values():
            if not awaited.done():
                awaited.set_exception(WorkerDied(why))


def _end_unwanted(starting: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    """Its caller went away while it was being started."""
    if starting.cancelled() or starting.exception() is not None:
        return
    Worker(starting.result(), lambda _incident: None, lambda _number: None).kill()  # its pidfd collects it
