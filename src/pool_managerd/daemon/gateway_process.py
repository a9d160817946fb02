"""The gateway, kept running as a process of its own: the daemon's end is not its end, and the next daemon takes it over."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pool_managerd._version import __version__
from pool_managerd.core.narration import duration
from pool_managerd.runtime import procfs
from pool_managerd.runtime.identity import open_proved
from pool_managerd.supervision.event_log import EventLog

_FILE = "gateway.json"
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONG_LIFE_S = 0.2, 30.0, 60.0
_GRACE_S = 40.0
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Left:
    """One that runs: pid, start time and boot name one process only. ``settings``: by which it was started."""

    pid: int
    start_ticks: int
    boot_id: str
    settings: str

    def runs(self) -> bool:
        return self.boot_id == procfs.boot_id() and procfs.is_running(self.pid, self.start_ticks)


class GatewayProcess:
    """``arguments`` are those of `pool-managerd gateway`; ``gone`` is told the pid of one that has ended. ``objection`` says what
    keeps one from running, if anything.
    """

    def __init__(
        self, arguments: Sequence[str], settings: str, runtime_dir: Path, events: EventLog, gone: Callable[[int], None],
        objection: Callable[[], str | None] = lambda: None,
    ) -> None:  # fmt: skip
        self._command = (sys.executable, "-P", "-m", "pool_managerd.cli", "gateway", *arguments)
        told = json.dumps([__version__, *self._command, settings])
        self._settings = hashlib.sha256(told.encode()).hexdigest()
        self._place, self._events, self._gone = runtime_dir / _FILE, events, gone
        self._objection = objection
        self._running: _Left | None = None
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the one that runs."""
        return None if self._running is None else self._running.pid

    async def run(self) -> None:
        """Until cancelled, at which it is left as it is."""
        failures = 0
        left = await self._taken_over()
        while True:
            began = asyncio.get_running_loop().time()
            self._running = left or self._start()
            left = None
            await self._ended(self._running)
            lived_s = asyncio.get_running_loop().time() - began
            failures = 0 if lived_s > _LONG_LIFE_S else failures + 1
            wait_s = min(_FIRST_WAIT_S * 2 ** (failures - 1), _LONGEST_WAIT_S) if failures else 0.0
            self._tell_end(self._running, lived_s, wait_s)
            await asyncio.sleep(wait_s)

    async def stop(self) -> None:
        """It stops listening, its streams have a moment to end, and it is gone."""
        running, self._running = self._running, None
        if running is None:
            return
        self._signal(running, signal.SIGTERM)
        try:
            async with asyncio.timeout(_GRACE_S):
                await self._ended(running)
        except TimeoutError:
            self._signal(running, signal.SIGKILL)
            await self._ended(running)
        self._place.unlink(missing_ok=True)

    # --- inside ---

    async def _taken_over(self) -> _Left | None:
        """The one of an earlier daemon, where it has the same settings; any other makes way."""
        found = self._read()
        if found is None or not found.runs():
            return None
        if found.settings == self._settings:
            self._events.emit("gateway_taken_over", f"The gateway goes on (pid {found.pid})", pid=found.pid)
            return found
        self._running = found
        await self.stop()
        return None

    def _start(self) -> _Left:
        """Raises OSError where no process can be made."""
        self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        pid = self._child.pid
        made = _Left(pid, procfs.start_ticks(pid) or 0, procfs.boot_id(), self._settings)
        temporary = self._place.with_suffix(".new")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "w") as file:  # noqa: PTH123
            json.dump(asdict(made), file)
        temporary.rename(self._place)
        self._events.emit("gateway_started", f"The gateway runs as a process of its own (pid {pid})", pid=pid)
        return made

    def _read(self) -> _Left | None:
        try:
            with open(os.open(self._place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
                raw = json.loads(file.read(_MAX_BYTES))
            return _Left(int(raw["pid"]), int(raw["start_ticks"]), str(raw["boot_id"]), str(raw["settings"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    async def _ended(self, running: _Left) -> None:
        pidfd = open_proved(running.pid, running.runs)
        if pidfd is not None:
            loop, over = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(pidfd, over.set)
            try:
                await over.wait()
            finally:
                loop.remove_reader(pidfd)
                os.close(pidfd)
        if self._child is not None and self._child.pid == running.pid:
            self._child.wait()
        self._gone(running.pid)

    def _tell_end(self, ended: _Left, lived_s: float, wait_s: float) -> None:
        code = self._child.returncode if self._child is not None and self._child.pid == ended.pid else None
        how = "is gone" if code is None else f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
        again, why = f"in {duration(wait_s)}" if wait_s else "at once", self._objection() if code else None
        because = f": {why}" if why else ""
        self._events.emit(
            "gateway_ended", f"The gateway {how} after {duration(lived_s)}{because}; starting it again {again}", level="error",
            pid=ended.pid, exit_code=code, last_error=why,
        )  # fmt: skip

    def _signal(self, running: _Left, number: signal.Signals) -> None:
        pidfd = open_proved(running.pid, running.runs)
        if pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            os.close(pidfd)
