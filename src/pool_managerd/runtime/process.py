"""One running engine as the daemon sees it: who it is, when it ends, how it ended, and how to stop it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass, replace

from pool_managerd.core.artifacts import ExitRecord
from pool_managerd.errors import NodeError
from pool_managerd.runtime import procfs, wire
from pool_managerd.runtime.identity import Identity
from pool_managerd.runtime.records import InstanceRecords, parse_exit
from pool_managerd.runtime.strays import kill_strays
from pool_managerd.runtime.waiting import send

# The shim gives leftovers 5 s to die and then writes its record. Beyond this it is stuck, or stopped by somebody.
_SHIM_OVERDUE_SECONDS = 8.0
_ENGINE_OVERDUE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Connection:
    """The daemon's hold on an engine: the shim's channel and pidfds of engine and shim. All are closed together.

    The channel is the daemon's that gave the order; another one, that found the engine running, speaks to the shim by signals.
    A pidfd is None when its process has ended already.
    """

    channel: socket.socket | None
    engine_pidfd: int | None
    shim_pidfd: int | None

    def close(self) -> None:
        """Give up the hold. The engine goes on."""
        if self.channel is not None:
            self.channel.close()
        for fd in (self.engine_pidfd, self.shim_pidfd):
            if fd is not None:
                os.close(fd)


class EngineProcess:
    """Made by ``Launcher.launch``, or found by ``Adoption``, in a running loop. ``wait`` (or ``close``) frees the descriptors.

    ``isolation`` is what the kernel says about the running engine; ``notice`` is a sentence for the operator when
    that is less than the default, else None.
    """

    def __init__(
        self,
        identity: Identity,
        connection: Connection,
        records: InstanceRecords,
        *,
        isolation: str,
        notice: str | None = None,
    ) -> None:
        self.identity = identity
        self.pid = identity.pid
        self.nonce = identity.nonce
        self.shim_pid = identity.shim_pid
        self.isolation = isolation
        self.notice = notice
        self._records = records
        self._connection: Connection | None = connection
        self._dead = asyncio.Event()
        self._shim_gone = asyncio.Event()
        self._told: ExitRecord | None = None
        self._over = asyncio.Event()
        """How it ended is known, or will not be told any more."""
        self._asked_to_end = False
        self._seen: int | None = None
        """The wait status that the kernel showed before its shim collected it, should that tell of nothing any more."""
        self._frames = wire.Decoder()
        self._ending: asyncio.Task[ExitRecord] | None = None
        loop = self._loop = asyncio.get_running_loop()
        self._overdue: asyncio.TimerHandle | None = None
        for pidfd, on_end in ((connection.engine_pidfd, self._on_engine_end), (connection.shim_pidfd, self._on_shim_end)):
            if pidfd is None:
                on_end()
            else:
                loop.add_reader(pidfd, on_end)

    def given(self) -> tuple[dict[str, str], list[str]]:
        """Environment and command line, as the running engine still shows them; empty when it has ended or erased them."""
        if not self.identity.engine_runs():
            return {}, []
        return procfs.environment(self.pid), procfs.command_line(self.pid)

    async def wait_dead(self) -> None:
        """Return as soon as the engine process has ended; its outcome may not be known yet."""
        await self._dead.wait()

    async def wait(self) -> ExitRecord:
        """Return how the engine ended, once nothing of it runs. Any number of callers, before or after.

        Of one that ended unasked the shim may still remove temporary files: the next launch has others, and does not wait.

        Raises RuntimeError after ``close``.

        When the shim itself was lost, the engine is killed, what it left behind too, and the record is unknown; of an engine that
        had ended before, it is what the kernel showed then.
        """
        if self._ending is None:
            if self._connection is None:
                raise RuntimeError("cannot wait for an engine that is no longer watched")
            self._ending = self._loop.create_task(self._end())
        return await asyncio.shield(self._ending)

    def stop(self, grace_ms: int) -> None:
        """Start the stop ladder: SIGTERM to the group, after ``grace_ms`` SIGKILL, to all descendants too.

        The shim carries it out, so it goes on if the daemon dies. Asked again, it can only get shorter.
        """
        self._asked_to_end = True
        self._tell({"op": "stop", "grace_ms": max(0, grace_ms)}, signal.SIGTERM)

    def kill(self) -> None:
        """Stop at once, even when the shim does not react."""
        self._asked_to_end = True
        self._tell({"op": "kill"}, signal.SIGUSR1)
        self._send_engine(signal.SIGKILL)

    def close(self) -> None:
        """Stop watching without touching the engine: it goes on under its shim."""
        if self._ending is not None:
            self._ending.cancel()
        self._release()

    def _tell(self, message: dict[str, object], otherwise: signal.Signals) -> None:
        if self._connection is None or self._shim_gone.is_set():
            return
        try:
            if self._connection.channel is None:
                raise ConnectionError
            self._connection.channel.send(wire.encode(message))
        except OSError:
            self._send_shim(otherwise)

    def _on_engine_end(self) -> None:
        if self.identity.shim_runs():  # else its end is ours, or the kernel's answer to the shim's
            self._seen = procfs.wait_status(self.pid, self.identity.start_ticks)
        if self._connection is not None:
            if self._connection.engine_pidfd is not None:
                self._loop.remove_reader(self._connection.engine_pidfd)
            if self._connection.channel is not None:
                self._loop.add_reader(self._connection.channel.fileno(), self._on_frame)
            self._overdue = self._loop.call_later(_SHIM_OVERDUE_SECONDS, self._send_shim, signal.SIGKILL)
        self._dead.set()

    def _on_frame(self) -> None:
        """The shim tells how it ended, when its record is written and all processes are gone."""
        channel = None if self._connection is None else self._connection.channel
        if channel is None:
            return
        try:
            data = channel.recv(65536)
            exits = [parse_exit(frame["exit"]) for frame in self._frames.feed(data) if "exit" in frame]
        except BlockingIOError:
            return
        except (OSError, wire.WireError, TypeError):
            data, exits = b"", []
        if not data:
            self._loop.remove_reader(channel.fileno())  # the rest is in the record, or nowhere
        if exits:
            self._told = exits[0]
            if not self._told.stopped_by_us:  # a stop is over when its shim is
                self._over.set()

    def _on_shim_end(self) -> None:
        if self._connection is not None and self._connection.shim_pidfd is not None:
            self._loop.remove_reader(self._connection.shim_pidfd)
        if self._overdue is not None:
            self._overdue.cancel()
        self._on_frame()  # it may have had no disk to write the record to
        self._shim_gone.set()
        self._over.set()

    def _send_engine(self, number: signal.Signals) -> None:
        if self._connection is not None and self._connection.engine_pidfd is not None:
            send(self._connection.engine_pidfd, number)

    def _send_shim(self, number: signal.Signals) -> None:
        if self._connection is not None and self._connection.shim_pidfd is not None:
            send(self._connection.shim_pidfd, number)

    async def _end(self) -> ExitRecord:
        await self._over.wait()
        record = self._told or self._records.of(self.identity).exit
        if record is None:
            record = await self._end_without_shim()
        self._release()
        with suppress(NodeError):  # a broken disk must not cost the outcome
            self._records.forget(self.identity)  # at once: the next daemon would count this end again
        return record

    async def _end_without_shim(self) -> ExitRecord:
        self._send_engine(signal.SIGKILL)
        try:
            async with asyncio.timeout(_ENGINE_OVERDUE_SECONDS):
                await self._dead.wait()
        except TimeoutError:
            pass  # stuck in the kernel: nothing more can be done to it from here
        await kill_strays(self.identity, self._records.of(self.identity).descendants)
        if self._seen is None:
            return ExitRecord()
        code = os.waitstatus_to_exitcode(self._seen)
        record = ExitRecord(signal=-code) if code < 0 else ExitRecord(code)
        return replace(record, stopped_by_us=self._asked_to_end)

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if connection.channel is not None:
                self._loop.remove_reader(connection.channel.fileno())
            for pidfd in (connection.engine_pidfd, connection.shim_pidfd):
                if pidfd is not None:
                    self._loop.remove_reader(pidfd)
            connection.close()
        if self._overdue is not None:
            self._overdue.cancel()
