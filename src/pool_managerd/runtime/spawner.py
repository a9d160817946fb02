"""The daemon's side of the fork server: starts it, starts it again when it died, passes sockets to it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pool_managerd.errors import EngineError
from pool_managerd.runtime import forkserver
from pool_managerd.runtime.waiting import until_readable, until_writable

_SCRIPT = os.path.abspath(forkserver.__file__)
_START_SECONDS = 10.0
_HINT = "check the daemon's limits of open files and processes, and that its Python interpreter is in place"
_SEND_SECONDS = 10.0
_SPARE_SECONDS = 0.2  # the launch that took the last one has the processors first


class Spawner:
    """One fork server process. Losing it loses nothing: shims and engines go on, the next order starts another.

    One shim is forked in advance and waits for its order, once there was a first one: a restart does not wait for a fork.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._lock = asyncio.Lock()
        self._spare: socket.socket | None = None
        self._sparing: asyncio.TimerHandle | asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The fork server's pid while it runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the fork server unless it runs. Raises EngineError when it cannot be started."""
        async with self._lock:
            await self._ensure_running()

    async def close(self) -> None:
        """End the fork server; engines and their shims are left alone."""
        async with self._lock:
            if self._sparing is not None:
                self._sparing.cancel()
                self._sparing = None
            self._discard()

    async def open_channel(self) -> socket.socket:
        """A non-blocking socket whose other end is in a new shim, waiting for its order. Raises EngineError.

        End of file on it before any answer means that nothing was started.
        """
        async with self._lock:
            channel = self._take_spare() or await self._open_channel()
        if self._sparing is None:
            self._sparing = asyncio.get_running_loop().call_later(_SPARE_SECONDS, self._begin_sparing)
        return channel

    def _take_spare(self) -> socket.socket | None:
        """The shim that waits, unless its fork server is gone, which would look after what it leaves if it was killed."""
        spare, self._spare = self._spare, None
        if spare is None or (self._process is not None and self._process.poll() is None):
            return spare
        spare.close()
        return None

    def _begin_sparing(self) -> None:
        self._sparing = asyncio.get_running_loop().create_task(self._fork_spare())

    async def _fork_spare(self) -> None:
        try:
            async with self._lock:
                if self._spare is None:
                    self._spare = await self._open_channel()
        except EngineError:
            pass  # whoever needs one is told
        finally:
            self._sparing = None

    async def _open_channel(self) -> socket.socket:
        for _ in range(2):  # a fork server that died since the last order is noticed here
            await self._ensure_running()
            with _as_engine_error():
                ours, theirs = socket.socketpair()
            ours.setblocking(False)
            with theirs:
                try:
                    await self._pass(theirs)
                except OSError:  # a timeout too
                    ours.close()
                    self._discard()
                    continue
                except BaseException:
                    ours.close()
                    raise
            return ours
        raise EngineError("preload failed: cannot start a process: the fork server died twice", hint=_HINT, retriable=True)

    async def _pass(self, descriptor: socket.socket) -> None:
        control = self._control
        if control is None:
            raise ConnectionError("the fork server is gone")
        async with asyncio.timeout(_SEND_SECONDS):
            while True:
                try:
                    socket.send_fds(control, [b"F"], [descriptor.fileno()])
                    return
                except BlockingIOError:
                    await until_writable(control.fileno())

    async def _ensure_running(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._discard()
        with _as_engine_error():
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with _as_engine_error():
                    self._process = self._spawn(theirs.fileno())
            except EngineError:
                ours.close()
                raise
        ours.setblocking(False)
        self._control = ours
        if self._process.stderr is not None:
            os.set_blocking(self._process.stderr.fileno(), False)
        try:
            async with asyncio.timeout(_START_SECONDS):
                hello = await asyncio.get_running_loop().sock_recv(ours, 1)
        except OSError:  # a timeout too
            hello = b""
        if hello != b"R":
            said = self.stderr_tail()
            self._discard()
            raise EngineError(
                f"preload failed: cannot start the fork server with {self._python}",
                hint="the Python interpreter of the daemon must be able to run its own standard library",
                details={"stderr": said},
            )

    def _spawn(self, control: int) -> subprocess.Popen[bytes]:
        # An empty environment: the daemon's holds tokens, and /proc/PID/environ shows it to its own user.
        return subprocess.Popen(
            [self._python, "-I", "-S", _SCRIPT, str(control)],
            pass_fds=[control],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            cwd="/",
            env={},
        )

    def stderr_tail(self) -> str:
        """What the fork server and its shims wrote to stderr since the last call: nothing, unless there is a bug."""
        pipe = None if self._process is None else self._process.stderr
        if pipe is None:
            return ""
        try:
            return os.read(pipe.fileno(), 4096).decode("utf-8", "replace").strip()
        except BlockingIOError:
            return ""

    def _discard(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        if self._control is not None:
            self._control.close()  # its end of file tells the fork server to go
            self._control = None
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # it keeps no state, and may be stopped or stuck: waiting for it would block the loop
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@contextmanager
def _as_engine_error() -> Iterator[None]:
    """What the system refuses (descriptors, processes, the interpreter) as an error that can be tried again."""
    try:
        yield
    except OSError as error:
        raise EngineError(
            f"preload failed: cannot start a process: {error.strerror or error}", hint=_HINT, retriable=True
        ) from error


async def receive_answer(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One chunk with its descriptors, as soon as there is one; (b"", []) at end of file. The caller owns the fds."""
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(channel, 65536, 4, socket.MSG_CMSG_CLOEXEC)
            return data, list(fds)
        except BlockingIOError:
            await until_readable(channel.fileno())
        except ConnectionError:
            return b"", []
