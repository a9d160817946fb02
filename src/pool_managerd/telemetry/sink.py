"""Writing log lines without ever blocking the event loop: a bounded queue and one thread that owns the file descriptor."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time

_MAX_LINES = 4096


class LogSink:
    """Takes finished lines from any thread and writes them to ``fd`` in order.

    A full queue (a stuck terminal, a full pipe) drops lines and counts them; the count is reported in the next
    line that gets through. A closed descriptor ends the writing quietly: a log must never take the daemon down.
    """

    def __init__(self, fd: int, *, max_lines: int = _MAX_LINES) -> None:
        self._fd = fd
        self._queue: queue.Queue[bytes | None] = queue.Queue(max_lines)
        self._dropped_lock = threading.Lock()
        self._dropped = 0  # since the last line that got through
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Queue one line (without its newline). Never blocks, never raises."""
        if self._closed:
            return
        try:
            self._queue.put_nowait(line.encode("utf-8", "backslashreplace") + b"\n")
        except queue.Full:
            with self._dropped_lock:
                self._dropped += 1

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, waiting at most ``timeout`` seconds; what a stuck reader leaves is given up."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + timeout
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            with self._dropped_lock:
                missed, self._dropped = self._dropped, 0
            if missed:
                line = b'{"level":"warn","action":"log_dropped","lines":%d}\n' % missed + line
            if not self._write_all(line):
                self._closed = True
                return

    def _write_all(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except InterruptedError:
                continue
            except BlockingIOError:  # somebody made the descriptor non-blocking: wait here, not in the loop
                time.sleep(0.02)
            except OSError:  # EPIPE, EIO, EBADF: nobody reads any more
                return False
        return True
