"""The file that a download is written to: hashed as it is written, found again by whoever goes on with it.

It has its final name when it is complete, verified and on the disk, and not before.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pool_managerd.errors import NodeError
from pool_managerd.models.digests import BLOCK_BYTES

_T = TypeVar("_T")
_MAX_BUFFERS = 512
_MAX_NOTE_BYTES = 16 << 10
FLUSH_BYTES = 256 << 20
"""What is written is sent to the disk every so often, so that the end of a large file is not one long wait."""


@dataclass(frozen=True, slots=True)
class Validator:
    """What must still hold where a download goes on: the server's ETag, the size of the whole, its digest if one is known.

    Without a digest to check at the end, what an earlier boot has written is not believed. ``owner`` writes it: whoever went on
    with it last.
    """

    url: str
    etag: str = ""
    size: int | None = None
    sha256: str | None = None
    boot: str = ""
    owner: str = ""


class Part:
    """Belongs to one download at a time: the caller has its lock, and where that does not hold, as on some network file systems,
    whoever opened it last. Only threads touch the disk.
    """

    def __init__(self, path: Path, wanted: Validator) -> None:
        self._me = secrets.token_hex(8)
        self.validator = replace(wanted, owner=self._me)
        self.size = 0
        self._path, self._note = path, path.with_suffix(".json")
        self._digest = hashlib.sha256()
        self._fd = -1
        self._work: asyncio.Future[Any] | None = None
        self._flush: asyncio.Future[None] | None = None
        self._stop = threading.Event()
        self._unflushed = 0
        self._unsynced: OSError | None = None

    # --- for the event loop ---

    async def open(self, progress: Callable[[int], None]) -> None:
        """What is there already is hashed from the disk; ``progress`` hears how much of it. Raises NodeError."""
        loop = asyncio.get_running_loop()

        def tell(done: int) -> None:
            loop.call_soon_threadsafe(progress, done)

        await self._in_thread(lambda: self._open(tell))

    async def write(self, chunks: Sequence[bytes]) -> None:
        """Hash and append; returns while that goes on, when what was given before is written. Raises NodeError."""
        await self.settled()
        loop = asyncio.get_running_loop()
        if self._unflushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._unflushed = 0
            self._flush = loop.run_in_executor(None, self._to_disk)  # beside the rest: what comes is not held up by it
        self._work = loop.run_in_executor(None, self._write, chunks)

    async def restart(self, etag: str = "", size: int | None = None) -> None:
        """From the first byte on, of a file that has this ETag and size."""
        await self._in_thread(lambda: self._restart(etag, size))

    async def finish(self, final: Path) -> str:
        """Give it its name, on the disk; its sha256 in hex. The caller has looked at size and digest. Raises NodeError."""
        await self.settled()
        if self._flush is not None:
            await _whatever_happens(self._flush)
        return await self._in_thread(lambda: self._finish(final))

    async def close(self) -> None:
        """Leave it for whoever goes on, if there is anything in it. Returns when no thread uses it any more, cancelled or not."""
        self._stop.set()
        for work in (self._work, self._flush):
            if work is not None:
                with suppress(NodeError):
                    await _whatever_happens(work)
        if self._fd >= 0:
            await _whatever_happens(asyncio.get_running_loop().run_in_executor(None, self._leave))

    @property
    def sha256(self) -> str:
        """In hex, of what is written."""
        return self._digest.hexdigest()

    async def settled(self) -> None:
        """Return when all that was given is written. Raises NodeError."""
        work, self._work = self._work, None
        if work is not None:
            await _whatever_happens(work)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        await self.settled()
        work = self._work = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(work)
        finally:
            if work.done():
                self._work = None

    # --- in a thread ---

    def _open(self, tell: Callable[[int], None]) -> None:
        with _told(self._path):
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            before, there = self._noted(), os.fstat(self._fd).st_size
            wanted = self.validator
            if before is None or not _goes_on(before, wanted) or there > (before.size or there):
                self._restart("", wanted.size)
                return
            self._note_down(replace(before, owner=self._me))
            block = memoryview(bytearray(BLOCK_BYTES))
            while not self._stop.is_set() and (count := os.preadv(self._fd, [block], self.size)):
                self._digest.update(block[:count])
                self.size += count
                tell(self.size)

    def _restart(self, etag: str, size: int | None) -> None:
        with _told(self._path):
            os.ftruncate(self._fd, 0)
            self._digest, self.size, self._unflushed = hashlib.sha256(), 0, 0
            self._note_down(replace(self.validator, etag=etag, size=size, boot=boot_id()))

    def _note_down(self, validator: Validator) -> None:
        self.validator = validator
        draft = self._note.with_suffix(".new")
        draft.write_text(json.dumps(asdict(validator)), "utf-8")
        draft.replace(self._note)

    def _require_mine(self) -> None:
        """Raises NodeError where another process has gone on with it meanwhile, and where the disk has lost some of it."""
        if self._unsynced is not None:
            raise disk_error(self._path, self._unsynced)
        noted = self._noted()
        if noted is None or noted.owner != self._me or os.fstat(self._fd).st_size != self.size:
            raise NodeError(
                f"cannot go on with {self._path}: another process writes it, which the locks of its file system do not keep out",
                retriable=True, hint="have models.cache_dir on a local disk, or another one for each machine",
            )  # fmt: skip

    def _write(self, chunks: Sequence[bytes]) -> None:
        self._require_mine()
        with _told(self._path):
            for first in range(0, len(chunks), _MAX_BUFFERS):
                some = chunks[first : first + _MAX_BUFFERS]
                self._append(some)
                for chunk in some:
                    self._digest.update(chunk)

    def _to_disk(self) -> None:
        with _told(self._path):
            self._sync(os.fdatasync)

    def _sync(self, call: Callable[[int], None]) -> None:
        """What the disk has failed to take may be lost, though it can still be read: nobody goes on with that. The kernel tells
        it once.
        """
        try:
            call(self._fd)
        except OSError as problem:
            self._unsynced = problem
            with suppress(OSError):
                self._note.unlink()
            raise

    def _append(self, chunks: Sequence[bytes]) -> None:
        left = [memoryview(chunk) for chunk in chunks]
        while left:
            count = os.pwritev(self._fd, left, self.size)
            self.size += count
            self._unflushed += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def _finish(self, final: Path) -> str:
        self._require_mine()
        with _told(final):
            os.fchmod(self._fd, 0o444)  # engines have users of their own, and nobody writes to it any more
            self._sync(os.fsync)
            self._path.rename(final)
            self._note.unlink(missing_ok=True)
            sync_directory(final.parent)
        return self.sha256

    def _leave(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            noted = self._noted()
            if noted is not None and noted.owner == self._me and not os.fstat(fd).st_size:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                    self._note.unlink()
        finally:
            os.close(fd)

    def _noted(self) -> Validator | None:
        try:
            with self._note.open("rb") as file:
                told = json.loads(file.read(_MAX_NOTE_BYTES))
            return Validator(**told)
        except (OSError, ValueError, TypeError):
            return None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the disk forbids, as a NodeError."""
    try:
        yield
    except OSError as problem:
        raise disk_error(path, problem) from problem


def disk_error(path: Path, problem: OSError) -> NodeError:
    """The error of a file of the model cache."""
    full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space there, or have models.cache_dir on a larger disk" if full else "check the disk and models.cache_dir"
    return NodeError(f"cannot write {path}: {problem.strerror or problem}", status=507 if full else 503, hint=remedy)


async def _whatever_happens(work: asyncio.Future[_T]) -> _T:
    """The result of ``work``, which runs in a thread: a caller that is cancelled waits for it all the same."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as problem:
            cancelled = problem
    if cancelled is not None:
        work.exception()
        raise cancelled
    return work.result()


def _goes_on(before: Validator, wanted: Validator) -> bool:
    """Whether what was fetched as ``before`` is the beginning of what is wanted."""
    if wanted.size not in (None, before.size) or before.sha256 != wanted.sha256:
        return False
    return wanted.sha256 is not None or (before.url == wanted.url and bool(before.etag) and before.boot == wanted.boot)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""
