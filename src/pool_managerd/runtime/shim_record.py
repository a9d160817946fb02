"""The record that a shim keeps of its engine: what the next daemon knows the engine by. Stdlib only: it runs in the shim.

Whoever clears old files away (a cleaner of temporary files, a person) takes it away under an engine that runs. Then it is written
again, into a directory made anew where that is gone, too: without it the next daemon would start a second engine beside this one.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Any

from pool_managerd.runtime import wire

_LOOK_SECONDS = 4.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class ShimRecord:
    """One file in ``shims`` of the runtime directory. ``directory`` is a descriptor of the latter, and stays one."""

    def __init__(self, runtime_dir: str, name: str, launch: dict[str, Any]) -> None:
        """Raises OSError."""
        self._path, self._name, self._launch = runtime_dir, name, launch
        self._data, self._ended = b"", False
        self._due = time.monotonic() + _LOOK_SECONDS
        self.directory = os.open(runtime_dir, _DIRECTORY)
        self._shims = os.open("shims", _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.directory)

    def write(self, identity: dict[str, Any], content: dict[str, Any]) -> None:
        """Raises OSError when there is no room; the end of an engine is written all the same."""
        record = {"schema_version": wire.RECORD_VERSION, "identity": identity, "launch": self._launch, **content}
        self._data, self._ended = (json.dumps(record) + "\n").encode(), content["state"] != "running"
        try:
            self._put()
        except FileNotFoundError:
            self._renew()
            self._put()

    def remove(self) -> None:
        """It is not there any more, if it was."""
        self._data = b""
        with suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._shims)

    def look(self) -> None:
        """Write it again where it is gone. Called at every turn, which there are enough of; most do nothing. What cannot be done
        now is tried at the next one.
        """
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _LOOK_SECONDS
        if self._data and not os.path.lexists(os.path.join(self._path, "shims", self._name)):
            with suppress(OSError):
                self._renew()
                self._put()

    def _put(self) -> None:
        try:
            wire.write_atomically(self._shims, self._name, self._data, 0o600)
        except OSError:
            if not self._ended:
                raise
            # No room for a second file: write over the first one, whose block is there. Its reader waits for
            # this process to end, so it never sees half of it.
            fd = os.open(self._name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._shims)
            wire.write_all(fd, self._data)
            os.ftruncate(fd, len(self._data))

    def _renew(self) -> None:
        """Have the descriptors mean the directories that have the names now; one of somebody else's is not taken."""
        _take(self.directory, os.open(self._path, _DIRECTORY))
        with suppress(FileExistsError):
            os.mkdir("shims", 0o700, dir_fd=self.directory)
        _take(self._shims, os.open("shims", _DIRECTORY | os.O_NOFOLLOW, dir_fd=self.directory))


def _take(known: int, found: int) -> None:
    """Let ``known`` be what ``found`` is. Closes ``found``."""
    try:
        before, now = os.fstat(known), os.fstat(found)
        if (before.st_dev, before.st_ino) != (now.st_dev, now.st_ino) and now.st_uid == os.geteuid():
            os.dup2(found, known, inheritable=False)
    finally:
        os.close(found)
