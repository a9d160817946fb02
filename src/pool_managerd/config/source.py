"""The file that a daemon was started with: read again, tried out with another text, replaced by it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pool_managerd.config import Config
from pool_managerd.config.load import load_text
from pool_managerd.config.parse import read_bounded
from pool_managerd.errors import NodeError, SpecError


class ConfigSource:
    """``env`` and ``overrides`` (flags) win over what the file says, each time as at the start."""

    def __init__(self, path: Path, env: Mapping[str, str], overrides: Mapping[str, Any] | None = None) -> None:
        self.path = path.absolute()
        self._given, self._env, self._overrides = path, env, overrides

    def text(self) -> str:
        """What is in the file now. Raises SpecError (CONFIG_ERROR)."""
        try:
            return read_bounded(self.path)
        except ValueError as problem:
            raise SpecError(f"{self._given}: {problem}", code="CONFIG_ERROR") from problem

    def load(self, text: str) -> Config:
        """The configuration if ``text`` were in the file. Raises SpecError (CONFIG_ERROR) with a line per problem."""
        return load_text(text, self._given, env=self._env, overrides=self._overrides)

    def seen(self) -> tuple[int, ...] | None:
        """Tells whether the file was changed: other values than before say so. None while it cannot be seen."""
        try:
            now = self.path.stat()
        except OSError:
            return None
        return now.st_ino, now.st_dev, now.st_size, now.st_mtime_ns, now.st_ctime_ns

    def replace(self, text: str, *, gone_too: bool = False) -> None:
        """Put ``text`` into the file's place, all of it or nothing, with the owner and mode of the one before; on disk when this
        returns. ``gone_too``: a file that is gone is made anew, for its owner alone. Raises NodeError CONFIG_UNWRITABLE.
        """
        try:
            place = self.path.resolve(strict=not gone_too)
            was = place.stat() if place.exists() or not gone_too else None
            if was is not None and not stat.S_ISREG(was.st_mode):
                raise OSError("it is not a regular file")
            _replace(place, text.encode(), was)
        except OSError as problem:
            raise NodeError(
                f"cannot write {self.path}: {problem.strerror or problem}", code="CONFIG_UNWRITABLE", status=409, retriable=False,
                hint=f"write {self.path} yourself, then: pool-managerd apply",
            ) from problem  # fmt: skip


def _replace(place: Path, data: bytes, was: os.stat_result | None) -> None:
    fresh = place.with_name(f".{place.name}.{secrets.token_hex(6)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            if was is not None:
                if (os.fstat(fd).st_uid, os.fstat(fd).st_gid) != (was.st_uid, was.st_gid):
                    os.fchown(fd, was.st_uid, was.st_gid)
                os.fchmod(fd, stat.S_IMODE(was.st_mode))
            os.fsync(fd)
        fresh.replace(place)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise
    folder = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
