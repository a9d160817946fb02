"""The gateway as several processes on one port. The one that begins them serves nobody: it keeps them running, and ends them.

Each has a listening socket of its own (SO_REUSEPORT), which is made here and outlives it: connections that come while one is
begun again wait for the next.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import structlog

from pool_managerd.core.narration import duration
from pool_managerd.gateway import beats, known_sessions, tally
from pool_managerd.gateway.common_memory import CommonMemory, shared
from pool_managerd.gateway.sharing import Common, holders
from pool_managerd.gateway.siblings import Siblings, new_name, socket_of

log = structlog.get_logger("pool_managerd.gateway")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONG_LIFE_S = 0.1, 30.0, 60.0
_BEGUN_S = 5.0
_UNHEARD_S = 0.25
"""Connections wait no longer than this for a worker that is begun again."""
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Worker:
    """``number`` of ``of``; ``gateway`` is the pid of the process that began it, ``name`` that of its siblings' sockets. The rest
    are descriptors: where clients come in, where siblings ask, and the memory of all.
    """

    number: int
    of: int
    gateway: int
    name: str
    clients: int
    asked: int
    tally: int
    sessions: int
    beats: int

    def to_argument(self) -> str:
        """For its command line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_argument(cls, text: str) -> Worker:
        """Raises ValueError or TypeError for what is none."""
        return cls(**json.loads(text))

    def common(self) -> Common:
        """What it has in common with its siblings."""
        return Common(
            tally.Tally(CommonMemory(tally.SIZE, self.tally), self.number),
            known_sessions.KnownSessions(CommonMemory(known_sessions.SIZE, self.sessions)),
            Siblings(self.name, self.number, self.of, socket.socket(fileno=self.asked)),
            holders(self.gateway, self.number), self.number, self.of, beats.Beats(CommonMemory(beats.SIZE, self.beats)),
        )  # fmt: skip


def read_orders(fd: int) -> str:
    """The configuration's text, which a worker is sent first; when ``fd`` ends, so has whoever began it. Raises EOFError."""
    return _exactly(fd, int.from_bytes(_exactly(fd, _LENGTH_BYTES), "little")).decode()


def _exactly(fd: int, size: int) -> bytes:
    pieces = b""
    while len(pieces) < size:
        piece = os.read(fd, size - len(pieces))
        if not piece:
            raise EOFError("whoever began this worker is gone")
        pieces += piece
    return pieces


@dataclass(frozen=True, slots=True)
class WorkerTimes:
    """How long a worker may be silent, from its first sign of life on and before that, and how long it may take to end after the
    first word and after the second. In seconds.
    """

    silent_s: float = 30.0
    begins_s: float = 120.0
    ends_s: float = 20.0
    ends_again_s: float = 2.0


class Workers:
    """``command`` begins one, with a word that says which; ``text`` is the configuration that all of them go by."""

    def __init__(
        self, command: Sequence[str], text: str, listeners: Sequence[socket.socket], times: WorkerTimes | None = None
    ) -> None:
        self._command, self._listeners, self._times = tuple(command), tuple(listeners), times or WorkerTimes()
        raw = text.encode()
        self._orders = len(raw).to_bytes(_LENGTH_BYTES, "little") + raw
        self._name = new_name()
        self._asked = [socket_of(self._name, number) for number in range(len(listeners))]
        self._memory = shared(tally.SIZE), shared(known_sessions.SIZE), shared(beats.SIZE)
        self._beats = beats.Beats(CommonMemory(beats.SIZE, self._memory[2]))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ending = asyncio.Event()
        self._killed_at = math.inf
        self._turns = asyncio.Semaphore(os.cpu_count() or 1)
        self._code = 0

    async def run(self) -> int:
        """Until all have ended, after SIGTERM or SIGINT; a second one ends what they still do at once. One that cannot even begin
        ends all: its exit code.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._end)
        if len(self._listeners) > (cores := os.cpu_count() or 1):
            log.warning(f"{len(self._listeners)} workers are more than the {cores} cores that they can run on", action="workers")
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in range(len(self._listeners)):
                    tasks.create_task(self._keep(worker))
        finally:
            self._close()
        log.info("The gateway stopped", action="stopped")
        return self._code

    def _close(self) -> None:
        for one in (*self._listeners, *self._asked):
            one.close()
        for memory in self._memory:
            os.close(memory)

    def _end(self) -> None:
        """Whoever has not ended in time is killed; after a second word that is soon."""
        again, now = self._ending.is_set(), time.monotonic()
        self._killed_at = min(self._killed_at, now + (self._times.ends_again_s if again else self._times.ends_s))
        self._ending.set()
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)

    async def _keep(self, worker: int) -> None:
        failures = 0
        while not self._ending.is_set():
            began = time.monotonic()
            process = await self._lived(worker)
            if process is None or self._ending.is_set():
                return
            lived_s = time.monotonic() - began
            if process.returncode > 0 and lived_s < _BEGUN_S and not failures:
                self._code = process.returncode
                self._end()
                return
            failures = 1 if lived_s > _LONG_LIFE_S else failures + 1
            wait_s = min(_FIRST_WAIT_S * 2 ** (failures - 1), _LONGEST_WAIT_S)
            _tell_end(worker, process.returncode, lived_s, wait_s)
            if wait_s > _UNHEARD_S:  # clients go to the others meanwhile; whoever is begun listens again
                with suppress(OSError):
                    self._listeners[worker].shutdown(socket.SHUT_RDWR)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ending.wait()

    async def _lived(self, worker: int) -> subprocess.Popen[bytes] | None:
        """One process, from its beginning, in its turn, to its end; None where all end first."""
        async with self._turns:
            if self._ending.is_set():
                return None
            self._beats.forget(worker)
            process = self._running[worker] = self._begin(worker)
            telling = asyncio.get_running_loop().run_in_executor(None, self._tell, process)
            ended = asyncio.create_task(_ended(process))
            await self._begun(worker, ended)
        await self._watched(worker, process, ended)
        await telling
        del self._running[worker]
        return process

    async def _begun(self, worker: int, ended: asyncio.Task[None]) -> None:
        """It serves, or will not soon."""
        until = time.monotonic() + _BEGUN_S
        while not (ended.done() or self._beats.last(worker) or time.monotonic() > until):
            await asyncio.wait({ended}, timeout=0.05)

    async def _watched(self, worker: int, process: subprocess.Popen[bytes], ended: asyncio.Task[None]) -> None:
        """Until it has ended; one that shows no sign of life is made to."""
        began = time.monotonic()
        while not ended.done():
            await asyncio.wait({ended}, timeout=min(1.0, max(0.01, self._killed_at - time.monotonic())))
            now, heard = time.monotonic(), self._beats.last(worker)
            silent_s = now - (heard or began)
            hangs = silent_s > (self._times.silent_s if heard else self._times.begins_s)
            if not ended.done() and (hangs or now >= self._killed_at):
                why = "does not end" if now >= self._killed_at else f"has not been heard of for {duration(silent_s)}"
                log.error(f"Worker {worker} of the gateway {why}: it is killed", action="worker_hangs", worker=worker)
                process.kill()
                await ended

    def _begin(self, worker: int) -> subprocess.Popen[bytes]:
        clients, asked = self._listeners[worker].fileno(), self._asked[worker].fileno()
        given = Worker(worker, len(self._listeners), os.getpid(), self._name, clients, asked, *self._memory)
        return subprocess.Popen(
            (*self._command, given.to_argument()), stdin=subprocess.PIPE, pass_fds=(clients, asked, *self._memory),
            process_group=0,  # what a terminal sends is for this process, which passes it on
        )  # fmt: skip

    def _tell(self, process: subprocess.Popen[bytes]) -> None:
        """The pipe stays open: its end is the end of this process."""
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write(self._orders)
                process.stdin.flush()


async def _ended(process: subprocess.Popen[bytes]) -> None:
    loop, over, pidfd = asyncio.get_running_loop(), asyncio.Event(), os.pidfd_open(process.pid)
    loop.add_reader(pidfd, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    process.wait()
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


def _tell_end(worker: int, code: int, lived_s: float, wait_s: float) -> None:
    how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
    log.error(
        f"Worker {worker} of the gateway {how} after {duration(lived_s)}; another one begins in {duration(wait_s)}",
        action="worker_ended", worker=worker, exit_code=code,
    )  # fmt: skip
