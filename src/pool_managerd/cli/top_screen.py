"""The terminal while the picture is on it: the alternate screen, keys as they come, signals; and all of it as it was before."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

from pool_managerd.cli.output import SGR, paint
from pool_managerd.cli.picture import Line
from pool_managerd.cli.streams import OutputLostError

# Alternate screen, no cursor, no line that goes on in the next one; and back.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J", "\x1b[?7h\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_NOTED = (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
_KEYS_BYTES = 1024


class Bell:
    """A descriptor that can be waited for and is rung by threads and signals."""

    def __init__(self) -> None:
        self.fd, self._out = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._out, False)

    @property
    def signals(self) -> int:
        """Where Python itself writes a byte for each signal."""
        return self._out

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: nobody waits any more
            os.write(self._out, b".")

    def quiet(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, _KEYS_BYTES):
                pass


class Screen:
    """Within ``with`` the terminal is ours. It is given back whatever happens; SIGTERM and SIGHUP end the process then."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._keys: int | None = None
        self._modes: list[Any] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._noted: set[int] = set()

    def __enter__(self) -> Self:
        if sys.stdin.isatty():
            self._keys = sys.stdin.fileno()
            self._modes = termios.tcgetattr(self._keys)
        for number in (*_ENDING, *_NOTED):
            self._before[number] = signal.signal(number, self._end if number in _ENDING else self._note)
        signal.set_wakeup_fd(self._bell.signals, warn_on_full_buffer=False)
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            signal.signal(number, before)
        self._give_back()

    def draw(self, lines: Sequence[Line]) -> None:
        """This picture instead of the one before."""
        text = f"{_END_OF_LINE}\r\n".join(painted(line) for line in lines)
        sys.stdout.write(f"{_HOME}{text}{_END_OF_LINE}{_END_OF_SCREEN}")
        sys.stdout.flush()

    def wait(self, timeout_s: float) -> bool:
        """Until something happened, the time is over, or it is to end: false."""
        watched = [self._bell.fd] if self._keys is None else [self._bell.fd, self._keys]
        ready = select.select(watched, (), (), max(0.0, timeout_s))[0]
        self._bell.quiet()
        noted, self._noted = self._noted, set()
        if signal.SIGTSTP in noted:
            self._stop()
        elif signal.SIGCONT in noted:  # who has stopped us may have used the terminal
            self._take()
        return self._keys not in ready or not self._ended()

    def _ended(self) -> bool:
        """By a q, or because there is no terminal any more. Keys that send more than one byte are none of ours."""
        try:
            keys = os.read(sys.stdin.fileno(), _KEYS_BYTES)
        except OSError:
            return True
        return not keys or (not keys.startswith(b"\x1b") and b"q" in keys.lower())

    def _stop(self) -> None:
        """As Ctrl-Z does for any other program; it comes back by SIGCONT."""
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._note)
        self._noted.clear()
        self._take()

    def _take(self) -> None:
        if self._keys is not None and self._modes is not None:
            modes = [*self._modes[:3], self._modes[3] & ~(termios.ICANON | termios.ECHO), *self._modes[4:]]
            termios.tcsetattr(self._keys, termios.TCSANOW, modes)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()

    def _give_back(self) -> None:
        """Also of a terminal that takes nothing any more, or is gone."""
        try:
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()
        except OutputLostError:
            pass
        finally:
            if self._keys is not None and self._modes is not None:
                with contextlib.suppress(termios.error):
                    termios.tcsetattr(self._keys, termios.TCSANOW, self._modes)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted.add(number)

    @staticmethod
    def _end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)


def size() -> tuple[int, int]:
    """Columns and lines of the terminal as it is now, whatever the environment says."""
    try:
        found = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        found = shutil.get_terminal_size()
    return found.columns or 80, found.lines or 24


def painted(line: Line) -> str:
    """With its styles, on a terminal that may have them."""
    text = "".join(paint(text, SGR.get(style, "")) for text, style in line.spans)
    return text.rstrip()
