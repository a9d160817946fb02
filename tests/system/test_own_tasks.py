"""The tasks of a real node's own: none of them ends, or it would be taken for failed and the daemon would end itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pool_managerd import PoolManager
from pool_managerd.wiring import gpu_parts
from tests.system.nodes import config, until


async def test_a_node_goes_on_when_it_has_reported_on_its_machine(open_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported = asyncio.Event()
    announce = gpu_parts.GpuParts.announce

    async def told(parts: gpu_parts.GpuParts) -> None:
        await announce(parts)
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, reported.set)  # behind whoever waited

    monkeypatch.setattr(gpu_parts, "START_QUIET_S", 0.0)
    monkeypatch.setattr(gpu_parts.GpuParts, "announce", told)
    fatal: list[BaseException] = []
    node = PoolManager(config(open_dir))
    node.on_fatal(fatal.append)
    async with node:
        await until(reported.is_set, "the report to be told")
        await asyncio.sleep(0)
        assert not node.events.recent("internal_error") and not fatal
