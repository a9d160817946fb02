"""What the daemon, the fork server and the shims say to each other (version 1, frozen).

The fork server gets one byte and one socket per order, nothing else. Everything about an engine travels on that
socket, which ends up in the engine's shim: the order, the answer with two pidfds, and later stop requests. A
frame is four bytes of length, big endian, then a JSON object.

Daemon to shim: ``{"v": 1, …order…}`` once, then ``{"op": "keep"}`` when the answer has arrived, ``{"op": "stop",
"grace_ms": n}``, ``{"op": "kill"}``. Shim to daemon: ``{"ok": true, "pid", "start_ticks", "shim_pid",
"shim_start_ticks"}`` with the pidfds of engine and shim, or ``{"ok": false, "step", "errno"}``; at the end
``{"exit": {…}}``, as in the record. When the daemon's end closes before ``keep``, the engine is killed: nobody
took it. After ``keep`` it goes on alone.

Signals to a shim mean the same in every version: SIGTERM is stop with the order's grace, SIGUSR1 is kill now.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any

VERSION = 1
RECORD_VERSION = 2
"""Of the shim's record; 2 has ``launch``, which the shim copies from its order without a look into it."""
SHIM_NAME = "pm-shim"
FORKSERVER_NAME = "pm-forkserver"
MAX_FRAME_BYTES = 1 << 20
STARTED_KEYS = ("pid", "start_ticks", "shim_pid", "shim_start_ticks")


class WireError(Exception):
    """The other side sent something that is no frame of this protocol."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame. Raises WireError when it would be longer than a receiver accepts."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"cannot send {len(body)} bytes: a message may have {MAX_FRAME_BYTES}")
    return len(body).to_bytes(4, "big") + body


class Decoder:
    """Puts frames together from whatever pieces arrive."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The frames that ``data`` completes. Raises WireError on an oversized or malformed one."""
        self._pending += data
        frames: list[dict[str, Any]] = []
        while len(self._pending) >= 4:
            size = _size(self._pending)
            if len(self._pending) < 4 + size:
                break
            frames.append(_object(bytes(self._pending[4 : 4 + size])))
            del self._pending[: 4 + size]  # moves the start, not the bytes
        return frames


def _size(frame: bytes | bytearray) -> int:
    size = int.from_bytes(frame[:4], "big")
    if size > MAX_FRAME_BYTES:
        raise WireError(f"cannot read a frame of {size} bytes")
    return size


def _object(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise WireError(f"cannot read a frame: {error}") from error
    if not isinstance(message, dict):
        raise WireError("cannot read a frame: not an object")
    return message


def receive(channel: socket.socket, timeout: float | None) -> bytes | None:
    """The next frame from a blocking socket, which ``decode`` reads, and nothing behind it; None when the other side is gone or
    silent for ``timeout`` seconds (None: for ever). Raises WireError for an oversized one.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    frame, size = b"", 4
    while len(frame) < size:
        channel.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0.001))
        try:
            data = channel.recv(size - len(frame))
        except OSError:  # includes the timeout
            return None
        if not data:
            return None
        frame += data
        if len(frame) == 4:
            size += _size(frame)
    channel.settimeout(None)
    return frame


def decode(frame: bytes) -> dict[str, Any]:
    """What is in a whole frame. Raises WireError for a malformed one."""
    return _object(frame[4:])


def write_atomically(directory: int, name: str, data: bytes, mode: int) -> None:
    """Replace ``name`` in the directory ``directory`` (a descriptor) in one step; no link is followed.

    Not synced to disk on purpose: what lives in the runtime directory describes processes, which end with the
    boot. Raises OSError; then nothing but the old content is left.
    """
    temporary = f".{name}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, mode, dir_fd=directory)
    try:
        try:
            os.fchmod(fd, mode)
            _take_room(fd, len(data))
            write_all(fd, data)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        os.unlink(temporary, dir_fd=directory)
        raise


def _take_room(fd: int, size: int) -> None:
    """Blocks for ``size`` bytes, now: where a file is to be replaced by one whose blocks are not chosen yet, ext4 has the rename
    wait for its data to be on its way to the disk, which takes milliseconds. Raises OSError when there is no room.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise


def write_all(fd: int, data: bytes) -> None:
    """Write every byte of ``data`` to ``fd``, however many calls it takes. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
