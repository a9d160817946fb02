"""What /proc says of families."""

from __future__ import annotations

import os
import subprocess

import pytest

from pool_managerd.runtime import procfs
from tests.runtime.support import eventually


async def test_how_a_process_ended_is_seen_until_it_is_collected() -> None:
    ended = subprocess.Popen(["/bin/sh", "-c", "read gone; exit 7"], stdin=subprocess.PIPE)
    ticks = procfs.start_ticks(ended.pid) or 0
    assert procfs.wait_status(ended.pid, ticks) is None, "it runs"
    assert ended.stdin is not None
    ended.stdin.close()
    await eventually(lambda: procfs.wait_status(ended.pid, ticks) == 7 << 8)
    assert procfs.wait_status(ended.pid, ticks + 1) is None, "another process of this pid"
    ended.wait()
    assert procfs.wait_status(ended.pid, ticks) is None


@pytest.mark.parametrize("kernel", ["with children files", "without"])
async def test_every_generation_is_found(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    nest = subprocess.Popen(["/bin/sh", "-c", "sh -c 'sleep 60 & wait' & wait"], start_new_session=True)
    try:
        if kernel == "without":
            read = procfs._read
            monkeypatch.setattr(procfs, "_read", lambda pid, entry: None if entry.endswith("children") else read(pid, entry))
        await eventually(lambda: len(procfs.descendants(nest.pid)) == 2)
        found = procfs.descendants(nest.pid)
        assert all(procfs.start_ticks(pid) == ticks for pid, ticks in found.items())
        assert found.items() <= procfs.descendants(os.getpid()).items()
    finally:
        os.killpg(nest.pid, 9)
        nest.wait()
