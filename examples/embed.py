"""A program of your own that brings up an engine when it needs one: ``python examples/embed.py MODEL.gguf``.

It runs pool-managerd inside its own event loop: no daemon, no HTTP API, no signal handlers, no logging set up for you.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import aiohttp

from pool_managerd import Config, PoolManager


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


async def main(model: Path, directory: Path) -> None:
    async with PoolManager(configuration(model, directory)) as node:
        node.events.listen(lambda event: print(f"  {event.human}") if event.journal and event.level != "debug" else None)
        async with node.acquire("chat", holder="examples/embed.py") as lease:
            print(f"ready at {lease.url} after {lease.queued_ms} ms, pid {node.status('chat')['pid']}")
            body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
            async with aiohttp.ClientSession() as session, session.post(f"{lease.url}/v1/completions", json=body) as answer:
                print("answer:", (await answer.json())["choices"][0]["text"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)  # run by root, the engine has a user of its own, who must get to its directory
        asyncio.run(main(Path(sys.argv[1]).resolve(), Path(temporary)))
