"""What real processes use, and which of them is stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pool_managerd.runtime import procfs
from pool_managerd.runtime.usage import EngineUsages, UsageReader
from tests.runtime.support import eventually

TREE = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "x = bytearray(64 << 20); print('there', flush=True); input()"], stdin=0)
while True: sum(range(10_000))
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[bytes]]:
    """A process that computes, and a child of it that holds 64 MiB and waits."""
    made = subprocess.Popen(
        [sys.executable, "-S", "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert made.stdout is not None
    made.stdout.readline()
    yield made
    os.killpg(made.pid, signal.SIGKILL)
    made.communicate()


async def test_the_whole_tree_is_counted(tree: subprocess.Popen[bytes]) -> None:
    reader = UsageReader(tree.pid)
    first = await reader.read(full=True)
    assert first is not None and first.memory_bytes > 64 << 20 and first.data_bytes is not None and first.data_bytes > 0
    deadline = asyncio.get_running_loop().time() + 20
    while asyncio.get_running_loop().time() < deadline:
        later = await reader.read(full=False)
        assert later is not None and later.data_bytes is None and later.stopped == "" == later.blocked
        if later.cpu_s > first.cpu_s + 0.2:
            return
        await asyncio.sleep(0.05)
    pytest.fail("no CPU time was seen")


async def test_a_stopped_descendant_is_named(tree: subprocess.Popen[bytes]) -> None:
    child = next(iter(procfs.descendants(tree.pid)))
    reader = UsageReader(tree.pid)
    assert await reader.read(full=False) is not None
    os.kill(child, signal.SIGSTOP)

    def state() -> str:
        found = procfs.stat(child)
        return found.state if found is not None else ""

    await eventually(lambda: state() == "T")
    for full in (True, False):
        used = await reader.read(full=full)
        assert used is not None and used.stopped == f"pid {child} ({procfs.name(child)})"


async def test_what_is_gone_uses_nothing(tree: subprocess.Popen[bytes]) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert await UsageReader(ended.pid).read(full=True) is None
    assert EngineUsages().stuck(ended.pid) == "" == EngineUsages().stuck(tree.pid)


def test_uninterruptible_sleep_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test can bring a process into it, so the kernel's words are made up."""
    read, ours = procfs._read, os.getpid()

    def sleeping(pid: int, entry: str) -> bytes | None:
        found = read(pid, entry)
        if entry.endswith("wchan"):
            return b"nfs_wait_bit_killable"
        return found.replace(b") R ", b") D ").replace(b") S ", b") D ") if found and entry.endswith("stat") else found

    monkeypatch.setattr(procfs, "_read", sleeping)
    told = EngineUsages().stuck(ours)
    assert told == f"pid {ours} ({procfs.name(ours)}) is in uninterruptible sleep (D) in nfs_wait_bit_killable"
