"""The parent of one engine: starts it, keeps its output, stops it, cleans up after it, writes down how it ended.

Stdlib only, single-threaded, forked by the fork server. It outlives the daemon: its only ties are the control
channel, which may close at any time, and the files in the runtime directory. It stays outside the engine's
user and sandbox, so nothing the engine does can forge the exit record.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from pool_managerd.runtime import confine, procfs, reaper, removal, wire
from pool_managerd.runtime.child import Child
from pool_managerd.runtime.logfile import LogFile
from pool_managerd.runtime.oom import OomWatch
from pool_managerd.runtime.shim_record import ShimRecord

_ORDER_SECONDS = 10.0
_EXEC_SECONDS = 10.0
_READ_BYTES = 65536
_DRAIN_READS = 16  # the most that a pipe holds
_MOMENT_SECONDS = 1.5
_FOREVER_MS = 3_600_000.0


class StartFailedError(Exception):
    """The engine does not run: which step failed, and the errno."""

    def __init__(self, step: str, code: int) -> None:
        super().__init__(step, code)
        self.step = step
        self.code = code


def run(channel: socket.socket) -> None:
    """The whole life of a shim, from the order on ``channel`` to the exit record. Called in a fresh fork."""
    os.setsid()
    confine.prctl(confine.PR_SET_CHILD_SUBREAPER, 1)
    confine.set_name(wire.SHIM_NAME)
    child = None
    with suppress(OSError):  # too many processes now: it is tried again when there is an order
        child = Child.fork()
    waiting = select.poll()
    waiting.register(channel, select.POLLIN)
    waiting.poll()  # a spare shim waits for its order as long as there is somebody who could give it one
    frame = wire.receive(channel, _ORDER_SECONDS)
    if frame is None:
        return  # the daemon went away before it said what to start; the child goes with us
    if child is not None:
        child.prepare(frame)
    shim = Shim(channel, wire.decode(frame))
    try:
        shim.start(frame, child)
    except StartFailedError as failure:
        channel.sendall(wire.encode({"ok": False, "step": failure.step, "errno": failure.code}))
        removal.remove_temporary(shim.order["cwd"], shim.order["temporary"])
        return
    shim.supervise()
    shim.finish()


class Shim:
    """One engine, from fork to exit record."""

    def __init__(self, channel: socket.socket, order: dict[str, Any]) -> None:
        self._channel: socket.socket | None = channel
        self._decoder = wire.Decoder()
        self.order = order
        self._identity: dict[str, Any] = dict(order["identity"])
        self._engine = 0
        self._engine_pidfd = -1
        self._output = -1
        self._wakeup = -1
        self._poll = select.poll()
        self._kept = False
        self._stopping = False
        self._kill_at: float | None = None
        self._started_at_ms = 0
        self._started = 0.0
        self._running: dict[str, Any] = {}

    def start(self, frame: bytes, child: Child | None) -> None:
        """Have the engine executed, and answer the daemon. ``child`` was given ``frame``, the order. Raises StartFailedError."""
        step = "runtime_dir"
        try:
            self._open_files()
            step = "fork"
            self._handle_signals()
            if child is None or child.has_ended():
                child = Child.fork()
                child.prepare(frame)
            self._begin(child)
            step = "record"
            self._record.write(self._identity, self._running)
        except OSError as error:
            self._abandon(child)
            raise StartFailedError(step, error.errno or errno.EIO) from error
        self._await_exec(child)
        self._answer()

    def _open_files(self) -> None:
        self._record = ShimRecord(self.order["runtime_dir"], self.order["record_name"], self.order["launch"])
        self._log = LogFile(self._record.directory, **self.order["log"])
        try:
            self._log.open()
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EISDIR):
                raise StartFailedError("log", error.errno) from error  # something was planted there: refuse
            # A full or read-only disk costs the log, not the engine; it is tried again while running.

    def _handle_signals(self) -> None:
        self._wakeup, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the poll
        signal.signal(signal.SIGTERM, lambda *_: self._stop(self.order["grace_ms"]))
        signal.signal(signal.SIGUSR1, lambda *_: self._stop(0))
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)

    def _begin(self, child: Child) -> None:
        child.go()
        self._engine, self._engine_pidfd, self._output = child.pid, child.pidfd, child.output
        self._started_at_ms = time.time_ns() // 1_000_000
        self._started = time.monotonic()
        self._running = {"state": "running", "began_at": self._started}
        shim_pid = os.getpid()
        self._identity.update(
            pid=child.pid, start_ticks=child.start_ticks, shim_pid=shim_pid, shim_start_ticks=procfs.start_ticks(shim_pid) or 0
        )
        self._lineage = reaper.Lineage(shim_pid, child.pid)

    def _await_exec(self, child: Child) -> None:
        """Until it executes, or said which step failed."""
        report = child.failed_at(_EXEC_SECONDS)
        if report is None:
            report = f"exec:{errno.ETIMEDOUT}"
        if report:
            self._abandon(child)
            step, _, code = report.rpartition(":")
            raise StartFailedError(step, int(code))

    def _abandon(self, child: Child | None) -> None:
        if child is not None:
            child.end()
        if self._engine:
            self._engine = 0
            self._record.remove()

    def _answer(self) -> None:
        answer = wire.encode({"ok": True, **{key: self._identity[key] for key in wire.STARTED_KEYS}})
        own_pidfd = os.pidfd_open(os.getpid())
        channel = self._channel
        if channel is None:
            return
        try:
            # Small enough for an empty socket buffer: it never blocks and is never split.
            socket.send_fds(channel, [answer], [self._engine_pidfd, own_pidfd])
        except OSError:
            self._lose_channel()
        os.close(own_pidfd)

    def supervise(self) -> None:
        """Pump output and obey stop requests until the engine has ended."""
        self._oom = OomWatch(self._engine)
        for fd in (self._engine_pidfd, self._output, self._wakeup):
            self._poll.register(fd, select.POLLIN)
        if self._channel is not None:
            self._channel.setblocking(False)
            self._poll.register(self._channel, select.POLLIN)
        while self._engine_pidfd not in self._turn(self._milliseconds_to_kill()):
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._kill_at = None
                self._signal_group(signal.SIGKILL)

    def _turn(self, milliseconds: float) -> set[int]:
        """Wait for whatever comes first, and see to it. Returns the descriptors that were ready."""
        due = min(watch.milliseconds_to_look() for watch in (self._lineage, self._log))  # the others look when one of them does
        ready = {fd for fd, _ in self._poll.poll(min(milliseconds, due))}
        if self._output in ready and not self._pump():
            self._poll.unregister(self._output)
        if self._wakeup in ready:
            os.read(self._wakeup, 4096)
            reaper.reap_orphans(self._engine)
        if self._channel is not None and self._channel.fileno() in ready:
            self._obey()
        if self._engine_pidfd not in ready:  # what counts is what was before the end
            self._oom.look()
        self._log.look()
        self._record.look()
        if (found := self._lineage.look()) is not None:
            with suppress(OSError):  # a full disk: it is tried again when there are others
                self._record.write(self._identity, {**self._running, "descendants": found})
        return ready

    def _milliseconds_to_kill(self) -> float:
        return _FOREVER_MS if self._kill_at is None else max(0.0, (self._kill_at - time.monotonic()) * 1000 + 1)

    def _let_descendants_end(self) -> None:
        """They may clean up after it, as Python's resource tracker does: a moment, and no longer than the stop has."""
        until = time.monotonic() + _MOMENT_SECONDS
        self._poll.unregister(self._engine_pidfd)
        while reaper.has_living_children():
            if self._stopping:
                until = min(until, self._kill_at or 0.0)
            left = until - time.monotonic()
            if left <= 0:
                return
            self._turn(left * 1000)

    def _pump(self) -> bool:
        """Move one read's worth from pipe to log; False when the pipe has no writer any more."""
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return True
        if data:
            self._log.write(data)
        return bool(data)

    def _obey(self) -> None:
        if self._channel is None:
            return
        try:
            data = self._channel.recv(4096)
            frames = self._decoder.feed(data)
        except BlockingIOError:
            return
        except (OSError, wire.WireError):
            data, frames = b"", []
        for frame in frames:
            if frame.get("op") == "keep":
                self._kept = True
            elif frame.get("op") == "stop":
                self._stop(int(frame["grace_ms"]))
            elif frame.get("op") == "kill":
                self._stop(0)
        if not data:
            self._lose_channel()

    def _lose_channel(self) -> None:
        if self._channel is not None:
            with suppress(KeyError):
                self._poll.unregister(self._channel)
            self._channel.close()
            self._channel = None
        self._lineage.look_again_soon()
        if not self._kept:
            self._stop(0)  # the daemon never learnt of this engine: nobody would look after it

    def _stop(self, grace_ms: int) -> None:
        """The stop ladder; asked again, it can only get shorter."""
        now = time.monotonic()
        deadline = now + max(0, grace_ms) / 1000
        if grace_ms > 0 and not self._stopping:
            self._signal_group(signal.SIGTERM)
            self._signal_group(signal.SIGCONT)  # a stopped process would never see the SIGTERM
        if not self._stopping or (self._kill_at is not None and deadline < self._kill_at):
            self._kill_at = deadline
        self._stopping = True

    def _signal_group(self, number: int) -> None:
        # The engine leads its group and is not reaped yet, so neither its pid nor the group's id can be reused.
        if self._engine:
            try:
                os.killpg(self._engine, number)
            except ProcessLookupError:
                os.kill(self._engine, number)  # it has not reached its setsid yet
            except PermissionError:
                pass  # it changed its user, which no_new_privs forbids; the record will tell

    def finish(self) -> None:
        """After the engine's end: let its descendants end, kill what is left, empty the pipe, write the exit record."""
        ended_at_ms = time.time_ns() // 1_000_000
        uptime = time.monotonic() - self._started
        kills, scope = self._oom.kills()
        self._let_descendants_end()
        reaper.kill_all_but_trackers(self._wakeup)
        self._signal_group(signal.SIGKILL)
        _, status, usage = os.wait4(self._engine, 0)
        self._engine = 0
        leftovers = reaper.kill_descendants(self._wakeup)
        self._drain()
        self._obey()  # a stop request that crossed the engine's end
        self._log.close()
        code = os.waitstatus_to_exitcode(status)
        line = None if self._stopping else self._oom.line_about(self._lineage.pids())
        ending = {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "started_at_ms": self._started_at_ms,
            "ended_at_ms": ended_at_ms,
            "uptime_seconds": round(uptime, 3),
            "max_rss_bytes": usage.ru_maxrss * 1024,
            "oom_kills": kills,
            "oom_scope": scope,
            "oom_line": line,
            "stopped_by_us": self._stopping,
            "log_bytes_dropped": self._log.dropped_bytes,
        }
        removal.remove_shared_memory(self._identity.get("uid", 0))
        with suppress(OSError):  # a broken disk; a daemon that is there learns it all the same
            self._record.write(self._identity, {**self._running, "state": "exited", "exit": ending, "leftover_pids": leftovers})
        if self._channel is not None:
            with suppress(OSError):
                self._channel.send(wire.encode({"exit": ending}))
        removal.remove_temporary(self.order["cwd"], self.order["temporary"])

    def _drain(self) -> None:
        """What is in the pipe already; whoever else still holds its other end is not waited for."""
        for _ in range(_DRAIN_READS):
            if not self._pump():
                return
