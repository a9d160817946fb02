"""The process's own streams: missing ones are opened, and output that cannot be written ends the command, not a traceback.

An error while printing must not be taken for one of the daemon's connection: it has a type of its own.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
import threading
from typing import NoReturn

from pool_managerd.cli.exits import NO

READER_GONE = 141  # what a shell reports of a program that died of SIGPIPE


class OutputLostError(Exception):
    """stdout or stderr takes nothing any more. Not an OSError: nobody but ``run`` is to handle it."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.reader_gone = cause.errno in (errno.EPIPE, errno.ECONNRESET)
        self.reason = cause.strerror or str(cause)


class _Output(io.FileIO):
    """A descriptor whose failures are told as OutputLostError."""

    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            raise OutputLostError(error) from error


def prepare() -> None:
    """Before anything is printed. A terminal that cannot show a sign shows a question mark."""
    _open_missing()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is getattr(sys, f"__{name}__"):  # the real one: not a test's or an embedder's
            output = io.BufferedWriter(_Output(stream.fileno(), "wb", closefd=False))
            lines = name == "stderr" or stream.isatty()
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "replace", line_buffering=lines))
        else:
            stream.reconfigure(errors="replace")


def give_up(lost: OutputLostError) -> NoReturn:
    """End the process. A reader that went (``| head``) is no error to tell; nothing more is flushed."""
    if lost.reader_gone:
        os._exit(READER_GONE)
    try:
        os.write(2, f"cannot write the output: {lost.reason}\n".encode())
    finally:
        os._exit(NO)


def end_with_reader() -> None:
    """From now on the process ends when nobody reads its output any more, also while it has nothing to print (as tail -f)."""
    if not isinstance(getattr(sys.stdout.buffer, "raw", None), _Output) or not stat.S_ISFIFO(os.fstat(1).st_mode):
        return

    def watch() -> None:
        poll = select.poll()
        poll.register(1, 0)  # only POLLERR, which cannot be left out: the last reader closed the pipe
        poll.poll()
        os._exit(READER_GONE)

    threading.Thread(target=watch, name="reader", daemon=True).start()


def _open_missing() -> None:
    """Whoever started us closed stdin, stdout or stderr: without this the next file or socket would get its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
            setattr(sys, name, open(fd, mode, closefd=False))  # noqa: SIM115 - for the life of the process
