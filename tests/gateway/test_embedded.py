"""The gateway in the process of its node, with a real engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from pool_managerd import PoolManager, SpecError, open_gateway
from tests.system.nodes import config


async def test_an_embedded_node_serves_its_models_on_one_port(open_dir: Path, tiny_model: Path) -> None:
    pool = {
        "id": "tiny", "engine": "llamacpp", "model": f"file:{tiny_model}", "ctx": 512, "slots": 2, "preload": False,
        "provisioning": {"mode": "package", "flags": ["--threads", "1"]},
    }  # fmt: skip
    async with (
        PoolManager(config(open_dir, pool)) as node,
        open_gateway(node, "127.0.0.1:0") as url,
        aiohttp.ClientSession() as session,
    ):

        async def ask() -> int:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                assert (await answer.json())["model"] == "tiny"
                return answer.status

        assert await asyncio.gather(*(ask() for _ in range(8))) == [200] * 8
        assert node.status("tiny")["ready"]
        async with session.get(f"{url}/logs/stream/tiny") as log:
            assert await log.content.readline(), "what it wrote is there"
        async with session.get(f"{url}/logs/stream/tiny?no-history") as log:
            assert await ask() == 200
            assert await log.content.readline(), "and what it writes"
        async with session.post(f"{url}/api/models/unload/tiny") as answer:
            assert answer.status == 200
        assert not node.status("tiny")["live"] and node.leases("tiny") == []
        assert await ask() == 200, "it comes back"
    assert node.status("tiny")["active_leases"] == 0


async def test_off_loopback_it_wants_keys_there_too(open_dir: Path) -> None:
    async with PoolManager(config(open_dir)) as node:
        with pytest.raises(SpecError, match="without API keys"):
            async with open_gateway(node, "0.0.0.0:0"):
                pass
