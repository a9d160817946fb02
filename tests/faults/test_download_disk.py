"""Downloads to a disk that is full or fails, and to one whose locks do not hold."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.core.artifacts import ResolvedModel
from pool_managerd.errors import NodeError, PoolError
from pool_managerd.models import importing, part
from pool_managerd.models.part import Part, Validator
from tests.faults.download_checks import each_kind, holding_nothing_more, nothing_but_right, part_bytes, watch, whole
from tests.faults.download_proxy import Fault, another_version, flipped_at, reset_after, waiting_at
from tests.faults.download_sources import Tls, source
from tests.models.fetching import fetching

AT, ALWAYS = 150_000, 99


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, after: int = 0, times: int = ALWAYS) -> None:
    """``os.NAME`` fails with ``code``, so many calls, of files of the cache alone."""
    real, seen = getattr(os, name), [0]

    def call(*args: Any, **more: Any) -> Any:
        where = str(Path(f"/proc/self/fd/{args[0]}").readlink()) if isinstance(args[0], int) else str(args[0])
        if where.endswith(".part"):
            seen[0] += 1
            if after < seen[0] <= after + times:
                raise OSError(code, os.strerror(code))
        return real(*args, **more)

    monkeypatch.setattr(os, name, call)


DISK = [
    ("pwritev", errno.ENOSPC, 507, "No space left"), ("pwritev", errno.EDQUOT, 507, "quota"),
    ("pwritev", errno.EIO, 503, "Input/output error"), ("fsync", errno.EIO, 503, "Input/output error"),
    ("fsync", errno.ENOSPC, 507, "No space left"), ("rename", errno.EIO, 503, "Input/output error"),
    ("fchmod", errno.EROFS, 503, "Read-only"),
]  # fmt: skip


@pytest.mark.parametrize("kind", each_kind())
@pytest.mark.parametrize(("call", "code", "status", "says"), DISK)
async def test_what_the_disk_refuses_is_named_and_what_it_has_not_kept_is_fetched_again(
    kind: str, call: str, code: int, status: int, says: str, tls: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with source(kind, tls) as s, holding_nothing_more(), s.fetching(tmp_path) as f:
        with monkeypatch.context() as patch:
            failing(patch, call, code)
            problem = await f.refusal(s.ref, s.digest)
        assert problem.status == status and says in problem.message and str(f.cache.root) in problem.message and problem.hint
        nothing_but_right(s, f.cache.root)
        watch(s, f.cache.root)
        there = part_bytes(f.cache.root, s.proxy.hit)
        assert not there or call in ("rename", "fchmod"), "a disk that fails to sync may have lost what it said it had"
        await whole(s, f)


async def test_an_error_of_a_sync_in_the_background_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells it once: the sync at the end would find nothing wrong any more."""
    monkeypatch.setattr(part, "FLUSH_BYTES", 40)
    failing(monkeypatch, "fdatasync", errno.EIO, times=1)
    written = Part(tmp_path / "m.part", Validator("https://127.0.0.1/m", sha256="0" * 64))
    await written.open(lambda _: None)
    try:
        with pytest.raises(NodeError, match="Input/output error"):  # noqa: PT012 - whichever of them hears it
            for _ in range(4):
                await written.write([bytes(50)])
            await written.finish(tmp_path / "m.gguf")
    finally:
        await written.close()
    again = Part(tmp_path / "m.part", Validator("https://127.0.0.1/m", sha256="0" * 64))
    await again.open(lambda _: None)
    assert again.size == 0, "what was not synced is not gone on with"
    await again.close()


@pytest.mark.parametrize("kind", each_kind())
@pytest.mark.parametrize("then", [None, flipped_at(AT // 2), another_version], ids=["nothing", "flip", "version"])
async def test_locks_that_lie_cost_a_try_and_never_bring_a_wrong_file(
    kind: str, then: Fault | None, tls: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that two machines share, each with locks of its own."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    gate, reached = asyncio.Event(), asyncio.Event()
    async with source(kind, tls) as s, s.fetching(tmp_path) as one, s.fetching(tmp_path) as two:
        if not s.is_vouched_for and then is not None:
            pytest.skip("nobody has said what it has to be, so that nobody can tell")
        s.proxy.faults = [waiting_at(AT, reached, gate), reset_after(AT), then]
        first = asyncio.ensure_future(one.models.ensure_present(s.ref, s.digest))
        await asyncio.wait_for(reached.wait(), 10)
        second = asyncio.ensure_future(two.models.ensure_present(s.ref, s.digest))
        while len(s.proxy.asked) < 2 and not second.done():
            await asyncio.sleep(0.01)
        gate.set()
        ended = await asyncio.gather(first, second, return_exceptions=True)
        assert all(isinstance(one, PoolError | ResolvedModel) for one in ended), ended
        assert [one for one in ended if isinstance(one, ResolvedModel)] or kind == "hf-folder"
        if kind != "hf-folder":
            nothing_but_right(s, one.cache.root)
        for f in (one, two):
            found = await f.models.ensure_present(s.ref, s.digest)
            assert found.verified == s.is_vouched_for
            nothing_but_right(s, f.cache.root)


async def test_a_part_is_left_where_there_is_something_in_it_however_early_its_reading_ends(tmp_path: Path) -> None:
    path, wanted = tmp_path / "m.part", Validator("https://127.0.0.1/m", sha256="0" * 64)
    for content in (b"", bytes(50)):
        written = Part(path, wanted)
        await written.open(lambda _: None)
        await written.write([content])
        await written.close()
        assert path.exists() == bool(content) == path.with_suffix(".json").exists()
    reading = Part(path, wanted)
    opening = asyncio.ensure_future(reading.open(lambda _: None))
    await asyncio.sleep(0)
    opening.cancel()
    await reading.close()
    assert path.read_bytes() == bytes(50)


@pytest.mark.parametrize(
    ("call", "code", "status"),
    [
        ("pwrite", errno.ENOSPC, 507),
        ("pwrite", errno.EIO, 503),
        ("fdatasync", errno.EIO, 503),
        ("fsync", errno.EIO, 503),
        ("replace", errno.EIO, 503),
    ],
)
async def test_an_import_to_a_disk_that_fails_is_an_error_and_leaves_nothing(
    call: str, code: int, status: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "_clone", lambda *_: False)
    monkeypatch.setattr(importing, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(importing, "FLUSH_BYTES", 100_000)
    async with holding_nothing_more(), fetching(tmp_path, policy={"allow_network": False}) as f:
        with monkeypatch.context() as patch:
            failing(patch, call, code, times=1)
            with pytest.raises(NodeError) as caught:
                await f.shelf.bring(str(tiny_model), "mine", (), lambda *_: None)
        assert caught.value.status == status and os.strerror(code) in caught.value.message
        assert await f.shelf.cached() == [] and list((f.cache.root / "partial").iterdir()) == []
        await f.shelf.bring(str(tiny_model), "mine", (), lambda *_: None)
        assert Path((await f.models.ensure_present("local:mine")).local_path).read_bytes() == tiny_model.read_bytes()
