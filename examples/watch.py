"""Many tasks that need one model, written from the documentation alone: ``python examples/watch.py MODEL.gguf``.

The tasks do not know of each other. The first of them starts the engine, the others join that start; each has a slot in
its turn. Another task prints what happens to the pool meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from pool_managerd import Config, PoolManager


async def watch(node: PoolManager) -> None:
    with node.subscribe("chat") as events:
        async for event in events:
            if event.level != "debug":
                print(f"  {event.type}: {event.human}")


async def work(node: PoolManager, number: int) -> str:
    async with node.acquire("chat", holder=f"task {number}") as lease:
        await asyncio.sleep(0.1)  # talk to lease.url here
        return f"task {number} had {lease.lease_id} at pid {node.status('chat')['pid']}"


async def main(model: Path, directory: Path) -> None:
    pool = {"id": "chat", "engine": "llamacpp", "model": f"file:{model}", "ctx": 512, "slots": 2, "preload": False}
    places = {"runtime_dir": directory / "run", "state_dir": directory / "state"}
    async with PoolManager(Config.model_validate({"profile": "dev", "daemon": places, "pools": [pool]})) as node:
        watching = asyncio.create_task(watch(node))
        print(*await asyncio.gather(*(work(node, number) for number in range(5))), sep="\n")
        await (await node.drain("chat", deadline_ms=5_000)).wait()
        watching.cancel()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)  # run by root, the engine has a user of its own, who must get to its directory
        asyncio.run(main(Path(sys.argv[1]).resolve(), Path(temporary)))
