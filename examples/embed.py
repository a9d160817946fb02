"""A program of your own that brings up engines when they are needed: ``python examples/embed.py MODEL.gguf``.

It runs pool-managerd inside its own event loop: no daemon, no control API, no signal handlers, no logging set up for you.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import aiohttp

from pool_managerd import Config, PoolManager, open_gateway


def configuration(model: Path, directory: Path) -> Config:
    """One pool that starts on demand. Usually this is a file; see ``load_config``."""
    return Config.model_validate({
        "profile": "dev",
        "daemon": {"runtime_dir": directory / "run", "state_dir": directory / "state"},
        "pools": [{
            "id": "chat", "engine": "llamacpp", "model": f"file:{model}", "ctx": 1024, "preload": False,
            "provisioning": {"flags": ["--threads", "1"]},
        }],
    })  # fmt: skip


async def ask(url: str) -> str:
    """As any client of OpenAI does."""
    body = {"model": "chat", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as answer:
        return str((await answer.json())["choices"][0]["text"])


async def main(model: Path, directory: Path) -> None:
    async with PoolManager(configuration(model, directory)) as node:
        node.events.listen(lambda event: print(f"  {event.human}") if event.journal and event.level != "debug" else None)

        # For yourself: a slot of the model, which is started for it, and its engine's own address. If this program is killed, the
        # slot is free a minute later.
        async with node.acquire("chat", holder="examples/embed.py", ttl_ms=60_000) as lease:
            print(f"ready at {lease.url} after {lease.queued_ms} ms, pid {node.status('chat')['pid']}")
            print("answer:", await ask(str(lease.url)))

        # For clients: one address for all models, each started when somebody asks for it.
        async with open_gateway(node, "127.0.0.1:0") as url:
            print(f"clients use {url}/v1")
            await (await node.evict("chat")).wait()
            print("answer:", await ask(url))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)  # run by root, the engine has a user of its own, who must get to its directory
        asyncio.run(main(Path(sys.argv[1]).resolve(), Path(temporary)))
