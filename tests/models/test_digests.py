"""sha256 off the loop: right, with progress, cancellable, and only once per file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pool_managerd.models import digests
from pool_managerd.models.digests import BLOCK_BYTES, DigestCache


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """Sparse, so cheap to make and not cheap to hash."""
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(40 * BLOCK_BYTES)
    return path


async def test_the_digest_is_the_files_and_progress_ends_at_its_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(BLOCK_BYTES + 17))
    seen: list[tuple[int, int]] = []
    with opened(path) as fd:
        digest = await DigestCache().sha256(fd, lambda done, total: seen.append((done, total)))
    await asyncio.sleep(0)
    assert digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert seen == [(BLOCK_BYTES, BLOCK_BYTES + 17), (BLOCK_BYTES + 17, BLOCK_BYTES + 17)]


async def test_a_known_file_is_not_read_again_and_a_changed_one_is(tmp_path: Path) -> None:
    path, cache, reads = tmp_path / "f", DigestCache(), []
    path.write_bytes(b"one")
    with opened(path) as fd:
        first = await cache.sha256(fd)
        assert await cache.sha256(fd, lambda done, total: reads.append(done)) == first
    assert reads == []
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with opened(path) as fd:
        assert await cache.sha256(fd) == "sha256:" + hashlib.sha256(b"two").hexdigest()


async def test_hashing_stops_when_its_caller_is_cancelled(big_file: Path) -> None:
    started = asyncio.Event()
    with opened(big_file) as fd:
        task = asyncio.create_task(DigestCache().sha256(fd, lambda done, total: started.set()))
        await asyncio.wait_for(started.wait(), 10)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert time.monotonic() - began < 1


async def test_the_loop_goes_on_while_a_file_is_hashed(big_file: Path) -> None:
    turns = 0
    with opened(big_file) as fd:
        task = asyncio.create_task(DigestCache().sha256(fd))
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
    assert await task
    assert turns > 3


async def test_a_file_that_never_holds_still_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x")

    async def hash_and_change(fd: int, total: int, progress: object) -> str:
        with path.open("ab") as file:
            file.write(b"y")
        return "sha256:0"

    monkeypatch.setattr(digests, "_hash_in_thread", hash_and_change)
    with opened(path) as fd, pytest.raises(OSError, match="changes while it is read"):
        await DigestCache().sha256(fd)
