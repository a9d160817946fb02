"""sha256 of files: off the event loop, with progress, cancellable, and not twice for a file that has not changed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from pool_managerd.models.byte_reader import identity
from pool_managerd.models.progress import Progress
from pool_managerd.models.thread_work import in_thread

BLOCK_BYTES = 4 * 1024 * 1024
CACHE_ENTRIES = 1024


@dataclass(slots=True)
class DigestCache:
    """Digests of files by their identity, in memory, bounded."""

    _known: OrderedDict[tuple[int, ...], str] = field(default_factory=OrderedDict)

    def know(self, info: os.stat_result, digest: str) -> None:
        """``digest`` (``sha256:<hex>``) is that of the file which ``info`` is of: it was hashed while it was written."""
        self._known[identity(info)] = digest
        while len(self._known) > CACHE_ENTRIES:
            self._known.popitem(last=False)

    def forget(self, info: os.stat_result) -> None:
        """What was hashed of the file that ``info`` is of says nothing any more."""
        self._known.pop(identity(info), None)

    async def sha256(self, fd: int, progress: Progress | None = None) -> str:
        """``sha256:<hex>`` of the open file ``fd``, hashed in a worker thread unless known.

        Cancelling the caller stops the thread within one block. A file that changes while it is read is hashed
        again once; raises OSError when it will not hold still. The caller keeps ``fd`` open until this returns.
        """
        for _ in range(2):
            info = os.fstat(fd)
            before = identity(info)
            known = self._known.get(before)
            if known is not None:
                self._known.move_to_end(before)
                return known
            digest = await _hash_in_thread(fd, info.st_size, progress)
            after = os.fstat(fd)
            if identity(after) == before:
                self.know(after, digest)
                return digest
        raise OSError("the file changes while it is read")


async def _hash_in_thread(fd: int, total: int, progress: Progress | None) -> str:
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    def report(done: int) -> None:
        if progress is not None:
            loop.call_soon_threadsafe(progress, done, total)

    return await in_thread(lambda: _hash(fd, stop, report), stop)


def _hash(fd: int, stop: threading.Event, report: Callable[[int], None]) -> str:
    """The digest; of as much as was read where it was told to stop, which nobody waits for."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    offset = 0
    while not stop.is_set() and (count := os.preadv(fd, [block], offset)):
        digest.update(block[:count])
        offset += count
        report(offset)
    return f"sha256:{digest.hexdigest()}"
