"""What the daemon is told by signals: to end, to end at once, to read its configuration again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from pool_managerd.telemetry.logs import Logging

_ENDING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """SIGTERM and SIGINT as two events: asked to end once, asked again. SIGHUP calls ``on_hang_up``, where there is one.

    A terminal that goes away sends SIGHUP too; a daemon that ran on one ends then. ``leave``: engines are not stopped at the end,
    which is over at once, so that asking again changes nothing.
    """

    def __init__(self, logs: Logging | None = None, *, leave: bool = False) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.on_hang_up: Callable[[], None] | None = None
        self._logs, self._leave = logs, leave
        self._had_terminal = _has_terminal()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        loop = asyncio.get_running_loop()
        for number in _ENDING:
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number in (*_ENDING, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _hang_up(self) -> None:
        if self.on_hang_up is None or self.first.is_set() or (self._had_terminal and not _has_terminal()):
            self._end(signal.SIGHUP)
        else:
            self.on_hang_up()

    def _end(self, number: signal.Signals) -> None:
        again = self.first.is_set()
        if again and self._leave:
            return
        if self._logs is not None:
            what = "ending; the engines go on" if self._leave else "draining and stopping; once more stops at once"
            human = f"{number.name} again: stopping at once" if again else f"{number.name}: {what}"
            self._logs.write("warn" if again else "info", "signal", human, fields={"signal": number.name})
        (self.second if again else self.first).set()


def _has_terminal() -> bool:
    """Whether this process has a terminal that is there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
