"""An engine's log on disk: raw bytes, bounded in size and in rate. Stdlib only: it runs in the shim.

Writing a log must never hurt the engine, so nothing here raises once the file was opened: what cannot be
written is counted. Two shims may write to one log (the old and the new replica of a pool), so every write goes
to the file that has the name now, and a rotation by the other one, or by logrotate, is noticed.
"""

from __future__ import annotations

import errno
import os
import stat
import time

_REOPEN_SECONDS = 1.0
_WINDOW_SECONDS = 1.0
KEPT_END_BYTES = 8 * 1024
_FOREVER_MS = 3_600_000.0


class LogFile:
    """Appends to ``name`` in a directory; at ``max_bytes`` it becomes ``name.1``, of which ``keep`` generations stay.

    Of what comes in one second only ``bytes_per_second`` are written; the rest is dropped in whole reads, and a
    line saying how much follows, with the last lines of it.
    """

    def __init__(self, directory: int, name: str, *, max_bytes: int, keep: int, bytes_per_second: int) -> None:
        self._directory = directory
        self._name = name
        self._max_bytes = max_bytes
        self._keep = keep
        self._rate = bytes_per_second
        self._fd: int | None = None
        self._next_open = 0.0
        self._window_end = 0.0
        self._window_bytes = 0
        self._unreported = 0
        self._dropped_end = bytearray()
        self.dropped_bytes = 0

    def open(self) -> None:
        """Open or create the file. Raises OSError: ELOOP for a link, EINVAL for anything but a regular file."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._name, flags, 0o640, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file")
        self._fd = fd

    def write(self, data: bytes) -> None:
        """Append ``data``, or drop and count it when the rate is exceeded or the file cannot take it."""
        self.look()
        now = time.monotonic()
        if self._window_bytes + len(data) > self._rate:
            # The whole rest of the window is dropped: one gap with one marker instead of many small ones.
            self._window_bytes = self._rate
            self._drop(len(data))
            self._dropped_end += data[-KEPT_END_BYTES:]
            del self._dropped_end[:-KEPT_END_BYTES]
            return
        self._window_bytes += len(data)
        self._append(data, now)

    def milliseconds_to_look(self) -> float:
        """Until what was dropped of a burst is due, should nothing more come: its last lines may be the last of all."""
        return max(0.0, (self._window_end - time.monotonic()) * 1000 + 1) if self._unreported else _FOREVER_MS

    def look(self) -> None:
        """Where a window is over, begin the next one with what was dropped in it."""
        if (now := time.monotonic()) >= self._window_end:
            self._window_end = now + _WINDOW_SECONDS
            self._window_bytes = 0
            self._report_dropped(now)

    def close(self) -> None:
        """Note what was dropped last and close the file."""
        self._report_dropped(time.monotonic())
        self._forget()

    def _drop(self, count: int) -> None:
        self.dropped_bytes += count
        self._unreported += count

    def _report_dropped(self, now: float) -> None:
        if self._unreported:
            count, self._unreported = self._unreported, 0
            end, self._dropped_end = bytes(self._dropped_end), bytearray()
            # The last lines before an end are the ones that say why; they are kept whatever came before them.
            lines = end.partition(b"\n")[2]
            marker = b"\n[pool-managerd: %d bytes of output were dropped here]\n" % (count - len(lines))
            if not self._append(marker, now, marker=True):
                self._unreported, self._dropped_end = count, bytearray(end)
            elif self._append(lines, now, marker=True):
                self.dropped_bytes -= len(lines)

    def _append(self, data: bytes, now: float, *, marker: bool = False) -> bool:
        left = len(data)
        try:
            if self._ready_for(left, now) and self._fd is not None:
                left -= os.write(self._fd, data)
        except OSError:  # a full or failing disk is not the engine's problem
            pass
        if left and not marker:
            self._drop(left)
        return not left

    def _ready_for(self, count: int, now: float) -> bool:
        size = self._current_size()
        if size is None:
            self._forget()
            if now < self._next_open:
                return False
            self._next_open = now + _REOPEN_SECONDS
            self.open()
            size = self._current_size() or 0
        if size and size + count > self._max_bytes:
            self._rotate()
        return self._fd is not None

    def _current_size(self) -> int | None:
        """Size of our file, or None when the name means another file now or none."""
        if self._fd is None:
            return None
        try:
            named = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return None
        ours = os.fstat(self._fd)
        return ours.st_size if (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino) else None

    def _rotate(self) -> None:
        names = [self._name, *(f"{self._name}.{number}" for number in range(1, self._keep + 1))]
        if self._keep == 0:
            os.unlink(self._name, dir_fd=self._directory)
        for older, newer in reversed(list(zip(names[1:], names[:-1], strict=True))):
            try:
                os.rename(newer, older, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileNotFoundError:
                continue
        self._forget()
        self.open()

    def _forget(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
