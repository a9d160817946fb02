from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.supervision.gpu_world import GpuWorld


@pytest.fixture
async def made() -> AsyncIterator[list[GpuWorld]]:
    worlds: list[GpuWorld] = []
    yield worlds
    for world in worlds:
        await world.pools.close()
