"""What must be so of a download and its cache, whatever has happened."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pool_managerd.errors import PoolError
from pool_managerd.models.leftovers import FOLDERS
from tests.faults.download_sources import KINDS, SECRET, TOKEN, Source
from tests.models.fetching import Fetching
from tests.models.test_buckets import KEYS

QUICK_KINDS = ("hf",)
"""The fetchers that ``make test`` has everything done to."""


def each_kind() -> list[Any]:
    return [pytest.param(kind, marks=() if kind in QUICK_KINDS else pytest.mark.slow) for kind in KINDS]


async def whole(s: Source, f: Fetching) -> None:
    """All of it is there and right, and nothing else is left."""
    found = await f.models.ensure_present(s.ref, s.digest)
    assert found.verified == s.is_vouched_for
    nothing_but_right(s, f.cache.root)
    files = Path(found.local_path) if s.kind == "hf-folder" else Path(found.local_path).parent
    assert {str(path.relative_to(files)) for path in files.rglob("*") if path.is_file()} == set(s.files)
    assert list((f.cache.root / "partial").iterdir()) == []


def nothing_but_right(s: Source, root: Path) -> None:
    """What has its name is what it is to be; what is left of the rest is parts with something in them, and their notes."""
    only_right_files(s, root)
    parts = {path.stem for path in (root / "partial").glob("*.part") if path.stat().st_size}
    known = {f"{stem}{suffix}" for stem in parts for suffix in (".part", ".json")}
    left = [path for path in (root / "partial").iterdir() if path.name not in known and path.suffix != ".folder"]
    assert left == [] and not list((root / "refs").glob("*.new"))


def only_right_files(s: Source, root: Path) -> None:
    for folder in FOLDERS:
        for path in (root / folder).rglob("*"):
            name = max((name for name in s.files if str(path).endswith(f"/{name}")), key=len, default="")
            assert path.is_dir() or path.read_bytes() == s.files[name], path


def watch(s: Source, root: Path) -> None:
    """Have each request looked at: it goes on exactly where the part of ``root`` ends."""
    s.proxy.there = lambda: part_bytes(root, s.proxy.hit)


def part_bytes(root: Path, hit: str) -> int:
    """How much is there of the file that ``hit`` is the end of."""
    for note in (root / "partial").glob("*.json"):
        with suppress(FileNotFoundError):  # its part has its name already, or it is replaced in this moment
            if json.loads(note.read_text())["url"].endswith(hit):
                return note.with_suffix(".part").stat().st_size
    return 0


def nothing_is_told(problem: PoolError) -> None:
    said = f"{problem.message} {problem.hint} {problem.details}"
    assert not [secret for secret in (TOKEN, SECRET, "Amz", "Bearer", KEYS["AWS_SECRET_ACCESS_KEY"]) if secret in said], said


@asynccontextmanager
async def holding_nothing_more() -> AsyncIterator[None]:
    """No descriptor and no task is left of what is done in the block."""
    before = _held()
    yield
    async with asyncio.timeout(10):
        while [now for now, then in zip(_held(), before, strict=True) if now > then]:
            await asyncio.sleep(0.01)


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())  # noqa: PTH208
